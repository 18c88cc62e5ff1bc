"""The two memory tiers and the copies between them, on the CPU and, where there is one, on CUDA."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from costmodel.errors import InputError
from runtime import tiers
from runtime.pending import OnThreads, Pending, drain
from runtime.transfer import Copier

CPU = torch.device("cpu")
DTYPES = [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.int64]


@given(nbytes=st.integers(0, 3 * 2**21))
def test_host_buffers_are_aligned_zeroed_and_exact(nbytes: int) -> None:
    buffer = tiers.host_buffer(nbytes)
    assert buffer.nbytes == nbytes
    assert buffer.dtype is torch.uint8
    assert buffer.data_ptr() % 4096 == 0
    assert not buffer.any()


def test_host_buffer_is_returned_to_the_system() -> None:
    def mapped() -> int:
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
            return int(file.read().split()[0]) * 4096

    gc.collect()
    before = mapped()
    buffer = tiers.host_buffer(2**30)
    assert mapped() >= before + 2**30
    part = buffer[5:9]
    del buffer
    assert mapped() >= before + 2**30  # a view keeps it
    del part
    gc.collect()
    assert mapped() < before + 2**29


def test_memory_that_cannot_be_had_is_one_sentence() -> None:
    with pytest.raises(InputError, match=r"^8388608 TiB|^[\d.e+]+ TiB of host memory cannot be allocated: "):
        tiers.host_buffer(2**62)
    with pytest.raises(InputError, match="nbytes is -1"):
        tiers.host_buffer(-1)


def test_gpu_memory_that_cannot_be_had_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB, and much more text")

    monkeypatch.setattr(torch, "empty", full)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**34))
    with pytest.raises(InputError, match=r"^2 GiB of GPU memory cannot be allocated: 1 GiB of 16 GiB are free$"):
        tiers.device_buffer(2**31, torch.device("cuda", 0))


def test_memory_that_cannot_be_pinned_leaves_no_error_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA keeps the refusal, and the check after the next kernel would take it for that kernel's."""
    made: list[str] = []

    class Refusing:
        def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802
            return 2

    def zeros(count: int, *, device: str) -> None:
        made.append(device)
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(tiers, "cudart", Refusing)
    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.raises(InputError, match=r"^4 KiB of host memory cannot be pinned: CUDA error 2$"):
        tiers.host_buffer(4096, pinned=True)
    assert made == ["cuda"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_share_memory(dtype: torch.dtype) -> None:
    buffer = tiers.device_buffer(4096, CPU)
    matrix = tiers.view(buffer, dtype, 3, 5)
    matrix.fill_(1)
    assert matrix.shape == (3, 5)
    assert buffer[: 15 * dtype.itemsize].any()
    assert not buffer[15 * dtype.itemsize :].any()


def test_view_larger_than_its_buffer_is_refused() -> None:
    with pytest.raises(InputError, match=r"shape \(3, 5\) of torch.float32 takes 60 bytes: the buffer has 59"):
        tiers.view(tiers.host_buffer(59), torch.float32, 3, 5)


def test_device_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tiers.select_device("auto") == tiers.select_device("cpu") == CPU
    with pytest.raises(InputError, match=r"device is 'cuda': torch .* sees no CUDA device here"):
        tiers.select_device("cuda")
    with pytest.raises(InputError, match="device is 'tpu': one of auto, cuda, cpu"):
        tiers.select_device("tpu")


@pytest.mark.parametrize(("nbytes", "expected"), [(0, 0), (1, 4096), (4096, 4096), (4097, 8192)])
def test_round_up(nbytes: int, expected: int) -> None:
    assert tiers.round_up(nbytes) == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 1, 5)])
