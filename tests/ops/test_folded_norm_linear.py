"""folded_norm_linear: its kernel and `fold_norm` against torch's layers in float64."""

import math
from typing import Any

import pytest
import torch
from timm.layers import QuickGELU
from tolerance import assert_as_accurate_as_eager
from torch import Tensor, nn
from torch.nn import functional as F

from fastbb_kernels import folded_norm_linear, use_impl
from fastbb_kernels._dispatch import Architecture
from fastbb_kernels.accuracy import max_error
from fastbb_kernels.op import find_op
from fastbb_kernels.ops.folded_norm_linear import FoldedNorm, fold_norm, folds_norm
from fastbb_kernels.testing import (
    ARCHITECTURES,
    binary_facts,
    corners,
    fake_gpu,
    interpret,
    record_launches,
    trace,
)
from fastbb_kernels.triton_kernels import folded_norm_linear as kernel_module
from fastbb_kernels.triton_kernels.config import GemmConfig

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LOW = DTYPES[1:]
OP = find_op("folded_norm_linear")

# not the default, so that a lost eps shows
EPS = 1e-2

# upstream's modules by the name of their activation
MODULES: dict[str | None, nn.Module] = {
    None: nn.Identity(),
    "gelu": nn.GELU(),
    "quick_gelu": QuickGELU(),
    "relu": nn.ReLU(),
}
Layers = tuple[Tensor, Tensor, Tensor, Tensor | None]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles and steps for few rows."""
    config = GemmConfig(32, 16, 32, num_warps=4, num_stages=1)
    monkeypatch.setattr(kernel_module, "launch_config", lambda *_: config)


def upstream(x: Tensor, layers: Layers, activation: str | None = None) -> Tensor:
    norm_weight, norm_bias, weight, bias = layers
    y = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, EPS)
    return MODULES[activation](F.linear(y, weight, bias))


def exactly(x: Tensor, layers: Layers, activation: str | None = None) -> Tensor:
    exact: Any = [None if t is None else t.double() for t in layers]
    return upstream(x.double(), exact, activation)


def layers_of(
    features: int, out_features: int, dtype: torch.dtype, bias: bool = True, std: float = 1.0
) -> Layers:
    return (
        (torch.randn(features) * std).to(dtype),
        torch.randn(features).to(dtype),
        (torch.randn(out_features, features) * features**-0.5).to(dtype),
        torch.randn(out_features).to(dtype) if bias else None,
    )


def run(x: Tensor, folded: FoldedNorm, activation: str | None = None) -> Tensor:
    """The kernel's result, with every access checked and every element written once."""
    with torch.no_grad(), trace() as t:
        y = folded_norm_linear(x, *folded, eps=EPS, activation=activation, impl="triton")
    assert len(t.launches) == 1
    t.assert_written_once("y_ptr")
    if x.is_contiguous():
        assert t.unique_bytes == OP.n_bytes(x, *folded, activation=activation)
    assert y.is_contiguous()
    return y


