"""Small kernels, and their binaries for a GPU that need not be there."""
# Triton types constants as `tl.constexpr`, and callers pass numbers
# pyright: reportArgumentType=false

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from triton.compiler import CompiledKernel

from fastbb_kernels.pretend_gpu import fake_gpu

Arch = int | str


@triton.jit
def gemm_fwd_kernel(
    x_ptr,  # [BLOCK_M, n_features]
    weight_ptr,  # [BLOCK_N, n_features]
    y_ptr,  # [BLOCK_M, BLOCK_N]
    n_features,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows, cols, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, n_features, BLOCK_K):
        x = tl.load(x_ptr + rows[:, None] * n_features + start + k[None, :])
        weight = tl.load(weight_ptr + cols[None, :] * n_features + start + k[:, None])
        acc = tl.dot(x, weight, acc, input_precision=PRECISION)
    tl.store(y_ptr + rows[:, None] * BLOCK_N + cols[None, :], acc.to(y_ptr.dtype.element_ty))


@triton.jit
def copy_fwd_kernel(x_ptr, y_ptr, stride_x, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets * stride_x))


def compiled(arch: Arch, launch: Callable[[], Any]) -> CompiledKernel:
    with fake_gpu(arch) as gpu:
        launch()
    (kernel,) = gpu.kernels
    return kernel


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
