"""The accuracy rule: the largest error that a result may have."""

import torch
from torch import Tensor

FP32_REL = 1e-5
# for timm models outside our families, with folded batch norms
FP32_REL_FOLDED = 1e-4


def accuracy_problem(
    got: Tensor, eager: Tensor, exact: Tensor, fp32_rel: float = FP32_REL
) -> str | None:
    """Compares a result's error with eager PyTorch's in the same dtype, see `allowed_error`.

    Args:
        got: the result, of any shape.
        eager: eager PyTorch's result in the same dtype.
        exact: the result in float64.
        fp32_rel: largest error in fp32, relative to the largest exact magnitude.

    Returns:
        a sentence that describes the problem, or None.
    """
    if got.shape != eager.shape or eager.shape != exact.shape:
        return f"shape {tuple(got.shape)}, eager {tuple(eager.shape)}"
    if got.dtype != eager.dtype:
        return f"{got.dtype}, eager {eager.dtype}"
    if exact.dtype != torch.float64:
        return f"the exact result must be in float64, got {exact.dtype}"
    allowed = allowed_error(eager, exact, fp32_rel)
    error = max_error(got, exact)
    # a NaN fails this comparison
    return None if error <= allowed else f"error {error:.3g}, allowed {allowed:.3g}"


def allowed_error(eager: Tensor, exact: Tensor, fp32_rel: float = FP32_REL) -> float:
    """Returns the largest error that a result in the dtype of `eager` may have.

    In fp32: `fp32_rel` of the largest exact magnitude; in float64 as many units in the last place.
    In a lower precision: twice eager's own error, plus half a unit in the last place of the largest
    value (eager may by luck round to the exact value).
    """
    largest = max_magnitude(exact)
    eps = torch.finfo(eager.dtype).eps
    if eager.dtype in (torch.float32, torch.float64):
        return fp32_rel * eps / torch.finfo(torch.float32).eps * largest
    return 2 * max_error(eager, exact) + 0.5 * eps * largest


def max_error(a: Tensor, b: Tensor) -> float:
    """Largest difference of two tensors of one shape; NaN if either has one."""
    difference = (a.detach().double() - b.detach().double()).abs()
    return difference.max().item() if difference.numel() else 0.0


def max_magnitude(a: Tensor) -> float:
    """Largest magnitude in a tensor, 0 for an empty one."""
    return a.detach().double().abs().max().item() if a.numel() else 0.0


def allowed_rel(eager: Tensor, exact: Tensor, rel: float) -> float:
    """Returns the larger of `rel` and twice eager's error, which chaotic models and TF32 raise.

    Args:
        eager: eager PyTorch's result.
        exact: the result in float64.
        rel: largest error in fp32, relative to the largest exact magnitude.
    """
    largest = max_magnitude(exact)
    if eager.dtype != torch.float32 or not largest:
        return rel
    lost = max_error(eager, exact) / largest
    return rel if lost <= rel else 2 * lost
