"""Properties of a CPU that decide how it runs a backbone: instructions, cost of large tensors."""

import time
from collections.abc import Callable
from functools import cache

import torch
from torch.nn import functional as F

from fastbb_kernels.heap import KEPT_BYTES
from fastbb_kernels.machine import Machine, cpu_flags
from fastbb_kernels.result_cache import ResultCache

_NATIVE = {
    torch.bfloat16: {"avx512_bf16", "amx_bf16", "bf16"},
    torch.float16: {"avx512_fp16", "amx_fp16", "asimdhp"},
}


def has_arithmetic(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies in a dtype; otherwise PyTorch converts in every operation."""
    return dtype not in _NATIVE or bool(_NATIVE[dtype] & cpu_flags())


@cache
def multiplies_faster_as_convolution() -> bool:
    """Whether fp32 products are faster in oneDNN's convolutions than in the BLAS of `F.linear`.

    PyTorch multiplies fp32 matrices by MKL where it is built with it, whose kernels for other
    makers' CPUs reach less of their peak. Measured once on a machine, in some 50 ms.
    """
    cache = ResultCache(Machine.of(torch.device("cpu")))
    known = cache.get("cpu", "multiplies_faster_as_convolution")
    if not isinstance(known, bool):
        known = _measure_convolution()
        cache.put("cpu", "multiplies_faster_as_convolution", known)
    return known


def _measure_convolution() -> bool:
    x, weight = (torch.linspace(-1, 1, n * 384, device="cpu").view(n, 384) for n in (3136, 192))
    rows = x.view(1, 1, *x.shape).permute(0, 3, 1, 2)
    filters = weight[:, :, None, None].contiguous(memory_format=torch.channels_last)

    def seconds(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    with torch.inference_mode():
        calls = (lambda: F.linear(x, weight)), (lambda: torch.conv2d(rows, filters))
        times = [[seconds(call) for call in calls] for _ in range(9)]
    # other load only ever adds time
    linear, convolution = (min(taken) for taken in zip(*times))
    return convolution < 0.97 * linear


def even_part(batch: int, n_bytes: float) -> int:
    """Number of images of a batch to run at once, so that no tensor outgrows `KEPT_BYTES`.

    Args:
        batch: images.
        n_bytes: of the largest tensor of one of them.

    Returns:
        At least 1, at most `batch`, and such that all parts of the batch are about equal.
    """
    most = max(1, min(batch, int(KEPT_BYTES // max(n_bytes, 1))))
    n_parts = -(-batch // most)
    return -(-batch // n_parts)
