"""The way through host memory that CUDA's bytes take, with a device that needs no GPU."""

import threading
from pathlib import Path

import pytest
import torch

from runtime.movers import RELAY_THREADS, Movers
from runtime.pending import Arrived, Pending
from runtime.tiers import host_buffer
from runtime.timeline import Timeline

NBYTES = 8192
PATIENCE_S = 30.0


class Computing(Pending):
    """A copy from the device, which ends when the computation before it does."""

    def __init__(self, over: threading.Event) -> None:
        self.over = over

    def done(self) -> bool:
        return self.over.is_set()

    def wait(self) -> None:
        self.synchronize()

    def synchronize(self) -> None:
        assert self.over.wait(PATIENCE_S)


class Device:
    """Stands for the copier of a CUDA device: copies up are at once, copies down come after the computation."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self.arrived: list[bytes] = []

    def mark(self) -> Pending:
        return Arrived()

    def copy(self, target: torch.Tensor, source: torch.Tensor, *, link: str, **_: object) -> Pending:
        if link == "gpu_to_cpu":
            target.fill_(7)
            return Computing(self.over)
        self.arrived.append(source.numpy().tobytes())
        return Arrived()

    def close(self) -> None:
        pass


def test_threads_end_and_files_close_where_the_device_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = threading.enumerate()
    movers = Movers(torch.device("cpu"), timeline=Timeline())
    file = movers.nameless_file(tmp_path, NBYTES)
    movers.load(file, 0, host_buffer(NBYTES), name="load").synchronize()
    assert len(threading.enumerate()) > len(before)

    def failed() -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(movers.copier, "close", failed)
    with pytest.raises(RuntimeError, match="launch failure"):
        movers.close()
    assert threading.enumerate() == before
    with pytest.raises(OSError, match="Bad file descriptor"):
        _ = file.nbytes


def test_loads_go_on_while_stores_wait_for_the_computation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    near = torch.empty(NBYTES, dtype=torch.uint8, device="meta")
    device = Device()
    with Movers(torch.device("cpu"), timeline=Timeline()) as movers:
        movers.copier.close()
        monkeypatch.setattr(movers, "copier", device)
        file = movers.nameless_file(tmp_path, 2 * (RELAY_THREADS + 1) * NBYTES)
        relays = [host_buffer(NBYTES) for _ in range(RELAY_THREADS + 2)]
        stores = [
            movers.store(file, number * NBYTES, near, name="store", relay=relays[number])
            for number in range(RELAY_THREADS + 1)
        ]
        load = movers.load(file, NBYTES * (RELAY_THREADS + 1), near, name="load", relay=relays[-1])
        loaded = threading.Thread(target=load.synchronize, daemon=True)
        loaded.start()
        loaded.join(PATIENCE_S)
        assert not loaded.is_alive()
        assert device.arrived == [bytes(NBYTES)]
        assert not any(store.done() for store in stores)
        # What is read must have been written: such a load does wait.
        after = movers.load(file, 0, near, name="load", relay=relays[-1], after=stores)
        assert not after.done()
        device.over.set()
        after.synchronize()
        assert device.arrived[-1] == bytes([7] * NBYTES)
        for store in stores:
            store.synchronize()


class Slow(Pending):
    """Work that ends when it is waited for."""

    def __init__(self) -> None:
        self.over = False

    def done(self) -> bool:
        return self.over

    def wait(self) -> None:
        self.synchronize()

    def synchronize(self) -> None:
        self.over = True


@pytest.mark.parametrize(("overlap", "awaited"), [(True, False), (True, True), (False, False), (False, True)])
def test_a_step_moves_side_by_side_and_is_waited_for_without_overlap_or_where_a_computation_awaits_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overlap: bool, awaited: bool
) -> None:
    begun: list[Slow] = []

    def read(*_: object, **__: object) -> Slow:
        assert not any(one.done() for one in begun), "a piece waits for the one before it"
        begun.append(Slow())
        return begun[-1]

    with Movers(torch.device("cpu"), timeline=Timeline(), overlap=overlap) as movers:
        monkeypatch.setattr(movers.disk, "read", read)
        file = movers.nameless_file(tmp_path, NBYTES)
        for _ in range(3):
            movers.load(file, 0, host_buffer(NBYTES), name="load")
        movers.settle(awaited=awaited)
        assert [one.done() for one in begun] == [awaited or not overlap] * 3


def test_without_overlap_who_waits_moves_what_no_thread_of_the_disk_has_begun(tmp_path: Path) -> None:
    timeline = Timeline()
    with Movers(torch.device("cpu"), timeline=timeline, overlap=False, disk_threads=1) as movers:
        blocked, gate = threading.Event(), threading.Event()

        def hold() -> None:
            blocked.set()
            assert gate.wait(PATIENCE_S)

        held = movers.disk._pool.submit(hold)  # as a thread that is slow to wake up
        assert blocked.wait(PATIENCE_S)
        file = movers.nameless_file(tmp_path, NBYTES)
        source, target = host_buffer(NBYTES).fill_(3), host_buffer(NBYTES).fill_(0)
        movers.store(file, 0, source, name="store")
        movers.settle(awaited=False)
        movers.load(file, 0, target, name="load")
        movers.settle(awaited=False)
        assert torch.equal(source, target)
        assert not held.done()
        gate.set()
