"""Memory limits of cgroups v1 and v2, the tiers' budgets, and the measurement file."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from costmodel.errors import InputError, TierwiseError
from profiler import capacity as capacity_module
from profiler import offload
from profiler.effort import EFFORTS
from runtime import budgets as budgets_module
from runtime.environment import file_system
from runtime.host_memory import HostMemory, host_memory

GiB = 2**30
CPU = torch.device("cpu")


def machine(
    root: Path, *, files: dict[str, str], own: str, mounts: str, total_gib: int = 64, available_gib: int = 48
) -> Path:
    """A false root directory with /proc and /sys."""
    meminfo = f"MemTotal: {total_gib * 2**20} kB\nMemFree: 1 kB\nMemAvailable: {available_gib * 2**20} kB\n"
    content = {"proc/meminfo": meminfo, "proc/self/cgroup": own, "proc/self/mountinfo": mounts, **files}
    for name, text in content.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


V2 = "30 1 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n"
V1 = "31 1 0:27 / /sys/fs/cgroup/memory rw,nosuid - cgroup cgroup rw,memory\n"


def test_without_limits_the_kernel_decides(tmp_path: Path) -> None:
    found = host_memory(machine(tmp_path, files={}, own="0::/\n", mounts=V2))
    assert found == HostMemory(total_bytes=64 * GiB, available_bytes=48 * GiB, limited_by="physical memory")


def test_v2_limit_less_what_is_used_and_not_reclaimable(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/user/job"
    files = {
        f"{group}/memory.max": f"{16 * GiB}\n",
        f"{group}/memory.current": f"{6 * GiB}\n",
        f"{group}/memory.stat": f"anon 1\ninactive_file {2 * GiB}\n",
        "sys/fs/cgroup/user/memory.max": "max\n",
    }
    found = host_memory(machine(tmp_path, files=files, own="0::/user/job\n", mounts=V2))
    assert found == HostMemory(
        total_bytes=16 * GiB, available_bytes=12 * GiB, limited_by="memory limit of cgroup /user/job"
    )


def test_v2_limit_of_a_parent_and_the_soft_limit_count(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/user/memory.max": f"{32 * GiB}\n",
        "sys/fs/cgroup/user/memory.high": f"{8 * GiB}\n",
        "sys/fs/cgroup/user/memory.current": f"{3 * GiB}\n",
        "sys/fs/cgroup/user/job/memory.max": f"{16 * GiB}\n",
        "sys/fs/cgroup/user/job/memory.current": "0\n",
    }
    found = host_memory(machine(tmp_path, files=files, own="0::/user/job\n", mounts=V2))
    assert (found.available_bytes, found.limited_by) == (5 * GiB, "memory limit of cgroup /user")


def test_v1_limit(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/memory/job"
    files = {
        f"{group}/memory.limit_in_bytes": f"{10 * GiB}\n",
        f"{group}/memory.usage_in_bytes": f"{4 * GiB}\n",
        f"{group}/memory.stat": f"inactive_file 5\ntotal_inactive_file {GiB}\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    }
    own = "5:cpu:/x\n4:memory:/job\n0::/\n"
    found = host_memory(machine(tmp_path, files=files, own=own, mounts=V2 + V1))
    assert (found.available_bytes, found.limited_by) == (7 * GiB, "memory limit of cgroup /job")


def test_limit_of_a_container_that_sees_its_group_as_the_root(tmp_path: Path) -> None:
    mounts = "31 1 0:27 /docker/abc /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    files = {
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GiB}\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GiB}\n",
    }
    found = host_memory(machine(tmp_path, files=files, own="4:memory:/docker/abc\n", mounts=mounts))
    assert (found.available_bytes, found.limited_by) == (GiB, "memory limit of the cgroup at /sys/fs/cgroup/memory")


def test_more_used_than_allowed_leaves_nothing(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/memory.max": f"{GiB}\n", "sys/fs/cgroup/memory.current": f"{2 * GiB}\n"}
    assert host_memory(machine(tmp_path, files=files, own="0::/\n", mounts=V2)).available_bytes == 0


def test_system_without_proc_says_so(tmp_path: Path) -> None:
    with pytest.raises(TierwiseError, match="meminfo: cannot be read, so the host memory is unknown"):
        host_memory(tmp_path)


# ---------------------------------------------------------------- budgets


def capacity(monkeypatch: pytest.MonkeyPatch, available: int, **budgets: float) -> capacity_module.Capacity:
    host = HostMemory(total_bytes=64 * GiB, available_bytes=available, limited_by="physical memory")
    monkeypatch.setattr(budgets_module, "host_memory", lambda: host)
    given = {"gpu_memory_bytes": None, "cpu_memory_bytes": None, **budgets}
    return capacity_module.capacity(CPU, disk_free_bytes=100 * GiB, **given)


def test_without_a_gpu_the_first_tier_is_a_share_of_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    found = capacity(monkeypatch, 10 * GiB)
    assert (found.gpu_bytes, found.cpu_bytes, found.disk_bytes) == (8 * GiB, 0, 100 * GiB)
    assert found.gpu_origin == "80% of the 10 GiB that were available"


def test_a_second_tier_is_taken_from_the_same_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert capacity(monkeypatch, 10 * GiB, cpu_memory_bytes=3 * GiB).gpu_bytes == 5 * GiB
    found = capacity(monkeypatch, 10 * GiB, gpu_memory_bytes=4 * GiB, cpu_memory_bytes=6 * GiB)
    assert (found.gpu_bytes, found.cpu_bytes) == (4 * GiB, 6 * GiB)


@pytest.mark.parametrize(
    ("available", "budgets", "message"),
    [
        (GiB // 2, {}, "only 512 MiB of host memory can be had .physical memory.: profiling needs 1 GiB"),
        (4 * GiB, {"gpu_memory_bytes": 5 * GiB}, "--gpu-memory is 5 GiB: only 4 GiB are available"),
        (10 * GiB, {"gpu_memory_bytes": 6 * GiB, "cpu_memory_bytes": 6 * GiB}, "is 12 GiB: only 10 GiB are available"),
        (10 * GiB, {"cpu_memory_bytes": 9 * GiB}, "--cpu-memory is 9 GiB: nothing is left for the first tier"),
    ],
)
def test_budgets_that_cannot_be(
    monkeypatch: pytest.MonkeyPatch, available: int, budgets: dict[str, float], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        capacity(monkeypatch, available, **budgets)


@pytest.mark.parametrize(("available", "hidden"), [(64 * GiB, 4096), (3 * GiB, 2048), (GiB, 1024)])
def test_little_memory_means_narrower_layers(available: int, hidden: int) -> None:
    assert EFFORTS["default"].within(available).hidden_size == hidden


# ---------------------------------------------------------------- the measurement file


def test_reads_are_timed_on_what_the_runtime_reads(tmp_path: Path) -> None:
    for folder, nbytes in (("short", 2**20), ("long", 2**26 + 2**20), (".being-made.partial", 2**27)):
        image = tmp_path / "models" / folder / "image.bin"
        image.parent.mkdir(parents=True)
        image.write_bytes(b"")
        os.truncate(image, nbytes)
    with offload.measurement_file(tmp_path, 2**26) as opened:
        assert opened.origin == "long/image.bin"
        assert opened.read_bytes == 2**26 + 2**20
    shutil.rmtree(tmp_path / "models" / "long")
    with offload.measurement_file(tmp_path, 2**26) as opened:
        assert opened.origin == "the measurement file"
        assert (opened.read_from, opened.read_bytes) == (opened.file, opened.nbytes)


def test_measurement_file_is_full_of_data_and_has_no_name(tmp_path: Path) -> None:
    with offload.measurement_file(tmp_path, 64 * 2**20) as opened:
        assert opened.nbytes == 64 * 2**20
        assert list(tmp_path.iterdir()) == []
        content = os.pread(opened.file._fd, 4096, 2**26 - 4096)
        assert len(set(content)) > 100
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("free_mib", "expected_mib"), [(100_000, 1024), (2048, 512), (256, 64), (300, 64)])
def test_file_takes_at_most_a_quarter_of_what_is_free(tmp_path: Path, free_mib: int, expected_mib: int) -> None:
    assert offload.file_bytes(free_mib * 2**20, 2**30, tmp_path) == expected_mib * 2**20


def test_full_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="it has 100 MiB free, and the measurement needs 256 MiB"):
        offload.file_bytes(100 * 2**20, 2**30, tmp_path)


def test_quota_that_statvfs_does_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, offset: int, nbytes: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", fail)
    with (
        pytest.raises(InputError, match=r"the measurement file cannot be written: .*No space left on device"),
        offload.measurement_file(tmp_path, 2**26),
    ):
        raise AssertionError("no file can be had")
    assert list(tmp_path.iterdir()) == []


def test_read_only_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**given: object) -> tuple[int, str]:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(offload.tempfile, "mkstemp", fail)
    with (
        pytest.raises(InputError, match=r"--offload-dir is .*: no file can be written there: Read-only file system"),
        offload.measurement_file(tmp_path, 2**26),
    ):
        raise AssertionError("no file can be had")


def test_offload_directory_must_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"--offload-dir is .*/file: that is a file, a folder is expected"):
        offload.offload_directory(tmp_path / "file")
    with pytest.raises(InputError, match=r"--offload-dir is .*/missing: there is no such folder"):
        offload.offload_directory(tmp_path / "missing")
    assert offload.offload_directory(tmp_path) == tmp_path


MOUNTS = """\
22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
23 22 0:5 / /mnt rw - tmpfs tmpfs rw,size=1g
24 23 259:1 / /mnt/my\\040disk rw,noatime shared:1 - xfs /dev/nvme0n1p1 rw
"""


@pytest.mark.parametrize(
    ("directory", "kind", "device", "in_memory"),
    [
        ("/home/me", "ext4", "/dev/vda", False),
        ("/mnt", "tmpfs", "tmpfs", True),
        ("/mnt/my disk/a", "xfs", "/dev/nvme0n1p1", False),
        ("/mntx", "ext4", "/dev/vda", False),
    ],
)
def test_file_system_of_a_directory(tmp_path: Path, directory: str, kind: str, device: str, in_memory: bool) -> None:
    (tmp_path / "mountinfo").write_text(MOUNTS, encoding="utf-8")
    found = file_system(Path(directory), tmp_path / "mountinfo")
    assert (found.kind, found.device, found.in_memory) == (kind, device, in_memory)


_HOLD = """
import sys, time
from pathlib import Path
from profiler.offload import measurement_file
with measurement_file(Path(sys.argv[1]), 2**26):
    print("open", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL])
def test_no_file_is_left_by_a_process_that_is_killed(tmp_path: Path, number: signal.Signals) -> None:
    root = Path(__file__).resolve().parent.parent
    with subprocess.Popen([sys.executable, "-c", _HOLD, str(tmp_path)], cwd=root, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"open\n"
        process.send_signal(number)
        process.wait(30)
    assert list(tmp_path.iterdir()) == []
