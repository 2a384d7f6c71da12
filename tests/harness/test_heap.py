"""Memory that a forward pass frees stays in the process."""

import os
import platform
import subprocess
import sys

import pytest

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
