"""Convolutions with a known bug: the check for its kind catches each, and names it.

As test_canaries.py, for borders, strides, batch norms and residuals; the references are torch's
own modules. The same kernel without the bug passes every check.
"""
# pyright: reportArgumentType=false, reportCallIssue=false
# a launch passes plain values for constexpr parameters

from collections.abc import Callable

import pytest
import torch
from buggy_conv_kernels import _conv_kernel, _max_pool_kernel, _stem_kernel
from canary import Canary
from tolerance import assert_as_accurate_as_eager
from torch import nn

from fastbb_kernels.testing import trace


def check_conv(bug: str, stride: int = 1) -> None:
    height, width, in_channels, channels, eps = 5, 7, 16, 16, 1e-3
    conv = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
    norm = nn.BatchNorm2d(channels, eps).eval()
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(tensor)
    # variances up to eps, as of channels that hardly vary
    nn.init.uniform_(norm.running_var, 0.0, eps)
    block = nn.Sequential(conv, norm).requires_grad_(False)
    x = torch.randn(1, in_channels, height, width)
    residual = torch.randn_like(block(x))
    eager = (block(x) + residual).relu()
    y = torch.full_like(eager[0].permute(1, 2, 0).contiguous(), float("nan"))
    with trace() as t:
        _conv_kernel[(-(-y.shape[0] * y.shape[1] // 16),)](
            x[0].permute(1, 2, 0).contiguous(),
            conv.weight.permute(2, 3, 1, 0).contiguous(),
            *(norm.weight, norm.bias, norm.running_mean, norm.running_var),
            residual[0].permute(1, 2, 0).contiguous(),
            *(y, height, width, eps),
            STRIDE=stride,
            BUG=bug,
            IN_CHANNELS=in_channels,
            CHANNELS=channels,
            BLOCK=16,
        )
    t.assert_written_once("y_ptr")
    exact = (block.double()(x.double()) + residual.double()).relu()
    assert_as_accurate_as_eager("y_ptr", y.permute(2, 0, 1)[None], eager, exact)


def check_strided_conv(bug: str) -> None:
    check_conv(bug, stride=2)


def check_stem(bug: str) -> None:
    height, width, channels = 5, 6, 8
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    mean, std = torch.tensor([124.0, 116.0, 104.0]), torch.tensor([58.0, 57.0, 57.0])
    conv = nn.Conv2d(3, channels, 3, padding=1, bias=False).requires_grad_(False)
    y = torch.full((height, width, channels), float("nan"))
    with trace() as t:
        _stem_kernel[(1,)](
            *(image, mean, std, conv.weight.permute(1, 2, 3, 0).contiguous(), y, height, width),
            BUG=bug,
            CHANNELS=channels,
            BLOCK=32,
        )
    t.assert_written_once("y_ptr")
    normalized = (image - mean[:, None, None]) / std[:, None, None]
    exact_input = (image.double() - mean[:, None, None]) / std[:, None, None]
    eager, exact = conv(normalized), conv.double()(exact_input)
    assert_as_accurate_as_eager("y_ptr", y.permute(2, 0, 1), eager, exact)


def check_max_pool(bug: str) -> None:
    # negative, so that a zero of the padding would be the largest; largest where rows begin
    x = -1.0 - torch.rand(7, 9)
    x[:, 0] += 0.9
    y = torch.full((4, 5), float("nan"))
    with trace() as t:
        _max_pool_kernel[(1,)](x, y, *x.shape, BUG=bug, BLOCK=32)
    t.assert_written_once("y_ptr")
    assert torch.equal(y, nn.MaxPool2d(3, 2, 1)(x[None])[0]), "y_ptr differs from torch's maxima"


WRONG_NUMBERS = r"y_ptr: error \S+, allowed"
WRONG_MAXIMA = "differs from torch's maxima"

CANARIES = {
    # raised by the checks of the trace
    "width_rounded_down": Canary(
        check_strided_conv, AssertionError, r"elements of y_ptr, .* never; the first is \(2, 1, 0\)"
    ),
    # wrong numbers in the interpreter, compared with torch's modules
    "pixel_after_the_strided_one": Canary(check_strided_conv, AssertionError, WRONG_NUMBERS),
    "no_left_border": Canary(check_conv, AssertionError, WRONG_NUMBERS),
    "fixed_eps": Canary(check_conv, AssertionError, WRONG_NUMBERS),
    "residual_after_the_activation": Canary(check_conv, AssertionError, WRONG_NUMBERS),
    "padded_before_the_normalization": Canary(check_stem, AssertionError, WRONG_NUMBERS),
    "window_padded_with_zeros": Canary(check_max_pool, AssertionError, WRONG_MAXIMA),
    "window_reaches_the_next_row": Canary(check_max_pool, AssertionError, WRONG_MAXIMA),
}


@pytest.mark.parametrize("bug", CANARIES)
def test_bug_is_caught(bug: str) -> None:
    CANARIES[bug].assert_caught(bug)


@pytest.mark.parametrize(
    "check", dict.fromkeys(canary.check for canary in CANARIES.values()), ids=lambda f: f.__name__
)
def test_without_the_bug_everything_passes(check: Callable[[str], None]) -> None:
    check("")
