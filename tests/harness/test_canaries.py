"""Kernels with a known bug: the check for its kind catches each, and names it.

A bug that passes here would pass in a real kernel too. The same kernel without the bug passes
every check.
"""
# pyright: reportArgumentType=false, reportCallIssue=false
# a launch passes plain values for constexpr parameters

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from buggy_kernels import (
    _column_sum_kernel,
    _copy_rows_kernel,
    _linear_kernel,
    _normalize_in_place_kernel,
    _reverse_kernel,
    _scale_kernel,
    _window_attention_kernel,
)
from canary import Canary
from tolerance import assert_as_accurate_as_eager
from torch import Tensor
from torch.nn import functional as F
from triton.runtime.errors import InterpreterError

from fastbb_kernels.testing import OutOfBounds, Race, corners, trace

modeling_swin = pytest.importorskip("transformers.models.swin.modeling_swin")


def check_linear(bug: str, dtype: torch.dtype = torch.bfloat16, depth: int = 40) -> None:
    # positive, so that an accumulator grows until what is added gets lost in it
    x = torch.rand(19, depth + 8).to(dtype)[:, :depth]
    weight, bias = torch.rand(depth, 23).to(dtype), torch.randn(23).to(dtype)
    y = torch.full((19, 23), float("nan"), dtype=dtype)
    with trace() as t:
        _linear_kernel[(2, 1)](
            *(x, weight, bias, y, *y.shape, depth, x.stride(0)),
            PRECISION="ieee",
            BUG=bug,
            BLOCK_M=16,
            BLOCK_N=32,
            BLOCK_K=16,
        )
    t.assert_written_once("y_ptr")
    exact = F.linear(x.double(), weight.T.double(), bias.double())
    assert_as_accurate_as_eager("y_ptr", y, F.linear(x, weight.T, bias), exact)


def check_deep_linear(bug: str) -> None:
    check_linear(bug, depth=1024)


def check_fp32_linear(bug: str) -> None:
    check_linear(bug, torch.float32)


def check_scale(bug: str) -> None:
    x, y = torch.randn(512), torch.empty(512, dtype=torch.bfloat16)
    with trace() as t:
        _scale_kernel[(1,)](x, y, 0.7, BUG=bug, N=512)
    t.assert_written_once("y_ptr")
    assert torch.equal(y, (x * 0.7).bfloat16()), "y_ptr differs from torch's rounding"


def check_column_sum(bug: str) -> None:
    x, y = torch.randn(3, 32), torch.zeros(32)
    with trace():
        _column_sum_kernel[(3,)](x, y, BUG=bug, N=32)
    torch.testing.assert_close(y, x.sum(0))


def check_normalize_in_place(bug: str) -> None:
    x = torch.randn(4, 64)
    want = F.layer_norm(x, (64,))
    with trace() as t:
        _normalize_in_place_kernel[(4,)](x, BUG=bug, N=64)
    t.assert_written_once()
    torch.testing.assert_close(x, want)


def check_reverse(bug: str) -> None:
    x, scratch, y = torch.randn(32), torch.empty(32), torch.empty(32)
    with trace() as t:
        _reverse_kernel[(1,)](x, scratch, y, BUG=bug, N=32)
    t.assert_written_once()
    assert torch.equal(y, x.flip(0))


def check_copy_of_a_huge_map(bug: str) -> None:
    # 5 * 2**30 elements that nobody allocates; an offset of 2**32 comes back in bounds
    x, y = torch.empty(2, 5 * 2**18, 4096, device="meta")
    with trace(programs=corners, data=False) as t:
        _copy_rows_kernel[(5 * 2**18,)](x, y, x.stride(0), BUG=bug, N=4096)
    assert t.launches[0].tensors["y_ptr"].store.unique_bytes == 2 * 4096 * 4


def check_window_attention(bug: str) -> None:
    (n_rows, n_cols), n_heads, head_dim, window, shift = (6, 7), 2, 16, 4, 2
    # whole numbers: scores are exact, and differ by more than the 100 of the mask
    qkv = torch.randint(-4, 5, (n_rows, n_cols, 3, n_heads, head_dim)).float()
    qkv[:, :, 2] = torch.randn(n_rows, n_cols, n_heads, head_dim)
    bias = torch.randint(-4, 5, (3, n_heads, head_dim)).float()
    y = torch.full((n_rows, n_cols, n_heads, head_dim), float("nan"))
    scale = 4.0
    with trace() as t:
        _window_attention_kernel[(2 * 2, n_heads)](
            *(qkv, bias, y, n_rows, n_cols, shift, scale),
            BUG=bug,
            N_HEADS=n_heads,
            HEAD_DIM=head_dim,
            WINDOW=window,
        )
    t.assert_written_once("y_ptr")
    eager = upstream_window_attention(qkv, bias, window, shift, scale)
    exact = upstream_window_attention(qkv.double(), bias.double(), window, shift, scale)
    assert_as_accurate_as_eager("y_ptr", y, eager, exact)


