"""Kernels of ops with one line made wrong: the tests and the check on a device catch each.

As test_canaries.py, but the bugs are put into the kernels themselves: what a model would notice
late, because its features stay plausible.
"""

from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from broken_kernels import CPU, launching, self_check
from tolerance import assert_as_accurate_as_eager
from torch import Tensor

import fastbb_kernels
from fastbb_kernels import KernelWarning
from fastbb_kernels.cases import small_cases
from fastbb_kernels.op import find_op, in_float64
from fastbb_kernels.self_check import use
from fastbb_kernels.testing import interpret

KERNELS = Path(fastbb_kernels.__file__).parent / "triton_kernels"


class Mutation(NamedTuple):
    """A line of the kernel of an op, and what takes its place; "": nothing is wrong.

    The line is in the kernel's module or, if that has one, in a `helper`, a module that it imports.
    """

    op: str
    right: str = ""
    wrong: str = ""
    helper: str = ""


MUTATIONS = {
    "prefix_tokens_are_rotated": Mutation(
        "rope_qkv",
        "% n_tokens - n_prefix",
        "% n_tokens - n_prefix\n    positions = tl.maximum(positions, 0)",
    ),
    "v_is_rotated": Mutation("rope_qkv", "(pairs < n_rotated)", "(pairs < n_pairs)"),
    "rotated_backwards": Mutation("rope_qkv", "cos + first * sin", "cos - first * sin"),
    "scaled_after_the_residual": Mutation(
        "linear_residual", "acc.shape), residual)", "acc.shape), scale * residual)"
    ),
    "bias_is_not_scaled": Mutation("linear_residual", "bias *= scale", "bias *= 1.0"),
    "statistics_of_all_steps_but_the_last": Mutation(
        "folded_norm_linear",
        "mean, squares, x.to(tl.float32), start",
        "mean, squares, tl.where(start + BLOCK_K < features, x.to(tl.float32), 0.0), start",
    ),
    "statistics_of_the_row_below": Mutation(
        "folded_norm_linear",
        "    mean *= rstd\n",
        "    rstd = tl.gather(rstd, (rows + 1) % BLOCK_M, 0)\n    mean *= rstd\n",
    ),
    "folded_bias_is_scaled": Mutation(
        "folded_norm_linear", "(bias[None, :] -", "(bias[None, :] * rstd[:, None] -"
    ),
    "gate_and_up_swapped": Mutation(
        "layer_norm_swiglu",
        'activate(gate, "silu", y_ptr.dtype.element_ty) * up',
        'activate(up, "silu", y_ptr.dtype.element_ty) * gate',
    ),
    "gate_is_not_activated": Mutation(
        "layer_norm_swiglu", 'activate(gate, "silu", y_ptr.dtype.element_ty)', "gate"
    ),
    "response_norms_of_pixels": Mutation(
        "grn_linear_residual",
        "total += x * x",
        "total += tl.zeros_like(x) + tl.sum(x * x, axis=1)[:, None]",
    ),
    "residual_is_scaled": Mutation(
        "mlp_block",
        "y += tl.load(residual_ptr + offsets, mask=inside[:, None], other=0.0).to(tl.float32)",
        "y += tl.load(residual_ptr + offsets, mask=inside[:, None], other=0.0) * "
        "tl.load(scale_ptr + channels).to(tl.float32)[None, :]",
        helper="mlp_of_rows",
    ),
    "residual_is_the_convolved_map": Mutation(
        "mlp_block", "x_ptr if residual_ptr is None else residual_ptr", "x_ptr"
    ),
    "no_rows_above_the_center": Mutation(
        "depthwise_conv_bn_act", "(rows + row >= 0)", "(row >= 0)", helper="depthwise_strips"
    ),
    "left_padding_is_the_row_above": Mutation(
        "convnext_block",
        "(cols + col >= 0)",
        "(rows + cols + col >= 0)",  # a load before the first row would be out of bounds
        helper="depthwise_strips",
    ),
    "residual_of_the_pixel_below": Mutation(
        "convnext_block",
        "        x_ptr,\n        y_ptr,",
        "        x_ptr + (rows + pixels % ROWS + 1 < height)[:, None] * width * CHANNELS,\n"
        "        y_ptr,",
    ),
    "pixels_of_strips_in_another_order": Mutation(
        "convnext_block",
        "tl.join(first.to(dtype), third.to(dtype))",
        "tl.join(third.to(dtype), first.to(dtype))",
    ),
}
UNCHANGED = {mutation.op: Mutation(mutation.op) for mutation in MUTATIONS.values()}


