"""window_attention with cosines against Swin V2 of timm and transformers, eager and its kernel."""

from typing import Any

import pytest
import torch
from swin_v2_models import geometry_of, inputs_of, layer_beyond_the_mask, timm_block
from tolerance import assert_as_accurate_as_eager, assert_equals_upstream
from torch import Tensor, nn

from fastbb_kernels import WindowGeometry, window_attention, window_attention_weights
from fastbb_kernels.op import find_op
from fastbb_kernels.testing import trace

OP = find_op("window_attention")
C, HEADS = 32, 2
# no padding, padding on one side, on both, smaller than a window, one token
MAPS = [(16, 16), (16, 10), (9, 13), (3, 5), (1, 1)]


def before_the_projection(block: Any, x: Tensor) -> Tensor:
    """Upstream's attention of x, without its last layer."""
    projection, block.attn.proj = block.attn.proj, nn.Identity()
    try:
        return block._attn(x)
    finally:
        block.attn.proj = projection


@torch.no_grad()
@pytest.mark.parametrize("shift", [0, 4])
@pytest.mark.parametrize("size", MAPS, ids=str)
def test_eager_equals_timm(size: tuple[int, int], shift: int) -> None:
    block, x = timm_block(shift=shift).double(), torch.randn(2, *size, C).double()
    y = window_attention(**inputs_of(block.attn, x), geometry=geometry_of(block))
    assert_equals_upstream(y, before_the_projection(block, x), rel=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("size", [(16, 24), (9, 13)], ids=str)
def test_a_mask_of_its_own_value_equals_transformers(size: tuple[int, int]) -> None:
    pytest.importorskip("transformers")
    layer, x = layer_beyond_the_mask(size)
    own = layer.attention.get_submodule("self")
    table = own.continuous_position_bias_mlp(own.relative_coords_table.double()).view(-1, HEADS)
    bias = table[own.relative_position_index.view(-1)].view(64, 64, -1).permute(2, 0, 1)
    pad = torch.cat([own.query.bias, torch.zeros(C).double(), own.value.bias])
    options: dict[str, Any] = {
        "num_heads": HEADS,
        "geometry": WindowGeometry((8, 8), (4, 4)),
        "logit_scale": torch.full((HEADS,), 100.0).double(),
    }
    qkv = torch.cat([own.query(x), own.key(x), own.value(x)], dim=-1)
    inputs = qkv, 16 * torch.sigmoid(bias), pad
    y, weights = window_attention_weights(*inputs, **options, mask_value=-200.0)
    # leaves x plus the attention: without its last layer, norms and MLP
    layer.attention.output.dense = layer.layernorm_before = layer.layernorm_after = nn.Identity()
    layer.output.dense.weight.data.zero_()
    layer.output.dense.bias.data.zero_()
    (want, want_weights) = layer(x.flatten(1, 2), size, output_attentions=True)
    assert_equals_upstream((x + y).flatten(1, 2), want, rel=1e-7)
    assert_equals_upstream(weights, want_weights, rel=1e-7)
    other = window_attention(*inputs, **options)
    assert (other - y).abs().max() > 1e-3


CASES = {
    "whole-windows": (timm_block, (16, 16), {"shift": 0}),
    "shifted": (timm_block, (16, 24), {}),
    "padded": (timm_block, (9, 13), {}),
    "below-a-window": (timm_block, (3, 5), {}),
    "window-7": (timm_block, (9, 14), {"window": 7, "shift": 3}),
    "window-12": (timm_block, (12, 18), {"window": 12, "shift": 6}),
    "window-16": (timm_block, (15, 16), {"window": 16, "shift": 8}),
    "narrow-heads": (timm_block, (8, 9), {"heads": 4}),
}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_kernel_is_as_accurate_as_timm(name: str, dtype: torch.dtype) -> None:
    make, size, options = CASES[name]
    block, x = make(**options).to(dtype), torch.randn(2, *size, C).to(dtype)
    inputs = inputs_of(block.attn, x)
    # the columns that are no keys hold NaN
    n_tokens = inputs["bias"].shape[1]
    bias = torch.full((inputs["num_heads"], n_tokens, -(-n_tokens // 16) * 16), torch.nan)
    inputs["bias"] = bias.to(dtype).index_copy_(2, torch.arange(n_tokens), inputs["bias"])
    geometry = geometry_of(block)
    with trace() as t:
        y = window_attention(**inputs, geometry=geometry, impl="triton")
    t.assert_written_once("y_ptr")
    assert t.unique_bytes == OP.n_bytes(**inputs, geometry=geometry)
    exact: dict[str, Any] = {
        k: v.double() if isinstance(v, Tensor) else v for k, v in inputs.items()
    }
    truth = window_attention(**exact, geometry=geometry)
    eager = before_the_projection(block, x)
    if not eager.isfinite().all():  # the length of a padded key is 0, and its limit 0 in fp16
        assert dtype == torch.float16 and any(n % m for n, m in zip(size, block.window_size))
        eager = window_attention(**inputs, geometry=geometry, impl="eager")
    assert_as_accurate_as_eager("y", y, eager, truth)


@torch.no_grad()
def test_keys_of_length_zero_get_no_scores_but_the_bias() -> None:
    block, x = timm_block().double(), torch.randn(1, 16, 16, C).double()
    inputs = inputs_of(block.attn, x)
    inputs["qkv"][..., C : 2 * C] = 0.0
    got = window_attention(**inputs, geometry=geometry_of(block))
    inputs["qkv"][..., :C] = 0.0  # no queries either
    assert_equals_upstream(got, window_attention(**inputs, geometry=geometry_of(block)), rel=1e-12)


def test_a_scale_of_another_size_is_an_error() -> None:
    qkv, bias = torch.randn(1, 8, 8, 3 * C), torch.randn(HEADS, 64, 64)
    options: dict[str, Any] = {"num_heads": HEADS, "geometry": WindowGeometry((8, 8))}
    with pytest.raises(ValueError, match=r"logit_scale must be \[2\], got \[3\]"):
        window_attention(qkv, bias, None, **options, logit_scale=torch.ones(3))
