"""Memory that a forward pass frees stays in the process; pages of mapped files are dropped."""

import mmap
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from fastbb_kernels.heap import release_mapped_files

FORWARDS = """
import resource, torch
from fastbb_kernels.onednn import packs

def forward():
    blocks = [torch.ones(2**18 + 1024 * i) for i in range(8)]  # 1 MiB each

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

torch.set_num_threads(1)
forward()
packs(torch.float32)
for _ in range(2):
    forward()
before = faults()
for _ in range(20):
    forward()
print(faults() - before)
"""


RELEASED = """
import torch
from fastbb_kernels.heap import keep_freed_memory, release_freed_memory

def resident():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmRSS"))
    return int(line.split()[1]) // 1024

keep_freed_memory()
blocks = [torch.ones(2**18) for _ in range(200)]  # 1 MiB each
last = torch.ones(2**18)  # keeps the end of the heap in use
del blocks
before = resident()
release_freed_memory()
print(before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is about glibc")
def test_memory_is_handed_back_on_request() -> None:
    output = subprocess.check_output([sys.executable, "-c", RELEASED])
    assert int(output) > 150


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is about glibc")
def test_memory_of_a_forward_is_not_handed_back() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    for _ in range(3):  # without `packs` most processes have 2,000 faults in each forward
        output = subprocess.check_output([sys.executable, "-c", FORWARDS], env=environment)
        assert int(output) < 20 * 10


def resident_kb(path: Path) -> int:
    """Kilobytes of a mapped file that are in the memory of this process."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        if line.endswith(str(path)):
            return next(int(x.split()[1]) for x in lines if x.startswith("Rss:"))
    raise AssertionError(f"{path} is not mapped")


@pytest.mark.skipif(sys.platform != "linux", reason="it is about Linux")
def test_pages_of_read_only_files_are_dropped_and_read_again(tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    folder.mkdir()
    content = os.urandom(2**20)
    for path in (folder / "own", folder / "written", tmp_path / "other"):
        path.write_bytes(content)
    maps = {}
    for name, access in (("own", mmap.ACCESS_READ), ("written", mmap.ACCESS_COPY)):
        with open(folder / name, "rb") as file:
            maps[name] = mmap.mmap(file.fileno(), 0, access=access)
    with open(tmp_path / "other", "rb") as file:
        maps["other"] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    maps["written"][:4] = b"mine"
    for one in maps.values():
        assert len(one[:]) == 2**20  # reads every page
    before = resident_kb(folder / "own")
    release_mapped_files(folder)
    assert before == 1024 and resident_kb(folder / "own") == 0
    assert resident_kb(tmp_path / "other") == 1024
    assert maps["own"][:] == content
    assert maps["written"][:] == b"mine" + content[4:]
    release_mapped_files(tmp_path / "missing")


def test_the_machine_of_a_cpu_does_not_import_triton() -> None:
    code = (
        "import sys, torch\n"
        "from fastbb_kernels.machine import Machine\n"
        "assert Machine.of(torch.device('cpu')).triton == ''\n"
        "assert 'triton' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
