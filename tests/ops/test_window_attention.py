"""window_attention against the attention of transformers, torchvision and timm."""

import pytest
import torch
from tolerance import assert_as_accurate_as_eager, assert_equals_upstream
from torch import nn

from fastbb_kernels import (
    WindowGeometry,
    relative_position_index,
    use_impl,
    window_attention,
    window_attention_weights,
)

C, HEADS = 32, 2
# no padding, padding on one side, on both, smaller than a window, one token
MAPS = [(14, 14), (14, 10), (9, 13), (3, 5), (1, 1)]


def timm_block(window=7, shift=3, **kwargs):
    from timm.models.swin_transformer import SwinTransformerBlock

    block = SwinTransformerBlock(
        C, (56, 56), HEADS, window_size=window, shift_size=shift, dynamic_mask=True, **kwargs
    )
    nn.init.normal_(block.attn.relative_position_bias_table)
    nn.init.normal_(block.attn.qkv.bias)
    return block.eval().double()


def torchvision_attention(window=7, shift=3):
    from torchvision.models.swin_transformer import ShiftedWindowAttention

    attention = ShiftedWindowAttention(C, [window, window], [shift, shift], HEADS)
    nn.init.normal_(attention.relative_position_bias_table)
    nn.init.normal_(attention.qkv.bias)
    return attention.eval().double()


def inputs_of(attention, x, window=7):
    """Inputs of our op for upstream's attention of x [B, H, W, C]."""
    table = attention.relative_position_bias_table
    index = relative_position_index((window, window), table.device)
    bias = table[index].view(window**2, window**2, -1).permute(2, 0, 1)
    return attention.qkv(x), bias, attention.qkv.bias


