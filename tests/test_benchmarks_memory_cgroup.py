"""The memory cgroup of the benchmarks: its limit binds, page cache counts, and nothing of it stays behind."""

import sys
from pathlib import Path

import pytest

from benchmarks import memory_cgroup
from benchmarks.memory_cgroup import CgroupError, LimitedRun, run_limited
from benchmarks.page_cache import evict, resident_bytes
from costmodel.errors import InputError

MiB = 2**20
LIMIT = 64 * MiB


def limited(*command: str, timeout_s: float | None = 60) -> LimitedRun:
    try:
        return run_limited(command, LIMIT, timeout_s=timeout_s)
    except CgroupError as error:
        pytest.skip(str(error))


def held(mebibytes: int) -> LimitedRun:
    return limited(sys.executable, "-S", "-c", f"held = b'x' * ({mebibytes} << 20); print('held')")


def test_a_run_within_the_limit_ends_well_and_its_peak_is_told() -> None:
    run = held(20)
    assert (run.returncode, run.stdout, run.oom_killed, run.timed_out) == (0, "held\n", False, False)
    assert run.peak_bytes is None or 20 * MiB < run.peak_bytes < 40 * MiB


def test_a_run_above_the_limit_is_killed_for_memory() -> None:
    run = held(200)
    assert (run.oom_killed, run.returncode, run.stdout) == (True, -9, "")
    assert run.ended == "killed: out of memory"


def test_page_cache_is_charged_and_given_back(tmp_path: Path) -> None:
    file = tmp_path / "large"
    file.write_bytes(bytes(200 * MiB))
    assert evict(file) == 0
    run = limited("cat", str(file))
    assert run.returncode == 0
    assert run.peak_bytes is None or LIMIT - MiB < run.peak_bytes <= LIMIT


def test_eviction_counts_what_stayed(tmp_path: Path) -> None:
    file = tmp_path / "cached"
    file.write_bytes(bytes(3 * MiB + 1))
    with file.open("rb") as stream:
        stream.read()
        if resident_bytes(stream.fileno()) < 3 * MiB:
            pytest.skip("this file system keeps nothing in memory")
        evict(tmp_path)
        assert resident_bytes(stream.fileno()) == 0


def test_out_of_time_ends_the_helpers_too() -> None:
    run = limited("sh", "-c", "sleep 60 & sleep 60", timeout_s=0.3)
    assert (run.timed_out, run.oom_killed, run.ended) == (True, False, "killed: out of time")
    assert run.wall_s < 30


def test_a_helper_that_outlives_its_command_is_ended() -> None:
    run = limited("sh", "-c", "sleep 60 & echo done")
    assert (run.returncode, run.stdout) == (0, "done\n")
    assert run.wall_s < 30


def test_the_cgroup_is_removed_after_a_run_and_after_an_error() -> None:
    try:
        with memory_cgroup.memory_group(LIMIT) as first:
            assert first.run(["true"]).returncode == 0
    except CgroupError as error:
        pytest.skip(str(error))
    with pytest.raises(KeyboardInterrupt), memory_cgroup.memory_group(LIMIT) as second:
        raise KeyboardInterrupt
    assert not first.folder.exists()
    assert not second.folder.exists()


def test_a_limit_below_one_mebibyte_is_refused() -> None:
    with pytest.raises(InputError, match="at least 1 MiB"):
        run_limited(["true"], 1000)


V1 = (
    "4:memory:/own\n0::/\n",
    "30 25 0:26 / /cg/memory rw - cgroup cgroup rw,memory\n31 25 0:27 / /cg2 rw - cgroup2 x rw\n",
)
V2 = "0::/user/own\n", "31 25 0:27 / /cg2 rw - cgroup2 x rw\n"


@pytest.mark.parametrize(
    ("told", "handed_down", "expected"),
    [(V1, "", (1, "cg/memory/own")), (V2, "cg2/user", (2, "cg2/user")), (V2, "cg2/user/own", (2, "cg2/user/own"))],
)
def test_where_a_cgroup_is_made(
    told: tuple[str, str], handed_down: str, expected: tuple[int, str], tmp_path: Path
) -> None:
    _machine(tmp_path, *told)
    if handed_down:
        (tmp_path / handed_down / "cgroup.subtree_control").write_text("cpu memory\n")
    version, folder = expected
    assert memory_cgroup._parent(tmp_path) == (version, tmp_path / folder)


def test_without_a_hierarchy_for_memory_the_error_says_so(tmp_path: Path) -> None:
    _machine(tmp_path, *V2)
    with pytest.raises(CgroupError, match="hands memory limits down"):
        memory_cgroup._parent(tmp_path)
    _machine(tmp_path, V2[0], "")
    with pytest.raises(CgroupError, match="mounted none"):
        memory_cgroup._parent(tmp_path)


def _machine(root: Path, cgroup: str, mountinfo: str) -> None:
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    (root / "proc/self/mountinfo").write_text(mountinfo)
    (root / "cg2/user/own").mkdir(parents=True, exist_ok=True)
    (root / "cg2/cgroup.controllers").write_text("" if ":memory:" in cgroup else "cpu memory\n")
