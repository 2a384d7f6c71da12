"""The one accuracy rule of the tests: how far a result may be from upstream's."""

from collections.abc import Sequence

import torch
from torch import Tensor

FP32_REL = 1e-5


def assert_equals_upstream(
    got: Tensor | Sequence[Tensor], want: Tensor | Sequence[Tensor], rel: float = FP32_REL
) -> None:
    """Holds each of our tensors against upstream's.

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
        error = _max_error(ours, theirs)
        # a NaN fails this comparison
        assert error <= rel * _max_magnitude(theirs), (
            f"{where}, shape {tuple(theirs.shape)}: differs by {error:.3g}, "
            f"{error / max(_max_magnitude(theirs), 1e-30):.3g} relative; allowed {rel:g}"
        )


def assert_equal_gradients(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Holds float64 gradients, by parameter name, against upstream's.

    A gradient that is zero but for rounding (of the bias of a key, which softmax does not see) is
    held against the largest of all.
    """
    assert got.keys() == want.keys(), sorted(got.keys() ^ want.keys())
    largest = max(_max_magnitude(theirs) for theirs in want.values())
    for name, theirs in want.items():
        assert theirs.dtype == torch.float64, f"{name}: compare gradients in float64"
        scale = max(_max_magnitude(theirs), 1e-6 * largest)
        error = _max_error(got[name], theirs)
        assert error <= FP32_REL * scale, f"{name}: differs by {error / scale:.3g} relative"


def assert_as_accurate_as_eager(name: str, got: Tensor, eager: Tensor, exact: Tensor) -> None:
    """Holds a low-precision result to what eager upstream itself loses in that dtype.

    Allowed: twice upstream's own error, plus half a unit in the last place of the largest value
    (upstream may by luck round to the exact value).

    Args:
        name: what is compared, for the message.
        got: ours, in a low precision.
        eager: upstream's eager result in the same dtype.
        exact: upstream's result in float64.
    """
    assert got.shape == eager.shape == exact.shape, f"{name}: {got.shape}, upstream {eager.shape}"
    assert got.dtype == eager.dtype, f"{name}: {got.dtype}, upstream {eager.dtype}"
    assert exact.dtype == torch.float64, f"{name}: the reference must be float64, not {exact.dtype}"
    floor = 0.5 * torch.finfo(got.dtype).eps * _max_magnitude(exact)
    allowed = 2 * _max_error(eager, exact) + floor
    error = _max_error(got, exact)
    assert error <= allowed, f"{name}: error {error:.3g}, eager upstream allows {allowed:.3g}"


def _max_error(a: Tensor, b: Tensor) -> float:
    difference = (a.detach().double() - b.detach().double()).abs()
    # max() propagates NaN, so a NaN in one of the two never passes
    return difference.max().item() if difference.numel() else 0.0


def _max_magnitude(a: Tensor) -> float:
    return a.detach().double().abs().max().item() if a.numel() else 0.0
