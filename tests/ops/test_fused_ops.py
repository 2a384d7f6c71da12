"""Ops around attention and convolution, against the modules of upstream that they replace."""

import pytest
import torch
from tolerance import assert_as_accurate_as_eager, assert_equals_upstream
from torch import nn

import fastbb_kernels
from fastbb_kernels import (
    conv_bn_act,
    conv_op,
    layer_norm_linear,
    layer_norm_nchw,
    linear_residual,
    patch_embed,
    patch_merging,
)
from fastbb_kernels.testing import interpret, record_launches

DTYPES = [torch.float64, torch.float16, torch.bfloat16]


def randomize(module):
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if "running_var" in name:
            nn.init.uniform_(tensor, 0.5, 1.5)
        elif tensor.is_floating_point():
            nn.init.normal_(tensor, std=0.5)
    return module.eval()


def assert_holds(op, module, x, weights_of, dtype):
    """Our op on a module's weights in `dtype` against the module, exact and in that dtype."""
    exact = module.double()(x.double())
    low = module.to(dtype)
    got = op(x.to(dtype), *weights_of(low))
    if dtype is torch.float64:
        assert_equals_upstream(got, exact, rel=1e-12)
    else:
        assert_as_accurate_as_eager("y", got, low(x.to(dtype)), exact)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("shape", [(2, 5, 3, 24), (1, 24), (0, 7, 7, 24)], ids=str)
def test_layer_norm_linear_equals_upstream(shape, activation, dtype):
    act = nn.GELU() if activation else nn.Identity()
    module = randomize(nn.Sequential(nn.LayerNorm(24, eps=1e-3), nn.Linear(24, 40), act))

    def op(x, *weights):
        return layer_norm_linear(x, *weights, eps=1e-3, activation=activation)

    def weights_of(m):
        return m[0].weight, m[0].bias, m[1].weight, m[1].bias

    assert_holds(op, module, torch.randn(shape) * 2 + 1, weights_of, dtype)


@torch.no_grad()
def test_linear_residual_equals_upstream():
    linear, x, residual = nn.Linear(24, 40), torch.randn(2, 3, 24), torch.randn(2, 3, 40)
    y = linear_residual(x, linear.weight, linear.bias, residual)
    assert_equals_upstream(y, residual + linear(x))


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(4, 6), (5, 6), (4, 7), (5, 7), (1, 1)], ids=str)
def test_patch_merging_equals_upstream(size, dtype):
    from timm.models.swin_transformer import PatchMerging

    def weights_of(m):
        return m.norm.weight, m.norm.bias, m.reduction.weight

    x = torch.randn(2, *size, 12)
    assert_holds(patch_merging, randomize(PatchMerging(12)), x, weights_of, dtype)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(8, 12), (9, 15), (4, 4)], ids=str)
def test_patch_embed_equals_upstream(size, dtype):
    from torchvision.ops.misc import Permute

    module = nn.Sequential(nn.Conv2d(3, 16, 4, stride=4), Permute([0, 2, 3, 1]), nn.LayerNorm(16))

    def weights_of(m):
        return m[0].weight, m[0].bias, m[2].weight, m[2].bias

    assert_holds(patch_embed, randomize(module), torch.randn(2, 3, *size), weights_of, dtype)


@torch.no_grad()
def test_layer_norm_nchw_equals_upstream():
    norm, x = randomize(nn.LayerNorm(12, eps=1e-3)), torch.randn(2, 5, 3, 12)
    y = layer_norm_nchw(x, norm.weight, norm.bias, eps=1e-3)
    assert_equals_upstream(y, norm(x).permute(0, 3, 1, 2))


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(
    "conv",
    [
        {"kernel_size": 1},
        {"kernel_size": 1, "stride": 2},
        {"kernel_size": 1, "padding": 1},
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": 3, "padding": 2, "dilation": 2, "groups": 4},
        {"kernel_size": 5, "padding": 2, "groups": 8},
        {"kernel_size": (1, 3), "padding": "same"},
        {"kernel_size": 7, "padding": 3, "stride": 2},
    ],
    ids=lambda conv: "-".join(f"{name}{value}" for name, value in conv.items()),
)
def test_conv_bn_act_equals_upstream(conv, with_residual, dtype):
    class Reference(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 16, **conv)

        def forward(self, x):
            y = self.conv(x)
            return torch.relu(y + residual.to(y.dtype) if with_residual else y)

    module = randomize(Reference())
    x = torch.randn(2, 8, 11, 9)
    residual = torch.randn_like(module.conv(x))
    untouched = residual.clone()

    def op(x, conv):
        return conv_bn_act(
            x,
            conv.weight,
            conv.bias,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
            residual=residual.to(x.dtype) if with_residual else None,
            activation="relu",
        )

    assert_holds(op, module, x, lambda m: (m.conv,), dtype)
    assert torch.equal(residual, untouched)


