"""Ways to compute a ConvNeXt: kernels, packed weights on a CPU, graphs; all equal transformers."""

from typing import Any

import pytest
import torch
from convnext_models import KINDS, hf_convnext
from reference_models import from_hf, hf_pair, images
from tolerance import assert_as_accurate_as_eager, assert_equals_upstream

import fastbb
from fastbb import AutoBackbone
from fastbb.bench.launches import n_bytes
from fastbb.bench.traffic import count_backbone, count_forward
from fastbb.inspect.upstream import upstream_of
from fastbb.models import convnext_cpu, convnext_forward
from fastbb_kernels import onednn, use_impl
from fastbb_kernels.testing import interpret, record_launches

pytest.importorskip("transformers")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [[32, 64, 64, 32], [8, 24, 20, 12]], ids=["blocks", "odd"])
def test_kernels_equal_upstream(kind: str, sizes: list[int]) -> None:
    pair = hf_pair(hf_convnext(kind, hidden_sizes=sizes))
    pixels = images(33, 40, batch=2)
    with torch.no_grad():
        want = pair.maps(pixels)
        with use_impl("triton"), interpret():
            assert_equals_upstream(pair.ours(pixels).feature_maps, want)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_compiled_and_exported_backbones_equal_upstream(kind: str) -> None:
    upstream, pixels = hf_convnext(kind), images(48, 40)
    ours = from_hf(upstream)
    batch = torch.export.Dim("batch", min=1, max=16)
    with torch.no_grad():
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        exported = torch.export.export(ours, (pixels,), dynamic_shapes=({0: batch},)).module()
        assert_equals_upstream(compiled(pixels).feature_maps, upstream(pixels).feature_maps)
        three = images(48, 40, batch=3)
        assert_equals_upstream(exported(three).feature_maps, upstream(three).feature_maps)


@pytest.mark.parametrize(("kind", "most"), [("ConvNext", 0.25), ("ConvNextV2", 0.4)])
def test_counted_traffic_of_the_tiny_models_meets_its_goal(kind: str, most: float) -> None:
    with torch.device("meta"):
        backbone = AutoBackbone.from_config(getattr(fastbb, f"{kind}Config")()).eval()
    pixels = torch.empty(64, 3, 224, 224, dtype=torch.bfloat16, device="meta")
    upstream, _ = upstream_of(backbone)
    theirs = count_forward(upstream.module.to(pixels.dtype), pixels, upstream.maps)
    ours = count_backbone(backbone, pixels)
    assert n_bytes(ours) <= most * n_bytes(theirs) and len(ours) < len(theirs) / 2


@pytest.mark.parametrize(
    ("kind", "batch", "n_blocks"), [("ConvNext", 64, 6), ("ConvNext", 8, 3), ("ConvNextV2", 64, 0)]
)
def test_blocks_of_early_stages_are_one_kernel(kind: str, batch: int, n_blocks: int) -> None:
    with torch.device("meta"):
        backbone = AutoBackbone.from_config(getattr(fastbb, f"{kind}Config")()).eval().bfloat16()
    pixels = torch.empty(batch, 3, 224, 224, dtype=torch.bfloat16, device="meta")
    with torch.no_grad(), record_launches() as recording:
        backbone(pixels)
    kernels = [launch.name for launch in recording.launches]
    assert kernels.count("_convnext_block_fwd_kernel") == n_blocks
    assert kernels.count("_depthwise_conv_bn_act_fwd_kernel") == 18 - n_blocks


def test_changed_convolutions_equal_upstream_by_kernels() -> None:
    pair, pixels = hf_pair(hf_convnext("ConvNext", hidden_sizes=[32] * 4)), images(40, 40)
    for model in (pair.upstream, pair.ours):
        dilated, strange = (model.encoder.stages[i].layers[0].dwconv for i in (0, 1))
        dilated.dilation, dilated.padding = (2, 2), (6, 6)
        strange.padding_mode, strange._reversed_padding_repeated_twice = "circular", [3] * 4
    with torch.no_grad():
        want = pair.maps(pixels)
        with use_impl("triton"), interpret():
            assert_equals_upstream(pair.ours(pixels).feature_maps, want)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the maps whose MLPs run with packed weights from now on."""
    shapes: list[tuple[int, ...]] = []
    own = convnext_forward.mlp_on_cpu

    def recorded(x: torch.Tensor, *args: Any) -> torch.Tensor:
        shapes.append(tuple(x.shape))
        return own(x, *args)

    monkeypatch.setattr(convnext_forward, "mlp_on_cpu", recorded)
    return shapes


@pytest.mark.parametrize("part_bytes", [1, 2**14, 2**30])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_parts_of_any_size_equal_upstream(
    kind: str, part_bytes: int, monkeypatch: pytest.MonkeyPatch, on_cpu: list[Any]
) -> None:
    monkeypatch.setattr(convnext_cpu, "PART_BYTES", part_bytes)
    pair, pixels = hf_pair(hf_convnext(kind)), images(70, 61, batch=3)
    assert_equals_upstream(pair.ours(pixels).feature_maps, pair.maps(pixels))
    assert len(on_cpu) == sum(pair.ours.config.depths)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_low_precision_on_a_cpu_loses_no_more_than_eager(kind: str, dtype: torch.dtype) -> None:
    if not onednn.packs(dtype):
        pytest.skip(f"oneDNN has no {dtype} on this CPU")
    pixels, low = images(70, 61), hf_pair(hf_convnext(kind).to(dtype))
    exact = hf_convnext(kind).double()(pixels.double()).feature_maps
    eager, got = low.maps(pixels.to(dtype)), low.ours(pixels.to(dtype)).feature_maps
    for index, maps in enumerate(zip(got, eager, exact)):
        assert_as_accurate_as_eager(f"map {index}", *maps)


def test_calls_that_packed_weights_do_not_cover_run_the_ops(on_cpu: list[Any]) -> None:
    ours, pixels = from_hf(hf_convnext()), images(32, 32)
    ours(pixels)  # a gradient is needed
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours(pixels)
    with torch.no_grad():
        ours.double()(pixels)
        assert not on_cpu
        ours.float()(pixels)
        assert len(on_cpu) == 5


def test_new_weights_count_on_a_cpu() -> None:
    upstream, pixels = hf_convnext(), images(32, 32)
    ours = from_hf(upstream)
    with torch.no_grad():
        ours(pixels)
        for model in (upstream, ours):
            model.encoder.stages[0].layers[0].layer_scale_parameter.mul_(2)
            model.encoder.stages[1].layers[0].pwconv2.bias.add_(1)
        assert_equals_upstream(ours(pixels).feature_maps, upstream(pixels).feature_maps)