@torch.no_grad()
@pytest.mark.parametrize("shift", [0, 3])
@pytest.mark.parametrize("size", MAPS, ids=str)
def test_pad_then_roll_equals_torchvision(size, shift):
    attention, x = torchvision_attention(shift=shift), torch.randn(2, *size, C).double()
    # torchvision does not shift along an axis that one window covers: that is the caller's choice
    shifts = (shift if size[0] > 7 else 0, shift if size[1] > 7 else 0)
    y = window_attention(
        *inputs_of(attention, x), num_heads=HEADS, geometry=WindowGeometry((7, 7), shifts)
    )
    assert_equals_upstream(attention.proj(y), attention(x), rel=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("size", MAPS, ids=str)
def test_roll_then_pad_equals_timm(size):
    block, x = timm_block(), torch.randn(2, *size, C).double()
    geometry = WindowGeometry((7, 7), (3, 3), roll_first=True)
    y = window_attention(*inputs_of(block.attn, x), num_heads=HEADS, geometry=geometry)
    assert_equals_upstream(block.attn.proj(y), block._attn(x), rel=1e-12)


@torch.no_grad()
def test_order_of_pad_and_roll_changes_padded_maps():
    block, x = timm_block(), torch.randn(1, 10, 10, C).double()
    inputs = inputs_of(block.attn, x)
    first, last = (
        window_attention(*inputs, num_heads=HEADS, geometry=WindowGeometry((7, 7), (3, 3), order))
        for order in (True, False)
    )
    assert (first - last).abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("size", [(14, 14), (9, 13), (3, 5)], ids=str)
def test_shifted_small_maps_equal_transformers(size):
    swin = pytest.importorskip("transformers.models.swin.modeling_swin")
    config = swin.SwinConfig(embed_dim=C, num_heads=[HEADS], depths=[1], window_size=7)
    layer = swin.SwinLayer(config, C, (56, 56), HEADS, shift_size=3).eval().double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    attention, x = layer.attention, torch.randn(2, *size, C).double()

    normed = layer.layernorm_before(x)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    y, weights = window_attention_weights(
        torch.cat([projection(normed) for projection in projections], dim=-1),
        attention.relative_position_bias()[0],
        torch.cat([projection.bias for projection in projections]),
        num_heads=HEADS,
        geometry=WindowGeometry((7, 7), (3, 3)),
    )
    y = x + attention.o_proj(y)
    y = y + layer.mlp(layer.layernorm_after(y))
    config._attn_implementation = "eager"
    want, want_weights = layer(x.flatten(1, 2), size, always_partition=True)
    assert_equals_upstream(y.flatten(1, 2), want, rel=1e-6)  # upstream's softmax is fp32
    assert_equals_upstream(weights, want_weights, rel=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_loses_no_more_than_upstream(dtype):
    block, x = timm_block(), torch.randn(2, 9, 13, C).double()
    geometry = WindowGeometry((7, 7), (3, 3), roll_first=True)
    low = timm_block().to(dtype)
    low.load_state_dict(block.state_dict())
    y = window_attention(*inputs_of(low.attn, x.to(dtype)), num_heads=HEADS, geometry=geometry)
    assert_as_accurate_as_eager("y", low.attn.proj(y), low._attn(x.to(dtype)), block._attn(x))


@torch.no_grad()
@pytest.mark.parametrize("roll_first", [False, True])
def test_strided_views_give_the_same_result(roll_first):
    block = timm_block()
    wide = torch.randn(2, 18, 26, 3 * C + 8).double()
    qkv = wide[:, ::2, ::2, 5 : 5 + 3 * C]
    _, bias, pad = inputs_of(block.attn, torch.randn(1, 7, 7, C).double())
    arguments = {"num_heads": HEADS, "geometry": WindowGeometry((7, 7), (2, 3), roll_first)}
    want = window_attention(qkv.contiguous(), bias, pad, **arguments)
    assert torch.equal(window_attention(qkv, bias, pad, **arguments), want)


@pytest.mark.parametrize("shift", [(0, 0), (3, 3)], ids=str)
def test_empty_batch_gives_an_empty_map(shift):
    qkv, bias = torch.randn(0, 9, 13, 3 * C), torch.randn(HEADS, 49, 49)
    geometry = WindowGeometry((7, 7), shift)
    y = window_attention(qkv, bias, None, num_heads=HEADS, geometry=geometry)
    assert y.shape == (0, 9, 13, C)


@pytest.mark.parametrize("window", [(2, 2), (4, 7), (7, 7), (12, 12)], ids=str)
def test_relative_position_index_equals_timm(window):
    from timm.models.swin_transformer import get_relative_position_index

    ours = relative_position_index(window, torch.device("cpu"))
    assert torch.equal(ours, get_relative_position_index(*window).flatten())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, r"C divisible by num_heads=5, got \[1, 7, 7, 96\]"),
        ({"geometry": WindowGeometry((7, 7), (7, 0))}, r"below the window 7x7, got \(7, 0\)"),
        ({"geometry": WindowGeometry((7, 7), (-1, 0))}, r"at least 0 .* got \(-1, 0\)"),
        ({"geometry": WindowGeometry((8, 8))}, r"must be \[2, 64, at least 64\] .* \[2, 49, 49\]"),
        ({"impl": "triton"}, "window_attention: impl='triton' cannot run this call: .* got cpu"),
        ({"impl": "cuda"}, "impl must be one of .*'cuda'"),
    ],
    ids=["heads", "shift-too-large", "shift-negative", "bias-shape", "triton", "unknown-impl"],
)
def test_wrong_arguments_raise_an_error(change, message):
    arguments = {"num_heads": HEADS, "geometry": WindowGeometry((7, 7)), **change}
    with pytest.raises((ValueError, NotImplementedError), match=message):
        window_attention(torch.randn(1, 7, 7, 3 * C), torch.randn(HEADS, 49, 49), None, **arguments)


def test_use_impl_forces_the_implementation_and_is_restored():
    arguments = {"num_heads": HEADS, "geometry": WindowGeometry((7, 7))}
    inputs = (torch.randn(1, 7, 7, 3 * C), torch.randn(HEADS, 49, 49), None)
    with use_impl("triton"), pytest.raises(NotImplementedError, match="needs a CUDA or ROCm"):
        window_attention(*inputs, **arguments)
    with use_impl("triton"):
        window_attention(*inputs, **arguments, impl="eager")  # the argument wins
    window_attention(*inputs, **arguments)
    with pytest.raises(ValueError, match="impl must be one of"), use_impl("fast"):  # type: ignore[arg-type]  # the point
        pass
