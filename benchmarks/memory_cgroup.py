"""Run a command inside a fresh memory cgroup, whose limit counts its page cache too, and remove the cgroup afterwards.

``python -m benchmarks.memory_cgroup --memory 3GiB [--cold FOLDER …] -- COMMAND …``

prints the limit and the machine, lets the command print, and then says how it ended, how long it took, the most memory
that the kernel charged to the cgroup and whether the kernel killed for it. Returns the command's exit code (128 + the
signal's number where a signal ended it). Needs Linux with memory cgroups, version 1 or 2, and root or a delegated one.

The cgroup is made below the caller's own (version 1) or below the nearest one that hands memory down to its children
(version 2), so that outer limits hold as before. Swap is not used.

**What is charged.** A page of a file is charged to the cgroup that first touches it, and to no other while it stays in
memory. A command reads its files within its limit only if they are not in memory when it starts: ``--cold``
(:func:`benchmarks.page_cache.evict`) sees to that. Libraries that are in memory already are charged to nobody here.
"""

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from benchmarks.page_cache import evict
from costmodel import units, words
from costmodel.errors import InputError, TierwiseError
from runtime import environment

REMOVAL_S = 30.0
"""How long a killed process may take to hand its memory back before the cgroup is left behind with an error."""


class CgroupError(TierwiseError):
    """No memory cgroup can be made here, or one could not be removed."""


@dataclass(frozen=True, kw_only=True)
class LimitedRun:
    """How a command ended; ``peak_bytes`` (memory and page cache) is ``None`` where the kernel does not tell it.

    ``oom_killed`` says that the kernel killed a process for want of memory, ``timed_out`` that this module killed it.
    """

    returncode: int
    stdout: str
    stderr: str
    wall_s: float
    limit_bytes: int
    peak_bytes: int | None
    oom_killed: bool
    timed_out: bool

    @property
    def ended(self) -> str:
        """In words: ``"exit code 0"``, ``"killed: out of memory"``."""
        if self.oom_killed:
            return "killed: out of memory"
        if self.timed_out:
            return "killed: out of time"
        if self.returncode < 0:
            return f"ended by {signal.Signals(-self.returncode).name}"
        return f"exit code {self.returncode}"


@dataclass(frozen=True, kw_only=True)
class MemoryGroup:
    """One memory cgroup with a limit; ``version`` is 1 or 2."""

    folder: Path
    version: int
    limit_bytes: int

    def peak_bytes(self) -> int | None:
        """The most that was charged at once; ``None`` before Linux 5.19 in version 2."""
        file = self.folder / ("memory.peak" if self.version == 2 else "memory.max_usage_in_bytes")
        return int(file.read_text()) if file.exists() else None

    def kills(self) -> int:
        """Processes that the kernel killed for want of memory."""
        file = self.folder / ("memory.events" if self.version == 2 else "memory.oom_control")
        pairs = (line.split() for line in file.read_text().splitlines())
        return next((int(pair[1]) for pair in pairs if pair[0] == "oom_kill"), 0)

    def processes(self) -> list[int]:
        """Identifiers of the processes inside."""
        return [int(line) for line in (self.folder / "cgroup.procs").read_text().split()]

    def run(
        self,
        command: Sequence[str],
        *,
        timeout_s: float | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        capture: bool = True,
    ) -> LimitedRun:
        """Run a command inside, from its first instruction on; what it starts is killed when it ends."""
        # The shell enters the cgroup and then becomes the command: nothing of ours is ever charged to it.
        line = ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.folder / "cgroup.procs"), *command]
        began, timed_out = time.perf_counter(), False
        # Files, not pipes: a helper that outlives the command would keep a pipe open.
        with (
            tempfile.TemporaryFile("w+", errors="replace") as out,
            tempfile.TemporaryFile("w+", errors="replace") as err,
        ):
            with subprocess.Popen(
                line, env=env, cwd=cwd, stdout=out if capture else None, stderr=err if capture else None
            ) as process:
                try:
                    process.wait(timeout=timeout_s)
                except subprocess.TimeoutExpired:
                    timed_out = True
                finally:
                    wall_s = time.perf_counter() - began
                    process.kill()  # it may not have entered yet
                    self.kill()
            stdout, stderr = (_content(stream) for stream in (out, err))
        return LimitedRun(
            returncode=process.returncode,
            stdout=stdout,
            stderr=stderr,
            wall_s=wall_s,
            limit_bytes=self.limit_bytes,
            peak_bytes=self.peak_bytes(),
            oom_killed=self.kills() > 0,
            timed_out=timed_out,
        )

    def kill(self) -> None:
        """End every process inside and wait until they are gone."""
        end = time.monotonic() + REMOVAL_S
        while (inside := self.processes()) and time.monotonic() < end:
            for process in inside:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.01)

    def remove(self) -> None:
        """Kill what is left, give its page cache back and remove the cgroup."""
        self.kill()
        if self.version == 1:  # version 2 has no such file: what is cached goes to the parent
            with contextlib.suppress(OSError):
                (self.folder / "memory.force_empty").write_text("0")
        end = time.monotonic() + REMOVAL_S
        while True:
            try:
                self.folder.rmdir()
                return
            except FileNotFoundError:
                return
            except OSError as error:
                if time.monotonic() > end:
                    raise CgroupError(f"{self.folder}: cannot be removed: {error.strerror}") from None
                time.sleep(0.05)


