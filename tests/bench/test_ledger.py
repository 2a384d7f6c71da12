"""Ledger of bytes and launches: cases counted by hand, upstream's numbers, ours."""

import functools
from collections.abc import Callable
from pathlib import Path

import ledger
import pytest
import torch
from ledger import CASES, count_kernels, kernel_category
from ledger_count import (
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
    Launch,
    bytes_by_category,
    count_launches,
    n_bytes,
)
from torch import Tensor, nn
from torch.nn import functional as F

from fastbb_kernels import linear_residual, use_impl


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


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


# bytes and launches for the versions in constraints.txt
UPSTREAM = {
    ("swin_t_224", "transformers, SDPA"): (11_294_472_682, 427),
    ("swin_t_224", "timm"): (13_351_210_332, 313),
    ("swin_s_224", "transformers, SDPA"): (17_595_481_786, 829),
    ("swin_s_224", "timm"): (21_343_632_012, 619),
    ("swin_b_384", "transformers, SDPA"): (8_991_046_128, 781),
    ("swin_b_384", "timm"): (13_669_691_120, 619),
    ("swin_t_800x1088", "transformers, SDPA"): (26_609_620_178, 457),
    ("swin_t_800x1088", "timm"): (31_431_668_090, 346),
    ("resnet50", "transformers"): (10_490_577_792, 278),
    ("resnet50", "timm"): (10_490_577_792, 278),
    ("resnet18", "transformers"): (2_366_671_744, 106),
    ("resnet18", "timm"): (2_366_671_744, 106),
    ("resnet101", "transformers"): (15_769_867_136, 550),
    ("resnet101", "timm"): (15_769_867_136, 550),
    ("resnet50d", "timm"): (11_197_095_616, 291),
}


@functools.cache
def launches_of(model: str, implementation: str) -> list[Launch]:
    case = CASES[model]
    return ledger.IMPLEMENTATIONS[case.family][implementation](case)


@pytest.mark.parametrize(("model", "implementation"), UPSTREAM)
def test_bytes_and_launches_of_upstream_are_unchanged(model: str, implementation: str) -> None:
    launches = launches_of(model, implementation)
    assert (n_bytes(launches), len(launches)) == UPSTREAM[model, implementation]


def test_bytes_of_upstreams_swin_equal_those_counted_by_hand() -> None:
    parts = bytes_by_category(launches_of("swin_t_224", "transformers, SDPA"))
    depths = (2, 2, 6, 2)
    maps = [2 * 64 * (56 >> stage) ** 2 * (96 << stage) for stage in range(4)]
    blocks = sum(depth * one_map for depth, one_map in zip(depths, maps))
    # two additions of two maps to a third, and the activation of four maps
    assert parts[RESIDUAL] == blocks * 2 * 3
    assert parts[ACTIVATION] == blocks * 2 * 4
    # every map is padded by zero rows, which still copies it
    assert parts[PAD] == blocks * 2
    # in every second block, there and back, two dimensions each
    assert parts[ROLL] == blocks // 2 * 2 * 2 * 2


def test_bytes_of_upstreams_resnet_equal_those_counted_by_hand() -> None:
    parts = bytes_by_category(launches_of("resnet50", "timm"))
    image, channels, depths = 2 * 64, (256, 512, 1024, 2048), (3, 4, 6, 3)
    ends = sum(
        depth * image * (56 >> stage) ** 2 * wide
        for stage, (depth, wide) in enumerate(zip(depths, channels))
    )
    # a sum of two maps, written to one of them
    assert parts[RESIDUAL] == 3 * ends
    # 112x112 in, 56x56 out, and int64 indices
    assert parts[POOL] == image * 64 * (112**2 + 56**2) + 8 * 64 * 64 * 56**2


GB, MB = 10**9, 10**6
SEPARATE, BLOCK = "fastbb, separate ops", "fastbb, block kernels"
# most bytes and launches of a forward pass
LIMITS = {
    ("swin_t_224", SEPARATE): (4.6 * GB, 70),
    ("swin_t_224", BLOCK): (3.3 * GB, 60),
    ("resnet50", "fastbb"): (52 * MB * 64, 60),
    ("resnet50", "fastbb, tail kernels"): (46 * MB * 64, 60),
}
# share of transformers' traffic: the limit of Swin-T, applied to the other models
LARGEST_SHARE = 4.6 / 11.0


@pytest.mark.parametrize(("model", "implementation"), LIMITS)
def test_our_bytes_and_launches_stay_within_their_limits(model: str, implementation: str) -> None:
    launches = launches_of(model, implementation)
    most_bytes, most_launches = LIMITS[model, implementation]
    assert n_bytes(launches) <= most_bytes
    assert len(launches) <= most_launches