@pytest.mark.parametrize(
    ("shape", "geometry", "op"),
    [
        ((8, 4, 1, 1), {"stride": (2, 2)}, "conv1x1_bn_act"),
        ((8, 4, 1, 1), {"padding": "same"}, "conv1x1_bn_act"),
        ((8, 4, 1, 1), {"padding": (1, 1)}, None),
        ((8, 2, 1, 1), {"groups": 2}, None),
        ((8, 4, 3, 3), {"padding": (1, 1), "stride": (2, 2)}, "conv3x3_bn_act"),
        ((8, 4, 3, 3), {"padding": (2, 2), "dilation": (2, 2)}, "conv3x3_bn_act"),
        ((8, 4, 3, 3), {"padding": (1, 1), "dilation": (2, 2)}, None),
        ((8, 4, 3, 3), {"padding": (1, 1), "stride": (2, 1)}, None),
        ((8, 4, 3, 3), {}, None),
        ((8, 1, 5, 5), {"padding": (2, 2), "groups": 8}, "depthwise_conv_bn_act"),
        ((8, 1, 5, 5), {"padding": (2, 2), "groups": 4}, None),
        ((8, 1, 9, 9), {"padding": (4, 4), "groups": 8}, None),
        ((8, 1, 3, 3), {"padding": (1, 1)}, "conv3x3_bn_act"),
        ((8, 4, 7, 7), {"padding": (3, 3), "stride": (2, 2)}, None),
    ],
    ids=str,
)
@torch.no_grad()
def test_conv_bn_act_runs_the_op_that_has_a_kernel(shape, geometry, op):
    assert conv_op(shape, **geometry) == op
    weight, bias = torch.randn(shape), torch.randn(shape[0])
    x = torch.randn(2, shape[1] * geometry.get("groups", 1), 9, 7)
    want = torch.relu(torch.nn.functional.conv2d(x, weight, bias, **geometry))
    if op is None:
        with interpret(), pytest.raises(NotImplementedError, match="conv_bn_act: impl='triton'"):
            conv_bn_act(x, weight, bias, **geometry, impl="triton")
        return
    arguments = {**geometry, "activation": "relu", "impl": "triton"}
    with record_launches() as record:
        conv_bn_act(*(tensor.to("meta") for tensor in (x, weight, bias)), **arguments)
    assert [launch.name for launch in record.launches] == [f"_{op}_fwd_kernel"]
    with interpret():
        y = conv_bn_act(x, weight, bias, **arguments)
    assert_equals_upstream(y, want)


def test_gradients_of_conv_bn_act_equal_torch():
    conv = nn.Conv2d(3, 4, 3)
    x, residual = torch.randn(2, 3, 7, 7), torch.randn(2, 4, 5, 5, requires_grad=True)
    leaves = [*conv.parameters(), residual]
    ours = conv_bn_act(x, conv.weight, conv.bias, residual=residual, activation="relu")
    got = torch.autograd.grad(ours.square().sum(), leaves)
    want = torch.autograd.grad(torch.relu(conv(x) + residual).square().sum(), leaves)
    assert_equals_upstream(got, want)


def test_activations_equal_torch():
    x = torch.randn(50)
    modules = {
        "gelu": nn.GELU(),
        "gelu_new": nn.GELU("tanh"),
        "gelu_pytorch_tanh": nn.GELU("tanh"),
        "relu": nn.ReLU(),
        "silu": nn.SiLU(),
        "swish": nn.SiLU(),
        "hardswish": nn.Hardswish(),
    }
    assert {*modules, "quick_gelu"} == fastbb_kernels.ACTIVATIONS.keys()
    for name, module in modules.items():
        assert torch.equal(fastbb_kernels.ACTIVATIONS[name](x), module(x)), name


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        (layer_norm_linear, [(2, 8), (8,), (8,), (4, 8), (4,)]),
        (linear_residual, [(2, 8), (4, 8), (4,), (2, 4)]),
        (patch_merging, [(1, 2, 2, 4), (16,), (16,), (8, 16)]),
        (patch_embed, [(1, 3, 8, 8), (4, 3, 4, 4), (4,), (4,), (4,)]),
        (layer_norm_nchw, [(1, 2, 2, 4), (4,), (4,)]),
        (conv_bn_act, [(1, 3, 8, 8), (4, 3, 2, 2), (4,)]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_ops_compile_and_refuse_triton_with_a_reason(op, arguments):
    tensors = [torch.rand(shape) for shape in arguments]
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    assert_equals_upstream(compiled(*tensors), op(*tensors))
    with pytest.raises(NotImplementedError, match=f"{op.__name__}: impl='triton' cannot run"):
        op(*tensors, impl="triton")


def test_quick_gelu_equals_transformers():
    activations = pytest.importorskip("transformers.activations")
    x = torch.randn(50)
    want = activations.QuickGELUActivation()(x)
    assert torch.equal(fastbb_kernels.ACTIVATIONS["quick_gelu"](x), want)