@contextlib.contextmanager
def memory_group(limit_bytes: int) -> Iterator[MemoryGroup]:
    """A cgroup with that limit on memory and page cache together, gone on any exit but SIGKILL."""
    if limit_bytes < 2**20:
        raise InputError(f"the memory limit is {limit_bytes} bytes: at least 1 MiB is needed")
    version, parent = _parent()
    try:
        folder = Path(tempfile.mkdtemp(prefix=f"tierwise-{os.getpid()}-", dir=parent))
    except OSError as error:
        raise CgroupError(
            f"no memory cgroup can be made in {parent}: {error.strerror}; run as root, or in a delegated cgroup "
            "(systemd-run --user --scope -p Delegate=yes …)"
        ) from None
    group = MemoryGroup(folder=folder, version=version, limit_bytes=limit_bytes)
    try:
        _limit(group)
        yield group
    finally:
        group.remove()


def run_limited(
    command: Sequence[str],
    limit_bytes: int,
    *,
    timeout_s: float | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> LimitedRun:
    """Run one command in a cgroup of its own."""
    with memory_group(limit_bytes) as group:
        return group.run(command, timeout_s=timeout_s, env=env, cwd=cwd)


def _content(stream: IO[str]) -> str:
    stream.seek(0)
    return stream.read()


def _limit(group: MemoryGroup) -> None:
    names = (
        ("memory.max", "memory.swap.max")
        if group.version == 2
        else ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
    )
    memory, swap = (group.folder / name for name in names)
    try:
        memory.write_text(str(group.limit_bytes))
        if swap.exists():  # version 2 counts swap by itself, version 1 counts it with the memory
            swap.write_text("0" if group.version == 2 else str(group.limit_bytes))
        if group.version == 2:  # one killed thread group would leave its helpers waiting
            (group.folder / "memory.oom.group").write_text("1")
    except OSError as error:
        raise CgroupError(f"{group.folder}: the memory limit cannot be set: {error.strerror}") from None


def _parent(root: Path = Path("/")) -> tuple[int, Path]:
    """(version, folder) in which a memory cgroup can be made; ``root`` is the file system's (tests hand in another)."""
    own = [line.split(":", 2) for line in _lines(root / "proc/self/cgroup")]
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        words, kind = before.split(), after.split()
        if len(words) < 5 or len(kind) < 3:
            continue
        top = root / words[4].lstrip("/")
        if kind[0] == "cgroup" and "memory" in kind[2].split(","):
            below = next((path for _, names, path in own if "memory" in names.split(",")), "/")
            return 1, top / _relative(below, words[3])
        if kind[0] == "cgroup2" and "memory" in " ".join(_lines(top / "cgroup.controllers")).split():
            below = next((path for number, _, path in own if number == "0"), "/")
            folder = top / _relative(below, words[3])
            for candidate in (folder, *folder.parents):
                if "memory" in " ".join(_lines(candidate / "cgroup.subtree_control")).split():
                    return 2, candidate
                if candidate == top:
                    break
            raise CgroupError(f"no cgroup between {folder} and {top} hands memory limits down to its children")
    raise CgroupError(
        "no memory cgroup can be made: the kernel has mounted none (Linux with cgroup v1 or v2 is needed)"
    )


def _relative(group: str, mounted: str) -> str:
    """A group's path below a mount that may show a part of the hierarchy only, as in a container."""
    inside = mounted != "/" and (group == mounted or group.startswith(mounted + "/"))
    return (group[len(mounted) :] if inside else group).strip("/")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def end_on_sigterm() -> None:
    """Let SIGTERM leave through the ``finally`` clauses, as Ctrl-C does, so that no cgroup stays behind."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command given after ``--``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory_cgroup", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--memory", required=True, metavar="SIZE", help="the limit, such as 3GiB")
    parser.add_argument(
        "--cold", type=Path, nargs="+", default=(), metavar="PATH", help="evict these from memory first"
    )
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="kill it after so long")
    parser.add_argument("command", nargs="+", help="the command, after --")
    args = parser.parse_args(argv)
    end_on_sigterm()
    try:
        limit_bytes = int(units.parse(args.memory, "bytes"))
        print(
            f"{units.format_bytes(limit_bytes)} of memory and page cache; {environment.cpu_name()}, "
            f"{words.counted(environment.usable_cores(), 'core')}; "
            f"commit {environment.commit()}, {environment.today()}",
            flush=True,
        )
        if args.cold:
            print(f"{units.format_bytes(evict(*args.cold))} stayed in the page cache", flush=True)
        with memory_group(limit_bytes) as group:
            run = group.run(args.command, timeout_s=args.timeout, capture=False)
    except TierwiseError as error:
        print(f"memory_cgroup: {error}", file=sys.stderr)
        return error.exit_code
    peak = "not told by this kernel" if run.peak_bytes is None else units.format_bytes(run.peak_bytes)
    print(f"{shlex.join(args.command)}: {run.ended} after {run.wall_s:.1f} s; peak {peak}")
    return run.returncode if run.returncode >= 0 else 128 - run.returncode


if __name__ == "__main__":
    sys.exit(main())
