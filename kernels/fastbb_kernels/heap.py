"""The memory of a process that computes on a CPU: its heap, and files that it has mapped."""

import ctypes
import gc
import os
import sys
from contextlib import suppress
from pathlib import Path

import torch

# glibc hands memory from here on back to the kernel at once, and gets it page by page anew
# (DEFAULT_MMAP_THRESHOLD_MAX in malloc.c, 32 MiB)
KEPT_BYTES = 28 * 2**20
_MAPPINGS = Path("/proc/self/maps")
_MADV_DONTNEED = 4  # Linux; of pages that nothing can write, it only means that they are read again


def keep_freed_memory() -> None:
    """Has glibc keep memory that a forward pass frees, for the next one.

    glibc hands back what is free at the end of the heap as soon as that is twice the largest block
    that was freed so far. Where all blocks are small, every call gets its memory page by page anew,
    which took a third of the time of some models. Here glibc learns from a block that is never
    touched, in some 10 us; nothing changes with other allocators, or where its environment
    variables say otherwise.

    Source: `__libc_free` in glibc's malloc.c, and M_MMAP_THRESHOLD in mallopt(3).
    """
    torch.empty(KEPT_BYTES, dtype=torch.uint8, device="cpu")


def release_freed_memory() -> None:
    """Collects garbage, and has glibc give free memory back to the kernel; takes some 0.1 s.

    Called after work that a process does once, so that the peak of the next step does not add to
    what that work took.

    Source: malloc_trim(3).
    """
    gc.collect()  # modules and graphs of torch hold each other
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def release_mapped_files(folder: Path) -> None:
    """Has Linux drop the pages of the files in a folder that are mapped to be read only.

    A page that is read later comes from the file again.

    Source: madvise(2), proc_pid_maps(5).
    """
    prefix = os.path.realpath(folder).encode() + b"/"
    with suppress(OSError, AttributeError):  # another system
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        for line in _MAPPINGS.read_bytes().splitlines():
            addresses, permissions, *_, path = line.split(maxsplit=5)
            if path.startswith(prefix) and b"w" not in permissions:
                first, end = (int(address, 16) for address in addresses.split(b"-"))
                madvise(first, end - first, _MADV_DONTNEED)
