"""Timing the copies between tiers: host memory and device, host memory and disk."""

from collections.abc import Callable
from typing import Any

import torch

from profiler.effort import Effort, MiB
from profiler.offload import Offload
from profiler.timing import Reading, Results, Task, Timer, time_tasks
from runtime import tiers
from runtime.disk import DEFAULT_CHUNK_BYTES, DEFAULT_THREADS, IN_FLIGHT_BYTES, DiskFile, DiskPool
from runtime.transfer import Copier

MOST_THREADS = 8
"""Threads that read small chunks side by side."""

CLEARLY_BETTER = 1.1
"""A setting must beat the default by this factor to replace it."""


class Walk:
    """The next offset at which to copy ``nbytes``, walking round and round ``total``."""

    def __init__(self, nbytes: int, total: int) -> None:
        self._step, self._places, self._next = nbytes, max(1, total // nbytes), 0

    def __call__(self) -> int:
        offset = self._step * self._next
        self._next = (self._next + 1) % self._places
        return offset


class MemoryCopies:
    """Copies between the two memory tiers; on CUDA pinned and pageable, each way and both ways at once."""

    title = "copies between memory tiers"
    weight = 10.0

    def __init__(self, device: torch.device, effort: Effort) -> None:
        self.device, self.effort = device, effort

    def run(self, timer: Timer, budget_s: float, previous: Results) -> list[Reading]:
        """One curve over sizes for each direction and kind of memory."""
        cuda = self.device.type == "cuda"
        total = max(self.effort.copy_bytes[-1], self.effort.working_set_bytes)
        near = filled(tiers.device_buffer(total, self.device))
        far = {"pinned" if cuda else "host": filled(tiers.host_buffer(total, pinned=cuda))}
        if cuda:
            far["pageable"] = filled(tiers.host_buffer(total))
        with Copier(self.device) as copier:
            tasks: list[Task] = []
            for memory, host in far.items():
                sizes = self.effort.copy_bytes if memory != "pageable" else self.effort.copy_bytes[-1:]
                for link, target, source in (("cpu_to_gpu", near, host), ("gpu_to_cpu", host, near)):
                    tasks += [_copy_task(copier, link, memory, target, source, nbytes) for nbytes in sizes]
            if cuda:  # elsewhere the cores that compute make copies in turn
                tasks.append(_both_ways(copier, near, far["pinned"], self.effort.copy_bytes[-1]))
            return time_tasks(tasks, len(tasks), timer=timer, budget_s=budget_s, previous=previous)


def _copy_task(copier: Copier, link: str, memory: str, target: torch.Tensor, source: torch.Tensor, nbytes: int) -> Task:
    walk = Walk(nbytes, target.nbytes)

    def body() -> None:
        start = walk()
        copier.copy(target[start : start + nbytes], source[start : start + nbytes]).synchronize()

    return Task(name=link, at={"memory": memory, "bytes": nbytes}, unit="bytes/s", work=nbytes, body=body)


def _both_ways(copier: Copier, near: torch.Tensor, far: torch.Tensor, nbytes: int) -> Task:
    half = nbytes // 2

    def body() -> None:
        up = copier.copy(near[:half], far[:half])
        down = copier.copy(far[-half:], near[-half:])
        up.synchronize()
        down.synchronize()

    return Task(name="both_ways", at={"bytes": nbytes}, unit="bytes/s", work=2 * half, body=body)


def filled(buffer: torch.Tensor) -> torch.Tensor:
    """The same buffer, every page of it touched and holding no zeros."""
    return buffer.random_(1, 256) if buffer.nbytes <= MiB else _tiled(buffer)


def _tiled(buffer: torch.Tensor) -> torch.Tensor:
    buffer[:MiB].random_(1, 256)
    done = MiB
    while done < buffer.nbytes:
        step = min(done, buffer.nbytes - done)
        buffer[done : done + step].copy_(buffer[:step])
        done += step
    return buffer


class DiskTransfers:
    """Reads of what the runtime reads, or writes of the measurement file: by threads and chunk, size, and buffered."""

    weight = 12.0

    def __init__(self, link: str, offload: Offload, effort: Effort, buffer: Callable[[], torch.Tensor]) -> None:
        self.link, self.offload, self.effort, self._buffer = link, offload, effort, buffer
        self.title = f"disk {'reads' if link == 'disk_read' else 'writes'}"
        self.threads, self.chunk_bytes = DEFAULT_THREADS, DEFAULT_CHUNK_BYTES
        self._chosen = False

    def run(self, timer: Timer, budget_s: float, previous: Results) -> list[Reading]:
        """The first round chooses threads and chunk; every round measures all curves."""
        began = timer.now()
        buffer = self._buffer()
        readings = self._sweep(buffer, timer, budget_s * 0.35, previous)
        if not self._chosen:
            self._choose(readings)
        tasks: list[Task] = []
        with DiskPool(threads=self.threads, chunk_bytes=self.chunk_bytes) as pool:
            sizes = [size for size in self.effort.disk_bytes if size <= min(buffer.nbytes, self.offload.nbytes)]
            at = {"method": self.own_method}
            tasks += [self._task(pool, buffer, size, at) for size in sizes]
            if self.own_method == "direct":
                tasks.append(self._buffered(pool, buffer, sizes[-1]))
            left_s = max(0.0, budget_s - (timer.now() - began))
            readings += time_tasks(tasks, len(tasks), timer=timer, budget_s=left_s, previous=previous)
        return readings

    @property
    def _file(self) -> DiskFile:
        return self.offload.read_from if self.link == "disk_read" else self.offload.file

    @property
    def _file_bytes(self) -> int:
        return self.offload.read_bytes if self.link == "disk_read" else self.offload.nbytes

    @property
    def own_method(self) -> str:
        """What the runtime does on this file system."""
        return "direct" if self.offload.file.direct else "buffered"

    def settings(self) -> dict[str, int]:
        """What the curves were measured with."""
        return {"threads": self.threads, "chunk_bytes": self.chunk_bytes}

    def _sweep(self, buffer: torch.Tensor, timer: Timer, budget_s: float, previous: Results) -> list[Reading]:
        """The largest transfer, over threads and over chunks, one at a time."""
        nbytes = min(self.effort.disk_bytes[-1], buffer.nbytes)
        pairs = [(threads, DEFAULT_CHUNK_BYTES) for threads in self.effort.disk_threads]
        pairs += [
            (max(1, min(MOST_THREADS, IN_FLIGHT_BYTES // chunk)), chunk)
            for chunk in self.effort.disk_chunks
            if chunk != DEFAULT_CHUNK_BYTES
        ]
        readings: list[Reading] = []
        end = timer.now() + budget_s
        for index, (threads, chunk) in enumerate(pairs):
            share_s = max(0.0, end - timer.now()) / (len(pairs) - index)
            with DiskPool(threads=threads, chunk_bytes=chunk) as pool:
                at = {"method": self.own_method, "threads": threads, "chunk_bytes": chunk}
                task = self._task(pool, buffer, nbytes, at, name=f"{self.link}_setting")
                readings += time_tasks([task], 1, timer=timer, budget_s=share_s, previous=previous)
        return readings

    def _choose(self, readings: list[Reading]) -> None:
        """Keep the default setting unless another is clearly faster."""
        results = Results()
        results.add(readings)
        figures = results.select(f"{self.link}_setting")
        default = [
            f for f in figures if (f.get("threads"), f.get("chunk_bytes")) == (DEFAULT_THREADS, DEFAULT_CHUNK_BYTES)
        ]
        best = max(figures, key=lambda figure: figure.median, default=None)
        if best is not None and (not default or best.median > CLEARLY_BETTER * default[0].median):
            self.threads, self.chunk_bytes = best.number("threads"), best.number("chunk_bytes")
        self._chosen = True

    def _task(
        self, pool: DiskPool, buffer: torch.Tensor, nbytes: int, at: dict[str, Any], *, name: str | None = None
    ) -> Task:
        file, walk = self._file, Walk(nbytes, self._file_bytes)
        memory = buffer[:nbytes]

        def read() -> None:
            pool.read(file, walk(), memory).synchronize()

        def write() -> None:
            pool.write(file, walk(), memory).synchronize()
            if not file.direct:
                file.flush()

        reads = self.link == "disk_read"
        return Task(
            name=name or self.link,
            at={**at, "bytes": nbytes},
            unit="bytes/s",
            work=nbytes,
            body=read if reads else write,
            before=None if file.direct or not reads else file.drop_cache,
        )

    def _buffered(self, pool: DiskPool, buffer: torch.Tensor, nbytes: int) -> Task:
        """The same through the page cache: reads after the pages were dropped, writes until they are on the disk."""
        file, walk = self._file, Walk(nbytes, self._file_bytes)
        memory = buffer[:nbytes]

        def read() -> None:
            pool.read(file, walk(), memory, direct=False).synchronize()

        def write() -> None:
            pool.write(file, walk(), memory, direct=False).synchronize()
            file.flush()

        return Task(
            name=self.link,
            at={"method": "buffered", "bytes": nbytes},
            unit="bytes/s",
            work=nbytes,
            body=read if self.link == "disk_read" else write,
            before=file.drop_cache,
        )