def test_copies_are_exact(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    source = torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    target = torch.full_like(source, 111)
    with Copier(CPU) as copier:
        copier.copy(target, source).wait()
    assert torch.equal(target, source)


def test_strided_copies_touch_only_their_part() -> None:
    cache, new = torch.zeros(2, 3, 8, 4, dtype=torch.bfloat16), torch.randn(2, 3, 1, 4).to(torch.bfloat16)
    with Copier(CPU) as copier:
        copier.copy(cache[:, :, 5:6], new).wait()
    assert torch.equal(cache[:, :, 5:6], new)
    assert cache.count_nonzero() == new.count_nonzero()


def test_shapes_and_dtypes_must_agree() -> None:
    with Copier(CPU) as copier:
        with pytest.raises(ValueError, match=r"cannot copy \(3,\) torch.float32 into \(4,\) torch.float32"):
            copier.copy(torch.zeros(4), torch.zeros(3))
        with pytest.raises(ValueError, match="cannot copy"):
            copier.copy(torch.zeros(4), torch.zeros(4, dtype=torch.float64))


class Waited(Pending):
    """Records that someone waited for it."""

    def __init__(self) -> None:
        self.waited = False

    def done(self) -> bool:
        return self.waited

    def wait(self) -> None:
        self.waited = True

    def synchronize(self) -> None:
        self.waited = True


def test_a_copy_begins_after_what_it_depends_on() -> None:
    before = Waited()
    with Copier(CPU) as copier:
        assert copier.mark().done()
        copier.copy(torch.zeros(1), torch.ones(1), after=(before, copier.mark())).wait()
    assert before.waited


def test_what_is_under_way_is_waited_for_to_the_end_before_an_error_is_raised() -> None:
    gate, arrived = threading.Event(), []

    def fail() -> None:
        raise OSError("broken")

    def late() -> None:
        gate.wait(10)
        arrived.append("late")

    with ThreadPoolExecutor(2) as pool:
        first, second = ({1: [OnThreads(pool, [work])]} for work in (fail, late))
        threading.Timer(0.05, gate.set).start()
        with pytest.raises(OSError, match="broken"):
            drain(first, second)
        assert (arrived, first, second) == (["late"], {}, {})


def test_who_waits_does_what_no_thread_has_begun_each_part_once() -> None:
    gate, begun, done_by = threading.Event(), threading.Event(), list[tuple[int, str]]()

    def work(number: int) -> None:
        if number == 0:
            begun.set()
            gate.wait(10)
        if number == 2:
            raise OSError("broken")
        done_by.append((number, threading.current_thread().name))

    with ThreadPoolExecutor(1, thread_name_prefix="pool") as pool:
        pending = OnThreads(pool, [partial(work, number) for number in range(4)])
        assert begun.wait(10)
        pending.help()  # the only thread is busy: an error of a part is kept, the others are done
        here = threading.current_thread().name
        assert done_by == [(1, here), (3, here)]
        assert not pending.done()
        gate.set()
        with pytest.raises(OSError, match="broken"):
            pending.synchronize()
        assert pending.done()
    assert sorted(number for number, _ in done_by) == [0, 1, 3]


def test_an_interrupt_of_who_helps_passes_on_and_leaves_nothing_to_wait_for() -> None:
    gate, begun = threading.Event(), threading.Event()

    def work(number: int) -> None:
        if number == 0:
            begun.set()
            gate.wait(10)
        elif number == 1:
            raise KeyboardInterrupt

    with ThreadPoolExecutor(1) as pool:
        pending = OnThreads(pool, [partial(work, number) for number in range(3)])
        assert begun.wait(10)
        with pytest.raises(KeyboardInterrupt):
            pending.help()
        gate.set()
        drain({1: [pending]})
        assert pending.done()


def test_what_a_thread_has_begun_or_done_is_not_done_again() -> None:
    counted = []
    with ThreadPoolExecutor(2) as pool:
        pending = OnThreads(pool, [lambda: counted.append(1)] * 5)
        pending.synchronize()
        pending.help()
        pending.synchronize()
    assert counted == [1] * 5


def test_copies_in_host_memory_are_made_at_once_and_timed() -> None:
    seen = []
    source, target = torch.arange(10), torch.zeros(10, dtype=torch.int64)
    threads = threading.active_count()
    with Copier(CPU, observer=lambda *what: seen.append(what)) as copier:
        pending = copier.copy(target, source, link="gpu_to_cpu", name="hidden 0")
        assert torch.equal(target, source)
        assert pending.done()
    assert threading.active_count() == threads
    ((link, name, began, ended, nbytes),) = seen
    assert (link, name, nbytes) == ("gpu_to_cpu", "hidden 0", 80)
    assert began <= ended


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_copies_on_cuda_run_beside_the_computation_and_are_exact() -> None:
    device = tiers.select_device("cuda")
    source = tiers.host_buffer(2**24, pinned=True)
    source.random_()
    assert source.is_pinned()
    back = tiers.host_buffer(2**24, pinned=True)
    near = tiers.device_buffer(2**24, device)
    with Copier(device) as copier:
        up = copier.copy(near, source)
        up.wait()
        near.bitwise_xor_(255)  # on the current stream, which waits for the copy
        down = copier.copy(back, near, after=(copier.mark(),))
        down.synchronize()
        assert up.done()
        assert down.done()
    assert torch.equal(back, source ^ 255)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_that_is_still_being_copied_on_cuda_is_not_given_out() -> None:
    """Whoever drops a tensor and the pending copy of it must not get its memory written by the next kernel."""
    nbytes = 2**28
    back = tiers.host_buffer(nbytes, pinned=True)
    with Copier(tiers.select_device("cuda")) as copier:
        for _ in range(4):
            near = torch.ones(nbytes, dtype=torch.uint8, device="cuda")
            copier.copy(back, near, after=(copier.mark(),))
            del near
            other = torch.full((nbytes,), 2, dtype=torch.uint8, device="cuda")
            torch.cuda.synchronize()
            assert bool((back == 1).all())
            del other