def upstream_window_attention(
    qkv: Tensor, bias: Tensor, window: int, shift: int, scale: float
) -> Tensor:
    """Window attention that pads, rolls, partitions and masks as transformers' SwinLayer does."""
    n_rows, n_cols, _, n_heads, head_dim = qkv.shape
    height, width = -(-n_rows // window) * window, -(-n_cols // window) * window
    padded = bias.expand(height, width, *bias.shape).clone()
    padded[:n_rows, :n_cols] = qkv
    rolled = padded.roll((-shift, -shift), (0, 1)).view(1, height, width, -1)
    windows = modeling_swin.window_partition(rolled, window)
    q, k, v = windows.view(-1, window**2, 3, n_heads, head_dim).permute(2, 0, 3, 1, 4)
    layer = SimpleNamespace(shift_size=shift, window_size=window)
    mask = modeling_swin.SwinLayer.get_attn_mask(layer, height, width, qkv.dtype, qkv.device)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], scale=scale)
    y = y.transpose(1, 2).reshape(-1, window, window, n_heads * head_dim)
    y = modeling_swin.window_reverse(y, window, height, width).roll((shift, shift), (1, 2))
    return y[0, :n_rows, :n_cols].unflatten(-1, (n_heads, head_dim))


WRONG_NUMBERS = r"y_ptr: error \S+, allowed"

CANARIES = {
    # raised by the tracer at the access
    "dropped_mask": Canary(check_linear, OutOfBounds, r"program \(1, 0, 0\): load of x_ptr"),
    "one_row_too_many": Canary(check_linear, OutOfBounds, r"program \(1, 0, 0\): store of y_ptr"),
    "wrong_stride_on_a_view": Canary(check_linear, OutOfBounds, "load of x_ptr outside its view"),
    "bias_read_past_its_end": Canary(check_linear, OutOfBounds, "bias_ptr .* in 1 of 24 active"),
    "int32_overflow_of_an_offset": Canary(
        check_copy_of_a_huge_map, InterpreterError, r"\(1310719, 0, 0\): .*int32 overflow .* mul"
    ),
    "written_twice_in_one_store": Canary(check_scale, Race, r"writes element \(0,\) of y_ptr more"),
    "missing_barrier": Canary(check_reverse, Race, r"loads element \(31,\) of scratch_ptr after"),
    # raised by the tracer after the launch
    "race_between_programs": Canary(
        check_column_sum, Race, r"programs \(0, 0, 0\) and \(2, 0, 0\) both store element \(0,\)"
    ),
    "race_in_place": Canary(
        check_normalize_in_place, Race, r"\(0, 0, 0\) loads element \(1, 0\) of x_ptr, which .*1, 0"
    ),
    # raised by the checks of the trace
    "missing_last_row": Canary(
        check_linear, AssertionError, r"23 elements of y_ptr, .* never; the first is \(18, 0\)"
    ),
    "written_twice": Canary(
        check_linear, AssertionError, r"437 elements of y_ptr, .* more than once; .* \(0, 0\)"
    ),
    # wrong numbers in the interpreter, compared with upstream's
    "missing_other": Canary(check_linear, AssertionError, "y_ptr: error nan"),
    "bf16_accumulator": Canary(check_deep_linear, AssertionError, WRONG_NUMBERS),
    "tf32_where_ieee_was_asked": Canary(check_fp32_linear, AssertionError, WRONG_NUMBERS),
    "truncating_cast": Canary(check_scale, AssertionError, "differs from torch's rounding"),
    "pads_masked_out": Canary(check_window_attention, AssertionError, WRONG_NUMBERS),
    "mask_as_minus_inf": Canary(check_window_attention, AssertionError, WRONG_NUMBERS),
    "mask_region_on_unshifted_coordinates": Canary(
        check_window_attention, AssertionError, WRONG_NUMBERS
    ),
}


@pytest.mark.parametrize("bug", CANARIES)
def test_bug_is_caught(bug: str) -> None:
    CANARIES[bug].assert_caught(bug)


@pytest.mark.parametrize(
    "check", dict.fromkeys(canary.check for canary in CANARIES.values()), ids=lambda f: f.__name__
)
def test_without_the_bug_everything_passes(check: Callable[[str], None]) -> None:
    check("")
