"""The count of bytes and launches: cases counted by hand."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastbb.bench.launches import (
    ACTIVATION,
    ATTENTION,
    COPY,
    GEMM,
    MASK,
    NORM,
    PAD,
    POOL,
    RESIDUAL,
    ROLL,
    count_kernels,
    count_launches,
    kernel_category,
)
from fastbb_kernels import conv3x3_bn_act, linear_residual, op_names, use_impl


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def channels_last(*shape: int) -> Tensor:
    return meta(*shape).contiguous(memory_format=torch.channels_last)


def counted(function: Callable[[], object], *weights: Tensor) -> list[tuple[str, int]]:
    """Category and bytes of every launch of a function."""
    with torch.no_grad(), count_launches(weights) as launches:
        function()
    return [(launch.category, launch.n_bytes) for launch in launches]


def on_meta(module: nn.Module) -> nn.Module:
    return module.to("meta", torch.bfloat16)


def test_a_linear_layer_reads_input_weight_and_bias_and_writes_its_output() -> None:
    module, x = on_meta(nn.Linear(4, 5)), meta(2, 3, 4)
    assert counted(lambda: module(x)) == [(GEMM, 2 * (6 * 4 + 20 + 5 + 6 * 5))]


def test_linear_layer_without_bias_reads_input_and_weight() -> None:
    module, x = on_meta(nn.Linear(4, 5, bias=False)), meta(6, 4)
    assert counted(lambda: module(x)) == [(GEMM, 2 * (6 * 4 + 20 + 6 * 5))]


def test_a_layer_norm_writes_its_fp32_statistics_too() -> None:
    module, x = on_meta(nn.LayerNorm(8)), meta(5, 8)
    assert counted(lambda: module(x)) == [(NORM, 2 * (40 + 8 + 8 + 40) + 4 * (5 + 5))]


def test_layer_norm_copies_a_strided_input() -> None:
    module, x = on_meta(nn.LayerNorm(8)), meta(8, 5).t()
    assert [category for category, _ in counted(lambda: module(x))] == [COPY, NORM]


def test_a_convolution_adds_its_bias_in_a_launch_of_its_own() -> None:
    module, x = on_meta(nn.Conv2d(3, 4, 2, stride=2)), meta(1, 3, 4, 6)
    y = 4 * 2 * 3
    assert counted(lambda: module(x)) == [(GEMM, 2 * (72 + 48 + y)), (GEMM, 2 * (y + 4 + y))]


def test_a_roll_over_two_dimensions_is_two_copies() -> None:
    x = meta(1, 4, 4, 8)
    assert counted(lambda: x.roll((-2, -2), (1, 2))) == [(ROLL, 2 * 256)] * 2


def test_a_pad_fills_its_output_and_copies_the_input_into_it() -> None:
    x = meta(1, 3, 3, 8)
    assert counted(lambda: F.pad(x, (0, 0, 0, 1, 0, 1))) == [(PAD, 2 * 128), (PAD, 2 * 144)]


def test_a_pad_by_zero_still_copies() -> None:
    x = meta(1, 3, 3, 8)
    assert counted(lambda: F.pad(x, (0, 0, 0, 0))) == [(PAD, 2 * 144)]


def test_views_and_allocations_are_free() -> None:
    x = meta(2, 3, 4)

    def views() -> None:
        x.view(6, 4).t()[1:, ::2].unsqueeze(0).expand(5, -1, -1).detach()
        x.permute(2, 0, 1).flatten(1).unbind(0)
        x.contiguous().new_empty(3)
        torch.empty_like(x)

    assert counted(views) == []


def test_copy_cast_and_cat_read_and_write_each_element() -> None:
    x = meta(2, 3, 4)
    assert counted(lambda: x.transpose(1, 2).contiguous()) == [(COPY, 2 * 48)]
    assert counted(lambda: x.float()) == [(COPY, 24 * (2 + 4))]
    assert counted(lambda: torch.cat([x[:, :2], x[:, 2:]], dim=1)) == [(COPY, 2 * 48)]


def test_an_expanded_input_counts_its_distinct_elements() -> None:
    x, row = meta(6, 8), meta(8)
    assert counted(lambda: x + row.expand(6, 8)) == [(RESIDUAL, 2 * (48 + 8 + 48))]


def test_an_input_that_is_passed_twice_is_read_once() -> None:
    x = meta(6, 8)
    assert counted(lambda: x + x.view(6, 8)) == [(RESIDUAL, 2 * (48 + 48))]
    halves = x.chunk(2)
    assert counted(lambda: halves[0] + halves[1]) == [(RESIDUAL, 2 * (48 + 24))]


def test_an_addition_in_place_reads_what_it_overwrites() -> None:
    x, y = meta(6, 8), meta(6, 8)
    assert counted(lambda: x.add_(y)) == [(RESIDUAL, 2 * (48 + 48 + 48))]


def test_scalar_operands_count_no_traffic() -> None:
    x = meta(6, 8)
    assert counted(lambda: x * 0.5) == [(ATTENTION, 2 * 96)]
    assert counted(lambda: x * torch.tensor(0.5)) == [(ATTENTION, 2 * 96)]


def test_a_batch_norm_makes_its_statistics_in_two_small_launches() -> None:
    module, x = on_meta(nn.BatchNorm2d(8).eval()), meta(5, 8, 3, 3)
    weights = [*module.parameters(), *module.buffers()]
    per_channel = (MASK, 8 * (2 + 4))
    assert counted(lambda: module(x), *weights) == [
        *(per_channel, per_channel),
        (NORM, 2 * (360 + 8 + 8 + 360) + 4 * (8 + 8)),
    ]


def test_a_max_pool_writes_its_indices_too() -> None:
    x = meta(1, 2, 4, 4)
    assert counted(lambda: F.max_pool2d(x, 2)) == [(POOL, 2 * 32 + (2 + 8) * 8)]


def test_an_activation_in_place_reads_and_writes() -> None:
    x = meta(6, 8)
    assert counted(lambda: F.relu_(x)) == [(ACTIVATION, 2 * 96)]


def test_gelu_reads_and_writes_its_map() -> None:
    x = meta(6, 8)
    assert counted(lambda: F.gelu(x)) == [(ACTIVATION, 2 * 96)]


def attend(n: int, mask: Tensor | None) -> Callable[[], Tensor]:
    q, k, v = meta(3, 6, 2, n, 32).unbind(0)
    return lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def test_attention_is_one_launch() -> None:
    assert counted(attend(49, None)) == [(ATTENTION, 2 * 4 * 6 * 2 * 49 * 32)]


def test_attention_reads_an_expanded_mask_once() -> None:
    mask = meta(1, 2, 16, 16).expand(6, -1, -1, -1)
    assert counted(attend(16, mask)) == [(ATTENTION, 2 * (4 * 6 * 2 * 16 * 32 + 2 * 16 * 16))]


def test_attention_copies_a_mask_of_49_columns_into_rows_of_56() -> None:
    mask = meta(6, 2, 49, 49)
    n, wide = mask.numel(), 6 * 2 * 49 * 56
    attention = (ATTENTION, 2 * (4 * 6 * 2 * 49 * 32 + n))
    assert counted(attend(49, mask), mask) == [(MASK, 2 * wide), (MASK, 2 * (n + n)), attention]


def test_output_of_attention_needs_no_copy_before_the_next_layer() -> None:
    assert len(counted(lambda: attend(49, None)().transpose(1, 2).contiguous())) == 1


def test_ops_without_image_data_count_as_mask_or_bias() -> None:
    x, table = meta(6, 8), meta(5, 8)

    def add_mask() -> None:
        index = torch.arange(6, device="meta") >= 3
        rows = table[index.long()]  # arange, >=, copy, gather
        mask = rows.masked_fill(rows != 0, -100.0)  # !=, copy, fill
        x.add(mask)

    assert [category for category, _ in counted(add_mask, table)] == [MASK] * 8
    x_is_data = counted(lambda: x.clone().zero_().add_(x) + x)
    assert [category for category, _ in x_is_data] == [COPY, MASK, MASK, RESIDUAL]


def test_unknown_op_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="how many kernels aten.cumsum"):
        counted(lambda: meta(4).cumsum(0))


def test_our_kernels_count_by_the_same_rule_beside_ops() -> None:
    x, weight, bias, residual = meta(6, 32), meta(64, 32), meta(64), meta(6, 64)
    with use_impl("triton"), count_kernels([weight, bias]) as launches:
        F.gelu(linear_residual(x, weight, bias, residual))
    names = {launch.name: (launch.category, launch.n_bytes) for launch in launches}
    assert names == {
        "gelu": (ACTIVATION, 2 * 2 * 6 * 64),
        "_linear_residual_fwd_kernel": (GEMM, 2 * (6 * 32 + 64 * 32 + 64 + 2 * 6 * 64)),
    }


def test_a_kernel_without_a_category_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="_softmax_fwd_kernel has no category"):
        kernel_category("_softmax_fwd_kernel")


def test_every_kernel_of_ours_has_a_category() -> None:
    assert all(kernel_category(f"_{op}_fwd_kernel") for op in op_names())


def test_a_convolution_keeps_channels_last() -> None:
    module, x = on_meta(nn.Conv2d(3, 4, 2, bias=False)), channels_last(1, 3, 4, 6)
    layout = torch.channels_last
    copy_of_weight, convolution = counted(lambda: module(x).contiguous(memory_format=layout))
    assert copy_of_weight == (COPY, 2 * (48 + 48))
    assert convolution == (GEMM, 2 * (72 + 48 + 4 * 3 * 5))


@pytest.mark.parametrize("residual", [False, True])
def test_fused_convolution_of_cudnn_is_one_launch(residual: bool) -> None:
    x, weight, bias = channels_last(2, 64, 8, 8), channels_last(64, 64, 3, 3), meta(64)
    y = channels_last(2, 64, 8, 8) if residual else None
    with count_kernels([weight, bias]) as launches:
        conv3x3_bn_act(x, weight, bias, residual=y, activation="relu")
    maps = 3 if residual else 2
    assert [(one.name, one.category, one.n_bytes) for one in launches] == [
        ("cudnn_convolution_add_relu", GEMM, 2 * (maps * x.numel() + weight.numel() + 64))
    ]


def test_strided_convolution_of_a_library_is_followed_by_our_epilogue() -> None:
    x, weight, bias = channels_last(2, 64, 8, 8), channels_last(128, 64, 3, 3), meta(128)
    with count_kernels([weight, bias]) as launches:
        conv3x3_bn_act(x, weight, bias, stride=2, activation="relu")
    y = 2 * 128 * 4 * 4
    assert [(one.name, one.n_bytes) for one in launches] == [
        ("convolution", 2 * (x.numel() + weight.numel() + y)),
        ("_bias_act_fwd_kernel", 2 * (y + 128 + y)),
    ]