def assert_right(x: Tensor, layers: Layers, activation: str | None = None) -> None:
    y = run(x, fold_norm(*layers), activation)
    eager, exact = upstream(x, layers, activation), exactly(x, layers, activation)
    assert_as_accurate_as_eager("y", y, eager, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", MODULES)
@pytest.mark.parametrize(
    ("rows", "features", "out_features"),
    [((1, 5, 7), 96, 80), ((33,), 64, 16), ((1,), 32, 17), ((3,), 288, 1)],
    ids=["three-steps", "one-row-over", "one-row", "one-column"],
)
def test_kernel_and_folding_are_as_accurate_as_eager(
    rows: tuple[int, ...],
    features: int,
    out_features: int,
    activation: str | None,
    dtype: torch.dtype,
) -> None:
    x = (torch.randn(*rows, features) * 2 + 1).to(dtype)
    assert_right(x, layers_of(features, out_features, dtype), activation)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tiles_of_every_architecture_are_as_accurate_as_eager(
    arch: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    for n_rows in (10**6, 49):
        sizes = n_rows, 384, 288, torch.bfloat16, None
        config = kernel_module.launch_config(*sizes, arch)
        monkeypatch.setattr(kernel_module, "launch_config", lambda *_, config=config: config)
        x = torch.randn(config.block_m + 3, 384).bfloat16()
        assert_right(x, layers_of(384, config.block_n + 32, torch.bfloat16))
        monkeypatch.undo()


def test_without_bias_is_as_accurate_as_eager() -> None:
    x = torch.randn(40, 64).bfloat16()
    assert_right(x, layers_of(64, 24, torch.bfloat16, bias=False))


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("mean", [10.0, 100.0])
def test_large_mean_is_as_accurate_as_eager(mean: float, dtype: torch.dtype) -> None:
    assert_right((torch.randn(40, 384) + mean).to(dtype), layers_of(384, 48, dtype))
    # each step of the statistics sees another mean
    steps = mean * torch.arange(384).div(32, rounding_mode="floor")
    assert_right((torch.randn(40, 384) + steps).to(dtype), layers_of(384, 48, dtype))


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_wrong_centring_is_caught_by_a_large_mean(dtype: torch.dtype) -> None:
    x, layers = (torch.randn(40, 384) + 100).to(dtype), layers_of(384, 48, dtype)
    eager, exact, folded = upstream(x, layers), exactly(x, layers), fold_norm(*layers)
    for wrong in (
        folded._replace(sums=torch.zeros(48)),  # those of the weights before rounding
        folded._replace(weight=(folded.weight.float() + 1e-3).to(dtype)),
    ):
        with pytest.raises(AssertionError, match="y: error"):
            assert_as_accurate_as_eager("y", run(x, wrong), eager, exact)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_outliers_are_as_accurate_as_eager(dtype: torch.dtype) -> None:
    """Trained models have a few channels a hundred times as large as the others."""
    x, layers = torch.randn(40, 384), layers_of(384, 48, torch.float32)
    x[:, [3, 77, 200]] *= 100
    layers[0][[3, 77, 200]] /= 50
    norm_weight, norm_bias, weight, _ = (t if t is None else t.to(dtype) for t in layers)
    assert norm_weight is not None and norm_bias is not None and weight is not None
    assert_right(x.to(dtype), (norm_weight, norm_bias, weight, None))


def test_tiny_weights_fold_to_finite_values() -> None:
    x, layers = torch.randn(5, 64).bfloat16(), layers_of(64, 8, torch.bfloat16, std=1e-38)
    layers[2].mul_(1e-30)
    folded = fold_norm(*layers)
    assert all(t.isfinite().all() for t in folded)
    assert_right(x, layers)


@pytest.mark.parametrize("std", [1e-4, 1e3])
def test_weights_beyond_the_range_of_fp16_are_scaled(std: float) -> None:
    x, layers = torch.randn(40, 64).half(), layers_of(64, 48, torch.float16, std=std)
    assert fold_norm(*layers).weight.abs().max() < 1
    assert_right(x, layers)


def test_folded_rows_have_no_mean_and_sums_are_of_the_rounded_weights() -> None:
    folded = fold_norm(*layers_of(96, 40, torch.bfloat16))
    assert folded.weight.dtype == torch.bfloat16
    assert torch.equal(folded.sums, folded.weight.double().sum(1).float())
    assert folded.sums.abs().max() < 0.02  # rounding alone; of the weights themselves 3
    assert math.frexp(folded.scale.item())[0] == 0.5
    assert 0.5 <= folded.weight.abs().max() < 1


def test_rows_of_zeros_fold_to_zeros() -> None:
    layers = torch.zeros(64), torch.ones(64), torch.randn(8, 64), None
    folded = fold_norm(*layers)
    assert all(t.isfinite().all() for t in folded)
    torch.testing.assert_close(
        run(torch.randn(3, 64), folded), upstream(torch.zeros(3, 64), layers)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_eager_is_the_kernels_function_for_any_sums(dtype: torch.dtype) -> None:
    """The check of a launch makes sums of its own."""
    folded = fold_norm(*layers_of(64, 40, dtype))._replace(sums=torch.randn(40))
    x = (torch.randn(9, 64) + 1).to(dtype)
    exact = OP.eager(x.double(), *(t.double() for t in folded), eps=EPS)
    eager = OP.eager(x, *folded, eps=EPS)
    assert_as_accurate_as_eager("y", run(x, folded), eager, exact)
    assert max_error(eager, exact) < 0.05


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_views_are_as_accurate_as_eager(dtype: torch.dtype) -> None:
    copied = torch.randn(4, 9, 2, 77).to(dtype)[:, 3:8, 1, 5:37]  # rows at two strides
    columns = torch.randn(32, 70).to(dtype).t()[3:23]  # the stride of a column is 70
    sliced = torch.randn(20, 99).to(dtype)[:, 7:39]  # rows of 99
    for view in (copied, columns, sliced):
        assert_right(view, layers_of(32, 40, dtype))


@pytest.mark.parametrize("rows", [(0,), (0, 7, 7), (3, 0)], ids=str)
def test_empty_input_gives_an_empty_result(rows: tuple[int, ...]) -> None:
    folded = fold_norm(*layers_of(32, 40, torch.bfloat16))
    with torch.no_grad(), interpret():
        y = folded_norm_linear(torch.randn(*rows, 32).bfloat16(), *folded, impl="triton")
    assert y.shape == (*rows, 40)


def meta(n_rows: int, features: int, out_features: int, dtype: torch.dtype) -> list[Tensor]:
    """A call of the op without values."""
    norm = torch.empty(features, dtype=dtype, device="meta")
    weight = torch.empty(out_features, features, dtype=dtype, device="meta")
    folded = fold_norm(norm, norm.clone(), weight)
    return [torch.empty(n_rows, features, dtype=dtype, device="meta"), *folded]


def test_offsets_beyond_32_bits_stay_in_bounds() -> None:
    many = meta(2**26 + 3, 64, 48, torch.bfloat16)
    wide = torch.empty(2**25 + 3, 2**7, dtype=torch.bfloat16, device="meta")[:, 64:]
    # rows so far apart that they are copied
    far = torch.empty(40, 2**25, dtype=torch.bfloat16, device="meta")[:, 64:128]
    for x in (many[0], wide, far):
        with torch.no_grad(), trace(programs=corners, data=False) as t:
            folded_norm_linear(x, *many[1:], impl="triton")
        assert [launch.n_programs for launch in t.launches] == [2]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    "activation", [None, "gelu", "gelu_new", "quick_gelu", "silu", "hardswish"]
)
def test_few_rows_get_small_tiles(
    arch: Architecture, activation: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()

    def area(n_rows: int) -> int:
        sizes = n_rows, 768, 3072, torch.bfloat16, activation
        config = kernel_module.launch_config(*sizes, arch)
        return config.block_m * config.block_n

    assert area(49) < area(49 * 32) <= area(49 * 64) == area(49 * 256)


@pytest.mark.parametrize(("arch", "block_n"), [(80, 256), (90, 256), (100, 128), (120, 128)])
def test_large_tiles_spill_nothing(
    arch: Architecture, block_n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    with torch.no_grad(), fake_gpu(arch) as gpu:
        folded_norm_linear(
            *meta(12544, 384, 1536, torch.bfloat16), activation="gelu", impl="triton"
        )
    facts = binary_facts(gpu.kernels[0], arch)
    assert gpu.launches[0].constexprs["BLOCK_N"] == block_n
    assert facts.spills == 0 and facts.async_copies > 0


def test_batch_sizes_share_a_binary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()

    def launched(n_rows: int, dtype: torch.dtype = torch.bfloat16) -> Any:
        with torch.no_grad(), record_launches(90) as recording:
            folded_norm_linear(*meta(n_rows, 384, 1536, dtype), impl="triton")
        return recording.launches[0].specialization

    assert launched(12544) == launched(12501) == launched(6272)
    assert launched(12544) != launched(12544, torch.float16)


def test_each_row_is_read_once_for_each_tile_of_columns() -> None:
    x, folded = torch.randn(60, 64).bfloat16(), fold_norm(*layers_of(64, 48, torch.bfloat16))
    with torch.no_grad(), trace() as t:
        folded_norm_linear(x, *folded, impl="triton")
    read = t.launches[0].tensors["x_ptr"].load
    assert read.requested_bytes == 3 * read.unique_bytes


class Folded(nn.Module):
    def forward(self, *args: Tensor) -> Tensor:
        return folded_norm_linear(*args, eps=EPS, activation="gelu")


def test_compiled_op_equals_eager() -> None:
    folded = fold_norm(*layers_of(32, 24, torch.float32))
    x = torch.randn(5, 32)
    compiled = torch.compile(Folded(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, *folded), OP.eager(x, *folded, eps=EPS, activation="gelu"))


def test_custom_op_passes_opcheck() -> None:
    folded = fold_norm(*layers_of(32, 24, torch.float32))
    torch.library.opcheck(OP.custom_op, (torch.randn(2, 3, 32), *folded, EPS, "gelu"))


SHAPES = [(2, 8), (6, 8), (6,), (1,), (6,)]


@pytest.mark.parametrize(
    ("index", "shape", "message"),
    [
        (0, (), r"weight must be \[C_out, C\] for x \[..., C\], got .* x \[\]"),
        (1, (6, 9), r"weight must be \[C_out, C\] .* got weight \[6, 9\] and x \[2, 8\]"),
        (2, (8,), r"sums must be \[6\], got \[8\]"),
        (3, (6,), r"scale must be \[1\], got \[6\]"),
        (4, (6, 1), r"bias must be \[6\], got \[6, 1\]"),
    ],
)
def test_wrong_shapes_raise_value_error(index: int, shape: tuple[int, ...], message: str) -> None:
    args: list[Any] = [torch.randn(size) for size in SHAPES]
    args[index] = torch.randn(shape)
    with pytest.raises(ValueError, match=f"folded_norm_linear: {message}"):
        folded_norm_linear(*args)


def test_impl_triton_refuses_what_the_kernel_cannot_run() -> None:
    def refused(args: list[Any]) -> str:
        with record_launches(90), pytest.raises(NotImplementedError) as error:
            folded_norm_linear(*args, impl="triton")
        return str(error.value)

    assert "multiple of 32 features, got 40" in refused(meta(2, 40, 8, torch.bfloat16))
    assert "needs fp16 or bf16: exact" in refused(meta(2, 64, 8, torch.float32))
    assert "less than 2**31 elements" in refused(meta(2, 2**16, 2**15, torch.bfloat16))
    args = meta(2, 64, 8, torch.bfloat16)
    args[2] = args[2].half()
    assert "all tensors in torch.bfloat16, got sums in torch.float16" in refused(args)


@pytest.mark.parametrize(
    ("features", "dtype", "folds"),
    [
        (384, torch.bfloat16, True),
        (384, torch.float16, True),
        (384, torch.float32, False),
        (256, torch.bfloat16, False),
        (400, torch.bfloat16, False),
    ],
)
def test_wide_rows_of_low_precision_are_folded(
    features: int, dtype: torch.dtype, folds: bool
) -> None:
    x, layers = torch.randn(3, features).to(dtype), layers_of(features, 8, dtype)
    with torch.no_grad():
        assert not folds_norm(x, *layers)  # on a CPU
        with interpret():
            assert folds_norm(x, *layers) == folds
            with use_impl("triton"):
                assert folds_norm(x, *layers) == folds
            with use_impl("eager"):
                assert not folds_norm(x, *layers)


def test_no_norm_is_folded_where_a_gradient_is_needed_or_dtypes_differ() -> None:
    x, layers = torch.randn(3, 384).bfloat16(), layers_of(384, 8, torch.bfloat16)
    with interpret():
        assert folds_norm(x, *layers)
        assert not folds_norm(x, layers[0].float(), *layers[1:])
        for i in range(4):
            layer = layers[i]
            assert layer is not None
            layer.requires_grad_()
            assert not folds_norm(x, *layers)
            layer.requires_grad_(False)