@pytest.mark.parametrize("implementation", [SEPARATE, BLOCK])
@pytest.mark.parametrize("model", ["swin_s_224", "swin_b_384", "swin_t_800x1088"])
def test_our_share_of_upstreams_traffic_holds_on_other_swins(
    model: str, implementation: str
) -> None:
    upstream, _ = UPSTREAM[model, "transformers, SDPA"]
    assert n_bytes(launches_of(model, implementation)) <= LARGEST_SHARE * upstream


@pytest.mark.parametrize("model", ["resnet18", "resnet101", "resnet50d"])
def test_our_share_of_upstreams_traffic_holds_on_other_resnets(model: str) -> None:
    upstream, _ = UPSTREAM[model, "timm"]
    share = 52 / 163 if model != "resnet50d" else 58.5 / 175  # its average pools stay
    assert n_bytes(launches_of(model, "fastbb")) <= share * upstream


@pytest.mark.parametrize("model", ["resnet50", "resnet18", "resnet101"])
def test_our_resnets_launch_only_convolutions(model: str) -> None:
    assert bytes_by_category(launches_of(model, "fastbb")).keys() == {GEMM}


def test_bytes_of_our_resnet_equal_those_counted_by_hand() -> None:
    image, size, inputs = 2 * 64, 56, 64
    elements = 3 * 224**2 + 64 * 56**2  # of one image: the stem
    weights = 64 * 3 * 49 + 64
    for stage, depth in enumerate((3, 4, 6, 3)):
        inner, outputs = 64 << stage, 256 << stage
        for block in range(depth):
            before, first = inputs * size**2, block == 0
            size = size // 2 if first and stage else size
            wide = before // inputs * inner  # the 1x1 runs before the stride
            inside, after = inner * size**2, outputs * size**2
            # reduce, 3x3, and expand with the residual or its convolution
            elements += before + wide + wide + inside + inside + before + after
            weights += inputs * inner + 9 * inner**2 + inner * outputs + 2 * inner + outputs
            weights += inputs * outputs if first else 0
            inputs = outputs
    assert n_bytes(launches_of("resnet50", "fastbb")) == image * elements + 2 * weights


@pytest.mark.parametrize("implementation", [SEPARATE, BLOCK])
def test_our_swin_stores_no_rolled_padded_or_masked_tensor(implementation: str) -> None:
    # 800x1088 needs padding in every stage
    parts = bytes_by_category(launches_of("swin_t_800x1088", implementation))
    assert parts.keys() <= {GEMM, ATTENTION, NORM}


TWO_SIDES: dict[str, Callable[[ledger.Case], list[Launch]]] = {
    "transformers, SDPA": lambda case: [Launch("mm", GEMM, 3 * GB), Launch("roll", ROLL, GB)],
    SEPARATE: lambda case: [Launch("_linear_residual_fwd_kernel", GEMM, GB)],
}


@pytest.fixture
def two_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "IMPLEMENTATIONS", {"swin": TWO_SIDES})


def test_summary_has_a_row_per_model(two_sides: None) -> None:
    sides = {side: launches(CASES["swin_t_224"]) for side, launches in TWO_SIDES.items()}
    assert ledger.summary({"swin_t_224": sides}).splitlines() == [
        "| traffic (ratio), launches | transformers, SDPA | fastbb, separate ops |",
        "|---------------------------|-------------------:|---------------------:|",
        "| Swin-T, 224, batch 64     |  4.00 GB (1.00), 2 |    1.00 GB (0.25), 1 |",
    ]


def test_command_prints_a_breakdown_and_draws_a_picture(
    two_sides: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "ledger.png"
    monkeypatch.setattr("sys.argv", ["ledger.py", "--model", "swin_t_224", "--plot", str(picture)])
    ledger.main()
    assert capsys.readouterr().out.splitlines()[-6:] == [
        "| Swin-T, 224, batch 64: GB (launches) | transformers, SDPA | fastbb, separate ops |",
        "|--------------------------------------|-------------------:|---------------------:|",
        "| GEMM                                 |          3.000 (1) |            1.000 (1) |",
        "| roll                                 |          1.000 (1) |                      |",
        "| total                                |          4.000 (2) |            1.000 (1) |",
        "| MB per image                         |               62.5 |                 15.6 |",
    ]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_traffic_page_shows_the_counted_numbers() -> None:
    page = Path(ledger.__file__).parents[1] / "docs" / "benchmarks" / "traffic.md"
    shown = {" ".join(line.split()) for line in page.read_text().splitlines()}
    for name, case in CASES.items():
        sides = {
            side: launches_of(name, side)
            for side in ledger.IMPLEMENTATIONS[case.family]
            if case.config is not None or side != "transformers"
        }
        assert " ".join(ledger.summary({name: sides}).splitlines()[-1].split()) in shown
