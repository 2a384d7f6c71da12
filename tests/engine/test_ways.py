"""Ways of the engine: on CPUs, on GPUs, and under the global settings of fp32."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engine_rig import PIXELS, assert_right
from pretended_device import Compiler, gpu, no_warning, only_row
from reference_models import Pair, images
from tolerance import assert_as_accurate_as_eager
from torch import Tensor

from fastbb.engine import cpu
from fastbb.engine.computation import BackboneMaps
from fastbb.engine.engine import Engine
from fastbb.engine.prepare import prepare
from fastbb.engine.settings import Settings
from fastbb.weights.derived import derived_bytes
from fastbb_kernels.fp32_precision import fp32_products

pytestmark = pytest.mark.usefixtures("compiler")


@pytest.mark.parametrize("mode", ["eager", "triton", "compile", "triton+compile"])
def test_each_mode_runs_its_own_way_on_a_gpu(mode: str, pair: Pair, compiler: Compiler) -> None:
    with gpu(), no_warning():
        backbone = prepare(pair.ours, mode)
        assert_right(backbone, pair)
        row = only_row(backbone)
    assert row.runs.split(",")[0] == mode and row.why == f"mode={mode!r}"
    assert compiler.impls == {"compile": ["eager"], "triton+compile": ["auto"]}.get(mode, [])


def test_what_eager_derived_is_freed_when_a_compiled_way_runs(pair: Pair) -> None:
    backbone = pair.ours.prepare("eager", example=PIXELS)
    assert derived_bytes([backbone]) > 0
    backbone = pair.ours.prepare("compile", example=PIXELS)
    assert only_row(backbone).runs.startswith("compile") and derived_bytes([backbone]) == 0


def test_a_cpu_splits_a_batch_to_limit_memory(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 4 * 16 * 32 * 32  # bytes of an image's first map, that of the convolution
    monkeypatch.setattr(cpu, "KEPT_BYTES", 2 * largest)
    backbone = pair.ours.prepare("eager")
    assert_right(backbone, pair, images(64, 64, 5))
    row = only_row(backbone)
    assert row.runs == "eager, 2 images at once" and "slow to allocate" in row.why


def test_a_cpu_without_the_dtype_computes_in_fp32(
    pair: Pair, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastbb.engine.ways.has_arithmetic", lambda dtype: dtype.itemsize > 2)
    backbone = pair.ours.prepare("eager", "bf16", example=PIXELS)
    row = only_row(backbone)
    assert row.runs == "eager, in fp32" and "this CPU has no bfloat16 arithmetic" in row.why
    compiled = pair.ours.prepare("compile", "bf16", example=PIXELS)
    with torch.no_grad(), no_warning():
        exact = copy.deepcopy(pair.upstream).double()(PIXELS.double()).feature_maps
        low = copy.deepcopy(pair.upstream).bfloat16()(PIXELS.bfloat16()).feature_maps
        for maps in (compiled(PIXELS).feature_maps, backbone(PIXELS).feature_maps):
            for name, *held in zip(backbone.out_features, maps, low, exact):
                assert_as_accurate_as_eager(name, *held)
    assert only_row(compiled).runs == "compile, 2 images at once"
    assert compiled._engine is not None
    copies = compiled._engine.chooser.ways.copies
    compiled._engine.chooser.ways.eager(PIXELS.bfloat16())
    assert len(copies) == 1 and derived_bytes(copies) > 0
    compiled._engine.chooser.ways.free_derived()
    assert derived_bytes(copies) == 0


# precision of fp32 products, a setting of the whole process


def flags() -> tuple[str, bool]:
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


@pytest.fixture
def flags_of_the_user() -> Iterator[tuple[str, bool]]:
    with fp32_products("tf32"):  # restores the settings of before
        torch.set_float32_matmul_precision("medium")
        torch.backends.cudnn.allow_tf32 = True
        yield flags()


@pytest.mark.parametrize(
    ("precision", "inside"),
    [
        (None, ("medium", True)),
        ("fp32", ("highest", False)),
        ("tf32", ("medium", True)),  # which is TF32 on a GPU
        ("bf16", ("medium", True)),
    ],
    ids=str,
)
@pytest.mark.parametrize("fails", [False, True])
def test_fp32_flags_are_set_during_a_call_only(
    precision: Any, inside: Any, fails: bool, pair: Pair, flags_of_the_user: tuple[str, bool]
) -> None:
    seen = []

    class Seen(type(pair.ours)):
        def feature_maps(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
            seen.append(flags())
            if fails:
                raise ZeroDivisionError
            return super().feature_maps(pixel_values)

    backbone = prepare(pair.ours, "eager", None if precision == "tf32" else precision)
    backbone.__class__ = Seen
    # `prepare` refuses tf32 on a CPU
    backbone._engine = Engine(BackboneMaps(backbone), Settings("eager", precision))
    with torch.no_grad(), pytest.raises(ZeroDivisionError) if fails else no_warning():
        backbone(PIXELS)
    assert set(seen) == {inside} and flags() == flags_of_the_user
