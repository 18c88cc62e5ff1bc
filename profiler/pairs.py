"""The pairs of work whose overlap is measured."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from profiler.compute import compute_dtype, random_weights
from profiler.effort import Effort, MiB
from profiler.links import Walk, filled
from profiler.offload import Offload
from profiler.overlap import Work
from runtime import layers, tiers
from runtime.disk import DiskPool
from runtime.transfer import Copier

MANY_ROWS = "products of many rows"
ONE_ROW = "products of one row"
READ, WRITE, COPY = "disk_read", "disk_write", "cpu_to_gpu"

_TRANSFER_BYTES = 32 * MiB
_ROWS = {"cpu": 64, "cuda": 2048}


@contextmanager
def pairs(
    device: torch.device, effort: Effort, offload: Offload, disk: dict[str, int]
) -> Iterator[Sequence[tuple[Work, Work]]]:
    """Compute bound by arithmetic and by memory, beside each link; and the links beside each other."""
    many, one = _products(device, effort)
    cuda = device.type == "cuda"
    with (
        DiskPool(threads=disk["threads"], chunk_bytes=disk["chunk_bytes"]) as pool,
        DiskPool(threads=disk["threads"], chunk_bytes=disk["chunk_bytes"]) as write_pool,
        Copier(device) as copier,
    ):
        nbytes = min(_TRANSFER_BYTES, offload.nbytes // 2)
        into, out_of = (filled(tiers.host_buffer(nbytes, pinned=cuda)) for _ in range(2))
        # Reads and writes keep to different halves of the file.
        half, place, back = offload.nbytes // 2, Walk(nbytes, offload.nbytes // 2), Walk(nbytes, offload.nbytes // 2)
        read = Work(name=READ, call=lambda: pool.read(offload.file, place(), into).synchronize())
        write = Work(name=WRITE, call=lambda: write_pool.write(offload.file, half + back(), out_of).synchronize())
        near = tiers.device_buffer(max(effort.working_set_bytes // 2, nbytes), device)
        far = filled(tiers.host_buffer(max(effort.working_set_bytes // 2, nbytes), pinned=cuda))
        copy = Work(name=COPY, call=_copy(copier, near, far, nbytes))
        loads = ((many, read), (one, read), (many, copy), (one, copy))
        yield (*loads, (many, write), (read, write), (copy, read))


def _products(device: torch.device, effort: Effort) -> tuple[Work, Work]:
    """Products with many rows and with one; each call ends when its result is there."""
    hidden, dtype = effort.hidden_size, compute_dtype(device)
    count = 4 if hidden >= 4096 else 8
    weights = [layers.Linear(weight=random_weights(hidden, hidden, dtype, device)) for _ in range(count)]
    states = random_weights(_ROWS[device.type], hidden, dtype, device)
    turn = Walk(1, len(weights))

    def product(rows: torch.Tensor, repeats: int) -> Callable[[], None]:
        def call() -> None:
            for _ in range(repeats):
                layers.linear(rows, weights[turn()])
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()

        return call

    return (
        Work(name=MANY_ROWS, call=product(states, 1)),
        Work(name=ONE_ROW, call=product(states[:1], len(weights))),
    )


def _copy(copier: Copier, near: torch.Tensor, far: torch.Tensor, nbytes: int) -> Callable[[], None]:
    walk = Walk(nbytes, near.nbytes)

    def call() -> None:
        start = walk()
        copier.copy(near[start : start + nbytes], far[start : start + nbytes]).synchronize()

    return call
