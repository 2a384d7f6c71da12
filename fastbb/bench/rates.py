"""Rates of a machine that bound every way: of matrix products, and of reading memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from fastbb_kernels.fp32_precision import fp32_products
from fastbb_kernels.onednn import pack_linear, packed_linear, packs

from ..engine.settings import torch_dtype
from .noise import is_valid, speed
from .results import Cell, Way
from .timing import timed_calls

_SECONDS = 0.3  # for each measurement
_SIDE = {"cpu": 1024, "cuda": 8192}  # of the matrices
_READ_BYTES = {"cpu": 2**28, "cuda": 2**31}  # more than any cache holds


@dataclass(frozen=True)
class Rates:
    """What a machine does at most, measured.

    Attributes:
        macs_per_s: multiply-adds of a large matrix product, the fastest of PyTorch's.
        bytes_per_s: of memory that is read, as weights are.
    """

    macs_per_s: float
    bytes_per_s: float


@torch.inference_mode()
def measure_rates(device: torch.device, precision: str) -> Rates:
    """Measures the rates of a precision in about a second, with torch's number of threads.

    Args:
        device: a CPU or a GPU.
        precision: "fp32", "tf32", "bf16" or "fp16".
    """
    dtype, side = torch_dtype(precision), _SIDE[device.type]
    rows = torch.randn(4 * side, side, device=device).to(dtype)
    weight = torch.randn(side, side, device=device).to(dtype)
    products: list[Callable[[], object]] = [lambda: F.linear(rows, weight)]
    if device.type == "cpu" and packs(dtype):
        packed = pack_linear(weight)
        products.append(lambda: packed_linear(rows, packed, None))
    much = torch.ones(_READ_BYTES[device.type] // 4, device=device)

    def seconds(call: Callable[[], object]) -> float:
        return min(timed_calls(call, _SECONDS, device))  # other load only ever adds time

    with fp32_products("tf32" if precision == "tf32" else "ieee"):
        product_s = min(map(seconds, products))
    return Rates(4 * side**3 / product_s, _READ_BYTES[device.type] / seconds(much.sum))


def bound_shares(cell: Cell, way: Way) -> dict[str, float] | None:
    """Shares of what the machine does at most, by what bounds: "products" and "weights".

    Products count as upstream computes them, and weights as read once for each call.
    """
    measured = speed(way, cell.batch) if is_valid(way) else None
    if measured is None or not cell.rates or cell.macs is None or cell.params is None:
        return None
    weight_bytes = cell.params * torch_dtype(cell.precision).itemsize
    calls_per_s = measured.images_per_s / cell.batch
    return {
        "products": cell.macs * measured.images_per_s / cell.rates["macs_per_s"],
        "weights": weight_bytes * calls_per_s / cell.rates["bytes_per_s"],
    }