def mutant(mutation: Mutation, folder: Path) -> Callable[..., Tensor]:
    """Returns the launcher of a copy of the kernel's module."""
    source = (KERNELS / f"{mutation.op}.py").read_text()
    if name := mutation.helper:
        line = f"from .{name} import "
        assert source.count(line) == 1, f"{mutation.op} does not import {name} any more"
        imported = next(text for text in source.splitlines() if text.startswith(line))
        source = source.replace(imported, (KERNELS / f"{name}.py").read_text())
    if mutation.right:
        assert source.count(mutation.right) == 1, f"{mutation.op} has no such line any more"
        source = source.replace(mutation.right, mutation.wrong)
    path = folder / f"{mutation.op}.py"
    path.write_text(source)
    # a sibling of the original, by whose relative imports it finds the same helpers
    spec = spec_from_file_location(f"fastbb_kernels.triton_kernels.mutated_{mutation.op}", path)
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    if "y" not in signature(module.launch).parameters:
        return module.launch

    def launch(*args: Any) -> Tensor:
        """Launchers of maps fill a result whose memory format the op chooses."""
        return module.launch(*args, find_op(mutation.op)._call_type(*args).empty_result())

    return launch


def arguments(op: str, dtype: torch.dtype) -> dict[str, Any]:
    """The small case of an op with the most arguments: of a linear layer, that with a scale."""
    cases = [case.arguments(CPU, dtype, seed=0) for case in small_cases() if case.op == op]
    return max(cases, key=lambda args: sum(value is not None for value in args.values()))


def assert_right(mutation: Mutation, folder: Path, args: dict[str, Any] | None = None) -> None:
    """The check of the ladder: the kernel against eager PyTorch and float64."""
    op, args = find_op(mutation.op), args or arguments(mutation.op, torch.bfloat16)
    with torch.no_grad(), interpret():
        y = mutant(mutation, folder)(*op.bind(**args))
    assert_as_accurate_as_eager("y", y, op.eager(**args), op.eager(**in_float64(args)))


@pytest.mark.parametrize("bug", MUTATIONS)
def test_tests_catch_the_bug(bug: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"y: error \S+, allowed"):
        assert_right(MUTATIONS[bug], tmp_path)


@pytest.mark.parametrize("bug", MUTATIONS)
def test_check_of_the_first_launch_catches_the_bug(bug: str, tmp_path: Path) -> None:
    op = MUTATIONS[bug].op
    args = arguments(op, torch.bfloat16)
    launch = mutant(MUTATIONS[bug], tmp_path)
    with interpret(), launching(**{op: launch}), use(self_check(tmp_path)):
        with pytest.warns(KernelWarning, match=rf"{op} is off .*: error \S+, allowed"):
            y = find_op(op).call(**args)
        assert torch.equal(y, find_op(op).eager(**args))


@pytest.mark.parametrize("op", UNCHANGED)
def test_unchanged_kernel_passes_both(op: str, tmp_path: Path) -> None:
    assert_right(UNCHANGED[op], tmp_path)
    check = self_check(tmp_path)
    launch = mutant(UNCHANGED[op], tmp_path)
    with interpret(), launching(**{op: launch}), use(check):
        find_op(op).call(**arguments(op, torch.bfloat16))
    assert check.results(CPU) == {(op, torch.bfloat16): None}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_tests_catch_a_gelu_outside_the_range_of_its_polynomial(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    args = arguments("layer_norm_linear", dtype) | {"activation": "gelu"}
    args["norm_weight"] = 16 * args["norm_weight"]  # values of both signs beyond 11
    assert_right(Mutation("layer_norm_linear"), tmp_path, args)
    bug = Mutation("layer_norm_linear", "tl.minimum(x * x, _GELU_LIMIT)", "x * x", "activation")
    with pytest.raises(AssertionError, match=r"y: error \S+, allowed"):
        assert_right(bug, tmp_path, args)


@pytest.mark.parametrize(
    "bug",
    [
        Mutation("folded_norm_linear", "mean[:, None] * sums[None, :]", "0.0 * sums[None, :]"),
        Mutation("folded_norm_linear", "    mean *= rstd\n", ""),
    ],
    ids=["not-subtracted", "not-normalized"],
)
def test_tests_catch_a_large_mean_that_is_left(bug: Mutation, tmp_path: Path) -> None:
    args = arguments("folded_norm_linear", torch.bfloat16)
    args["x"] = args["x"] + 64
    assert_right(Mutation(bug.op), tmp_path, args)
    with pytest.raises(AssertionError, match=r"y: error \S+, allowed"):
        assert_right(bug, tmp_path, args)
    # the check of a launch takes other sums
    with (
        interpret(),
        launching(**{bug.op: mutant(bug, tmp_path)}),
        use(self_check(tmp_path)),
        pytest.warns(KernelWarning, match=rf"{bug.op} is off .*: error \S+, allowed"),
    ):
        find_op(bug.op).call(**args)
