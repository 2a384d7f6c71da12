"""Accuracy rule of the tests: the largest difference allowed from upstream's results."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastbb_kernels.accuracy import FP32_REL, accuracy_problem, max_error, max_magnitude


def assert_equals_upstream(
    got: Tensor | Sequence[Tensor], want: Tensor | Sequence[Tensor], rel: float = FP32_REL
) -> None:
    """Compares each of our tensors with upstream's.

    Args:
        got: ours, one tensor or several in order.
        want: upstream's, same shapes and dtypes.
        rel: largest difference allowed, relative to the largest magnitude in upstream's tensor.

    Raises:
        AssertionError: the message names the tensor by its position.
    """
    if isinstance(got, Tensor) and isinstance(want, Tensor):
        got, want = [got], [want]
    assert len(got) == len(want), f"{len(got)} tensors, upstream has {len(want)}"
    for i, (ours, theirs) in enumerate(zip(got, want)):
        where = f"tensor {i} of {len(want)}"
        assert ours.shape == theirs.shape, (
            f"{where}: shape {tuple(ours.shape)}, upstream {tuple(theirs.shape)}"
        )
        assert ours.dtype == theirs.dtype, f"{where}: {ours.dtype}, upstream {theirs.dtype}"
        error = max_error(ours, theirs)
        # a NaN fails this comparison
        assert error <= rel * max_magnitude(theirs), (
            f"{where}, shape {tuple(theirs.shape)}: differs by {error:.3g}, "
            f"{error / max(max_magnitude(theirs), 1e-30):.3g} relative; allowed {rel:g}"
        )


def assert_equal_gradients(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Compares float64 gradients, by parameter name, with upstream's.

    A gradient that is zero but for rounding (of the bias of a key, which softmax ignores) is
    compared relative to the largest of all.
    """
    assert got.keys() == want.keys(), sorted(got.keys() ^ want.keys())
    largest = max(max_magnitude(theirs) for theirs in want.values())
    for name, theirs in want.items():
        assert theirs.dtype == torch.float64, f"{name}: compare gradients in float64"
        scale = max(max_magnitude(theirs), 1e-6 * largest)
        error = max_error(got[name], theirs)
        assert error <= FP32_REL * scale, f"{name}: differs by {error / scale:.3g} relative"


def assert_as_accurate_as_eager(name: str, got: Tensor, eager: Tensor, exact: Tensor) -> None:
    """Compares a result with the error of eager upstream in that dtype, see `accuracy_problem`.

    Args:
        name: what is compared, for the message.
        got: ours.
        eager: upstream's eager result in the same dtype.
        exact: upstream's result in float64.
    """
    problem = accuracy_problem(got, eager, exact)
    assert problem is None, f"{name}: {problem}"
