"""Mode "openvino": its maps against upstream's, what it forgets, and what turns it off."""

import copy
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from convnext_models import hf_convnext
from engine_rig import PIXELS, assert_right
from openvino_settings import recorded_settings
from pretended_device import (
    MANY,
    Compiler,
    Device,
    compiling_takes,
    explained,
    no_warning,
    only_row,
)
from reference_models import Pair, hf_pair, hf_resnet, hf_swin, images, randomize_
from tolerance import assert_as_accurate_as_eager, assert_equals_upstream
from vit_models import upstream_class, vit_config
from weight_changes import scale_

from fastbb import AutoBackbone, accelerate
from fastbb.engine import openvino, ways
from fastbb.engine.prepare import prepare
from fastbb.engine.settings import EngineWarning, Settings
from fastbb.weights.derived import derived_bytes
from fastbb_kernels.machine import Machine
from fastbb_kernels.result_cache import ResultCache

library: Any = pytest.importorskip("openvino")
REL = 1e-5  # of the largest magnitude of a map


def dinov2() -> Any:
    return randomize_(upstream_class("dinov2", "Backbone")(vit_config("dinov2")))


FAMILIES: dict[str, Callable[[], Any]] = {
    "swin": lambda: hf_swin(depths=(2, 1), num_heads=(2, 4), out_indices=[0, 1, 2]),
    "resnet": lambda: hf_resnet(depths=(1, 1), hidden_sizes=[16, 32], out_indices=[0, 1, 2]),
    "dinov2": dinov2,
    "convnext": hf_convnext,
}


@pytest.fixture
def one() -> Pair:
    """A pair whose weights a test may change."""
    return hf_pair(FAMILIES["resnet"]())


@pytest.mark.parametrize("size", [(56, 56), (60, 76)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_maps_equal_upstream_for_every_batch(family: str, size: tuple[int, int]) -> None:
    """One conversion serves every batch of a size; another size runs op by op."""
    pair = hf_pair(FAMILIES[family]())
    with no_warning():
        backbone = pair.ours.prepare("openvino", example=(2, *size))
        for batch in (2, 1, 5):
            pixels = images(*size, batch)
            assert_equals_upstream(backbone(pixels).feature_maps, pair.maps(pixels), REL)
    assert {row.runs for row in explained(backbone).rows} == {"openvino"}
    other = images(84, 56, 1)
    assert_equals_upstream(backbone(other).feature_maps, pair.maps(other), REL)
    row = explained(backbone).rows[-1]
    own = "x".join(map(str, size))
    assert row.runs == "eager" and f"openvino was converted for {own} images" in row.why


@pytest.mark.parametrize("family", ["swin", "convnext"])
@torch.no_grad()
def test_layer_norms_of_maps_run_in_one_pass(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenVINO has a kernel for layer norms of tokens only, and maps are given to it as tokens."""
    compiled: list[Any] = []
    of_batch = openvino._CompiledModel._for_batch

    def recorded(self: Any, batch: int) -> Any:
        compiled.append(of_batch(self, batch))
        return compiled[-1]

    monkeypatch.setattr(openvino._CompiledModel, "_for_batch", recorded)
    pair = hf_pair(FAMILIES[family]())
    pair.ours.prepare("openvino", example=PIXELS)
    kinds = [
        op.get_rt_info()["layerType"].value for op in compiled[0].get_runtime_model().get_ops()
    ]
    assert "MVN" in kinds and not {"Reduce", "RMS"} & set(kinds)


@torch.no_grad()
def test_bf16_is_as_accurate_as_eager_bf16(one: Pair) -> None:
    backbone = one.ours.prepare("openvino", "bf16", example=PIXELS)
    if openvino.has_arithmetic(torch.bfloat16):
        assert only_row(backbone).runs == "openvino"
    exact = copy.deepcopy(one.upstream).double()(PIXELS.double()).feature_maps
    low = copy.deepcopy(one.upstream).bfloat16()(PIXELS.bfloat16()).feature_maps
    for name, *held in zip(backbone.out_features, backbone(PIXELS).feature_maps, low, exact):
        assert held[0].dtype == torch.bfloat16
        assert_as_accurate_as_eager(name, *held)


@torch.no_grad()
def test_maps_are_fresh_and_pixels_are_left_alone(one: Pair) -> None:
    backbone = one.ours.prepare("openvino", example=PIXELS)
    laid_out = PIXELS.contiguous(memory_format=torch.channels_last)
    first = backbone(laid_out).feature_maps
    kept = [x.clone() for x in first]
    second = backbone(images(64, 64, seed=5)).feature_maps
    assert all(map(torch.equal, first, kept)) and torch.equal(laid_out, PIXELS)
    assert not {x.data_ptr() for x in first} & {x.data_ptr() for x in second}
    first[0].add_(1)  # they may be written
    with torch.inference_mode():
        assert_equals_upstream(backbone(PIXELS).feature_maps, one.maps(PIXELS), REL)


def test_nothing_that_eager_derived_is_kept(one: Pair) -> None:
    backbone = one.ours.prepare("eager", example=PIXELS)
    assert derived_bytes([backbone]) > 0
    backbone = one.ours.prepare("openvino", example=PIXELS)
    assert derived_bytes([backbone]) == 0


def test_threads_compute_their_own_maps(one: Pair) -> None:
    backbone = one.ours.prepare("openvino", example=PIXELS)
    failed: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for n in (1, 2, 3):
                assert_right(backbone, one, images(64, 64, n, seed=seed))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_torch_decides_the_number_of_threads_and_none_is_pinned(
    one: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = recorded_settings(monkeypatch)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        one.ours.prepare("openvino", example=PIXELS)
    finally:
        torch.set_num_threads(before)
    (settings,) = seen
    assert settings["INFERENCE_NUM_THREADS"] == 2
    assert settings["INFERENCE_PRECISION_HINT"] == "f32"
    assert settings["ENABLE_CPU_PINNING"] is False


def test_changed_weights_run_eager_and_are_converted_anew_when_prepared_again(one: Pair) -> None:
    prepared = one.ours.prepare("openvino", example=PIXELS)
    scale_(prepared)
    one.upstream.load_state_dict(prepared.state_dict())
    with pytest.warns(EngineWarning, match="changed since they were compiled, so it runs eager"):
        assert_right(prepared, one)
    assert prepared.explain().rows[0].runs == "eager"
    with no_warning():
        again = prepared.prepare("openvino", example=PIXELS)
        assert_right(again, one)
    assert again.explain().rows[0].runs == "openvino"


def test_hooks_training_and_gradients_run_eager(one: Pair) -> None:
    backbone = one.ours.prepare("openvino", example=PIXELS)
    with pytest.warns(EngineWarning, match="a gradient is needed"):
        backbone(PIXELS).feature_maps[-1].sum().backward()
    assert all(p.grad is not None for p in backbone.parameters())
    seen: list[int] = []
    layer = backbone.embedder.embedder.convolution
    handle = layer.register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(EngineWarning, match="layers have hooks"):
        assert_right(backbone, one)
    handle.remove()
    assert seen == [1]
    with no_warning():
        assert_right(backbone, one)
    n_seen = len(explained(backbone).rows)
    backbone.train()
    with torch.no_grad():
        backbone(PIXELS)
    notes = [row.why for row in explained(backbone).rows[n_seen:]]
    assert any("in training mode" in note for note in notes)


def test_refresh_after_a_write_that_torch_does_not_record(one: Pair) -> None:
    backbone = one.ours.prepare("openvino", example=PIXELS)
    for model in (backbone, one.upstream):
        model.embedder.embedder.convolution.weight.data.mul_(2)
    backbone.refresh()
    with pytest.warns(EngineWarning, match="changed since they were compiled, so it runs eager"):
        assert_right(backbone, one)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_convert_for_themselves(copied: Callable[[Any], Any], one: Pair) -> None:
    backbone = one.ours.prepare("openvino", example=PIXELS)
    other = copied(backbone)
    scale_(backbone)
    with no_warning():
        assert_right(other, one)
    assert only_row(other).runs == "openvino"


def test_another_activation_is_another_model(one: Pair) -> None:
    """Weights and configuration are the same; the file of the first must not serve the second."""
    one.ours.prepare("openvino", example=PIXELS)
    for model in (one.ours, one.upstream):
        model.embedder.embedder.activation = torch.nn.Tanh().eval()
    with no_warning():
        backbone = one.ours.prepare("openvino", example=PIXELS)
        assert_right(backbone, one)
    assert explained(backbone).rows[0].runs == "openvino"


def test_a_model_whose_batch_cannot_vary_is_converted_for_its_own(
    one: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = torch.export.export

    def fixed(module: Any, args: Any, dynamic_shapes: Any = None) -> Any:
        if dynamic_shapes is not None:
            raise RuntimeError("the batch is a number in it")
        return export(module, args)

    monkeypatch.setattr(torch.export, "export", fixed)
    backbone = one.ours.prepare("openvino", example=(2, 64, 64))
    with no_warning():
        assert_right(backbone, one, PIXELS, images(64, 64, 1), images(64, 64, 5))
    assert {row.runs for row in explained(backbone).rows} == {"openvino, 2 images at once"}
    backbone = one.ours.prepare("openvino", example=(3, 64, 64))  # not by the model for two
    with no_warning():
        assert_right(backbone, one, images(64, 64, 3))
    assert only_row(backbone).runs == "openvino, 3 images at once"
    assert not [row for row in explained(backbone).rows if row.what == "cache"]


@torch.no_grad()
def test_accelerate_runs_whole_backbones(tmp_path: Path) -> None:
    model = hf_resnet(depths=(1, 1), hidden_sizes=[16, 32], out_indices=[0, 1, 2])
    want = model(PIXELS).feature_maps
    accelerate(model, mode="openvino")
    with no_warning():
        for _ in range(2):  # the first call compares
            assert_equals_upstream(model(PIXELS).feature_maps, want, REL)
    assert any((tmp_path / "fastbb" / "openvino").iterdir())


# when it is chosen


def auto(pair: Pair, tmp_path: Path, device: Device, **options: Any) -> Any:
    tools = device.tools(tmp_path, machine=Machine.of(torch.device("cpu")))
    return prepare(pair.ours, "auto", tools=tools, **options)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """A device on which OpenVINO takes a tenth of eager's time, and compiling never pays."""
    device = Device()
    maps = openvino.openvino_maps

    def timed(*arguments: Any) -> openvino.Converted:
        found = maps(*arguments)
        return found._replace(run=lambda x: (found.run(x), device.say(0.1))[0])

    monkeypatch.setattr("fastbb.engine.ways.openvino_maps", timed)
    compiling_takes(monkeypatch, 1e9)
    return device


def test_auto_measures_it_where_its_own_seconds_pay(
    one: Pair, tmp_path: Path, device: Device
) -> None:
    with no_warning():
        backbone = auto(one, tmp_path, device, expected_images=1000)
        assert_right(backbone, one)
    row = only_row(backbone)
    assert (row.runs, row.time) == ("openvino", "100 ms") and row.others == "eager: 1 s"
    cache = ResultCache(Machine.of(torch.device("cpu")), tmp_path)
    (seconds,) = cache.items("openvino_s").values()
    assert 0 < seconds < 600 and not cache.items("compile_s")
    (key,) = cache.items("openvino_s")
    cache.put("openvino_s", key, 7.0)
    assert_right(auto(one, tmp_path, device, expected_images=1000), one)
    cache = ResultCache(Machine.of(torch.device("cpu")), tmp_path)
    assert cache.items("openvino_s") == {key: 7.0}  # it was found converted


def test_what_lost_does_not_stay_in_memory(
    one: Pair, tmp_path: Path, device: Device, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Converting takes more than the time for measuring, and compiling is tried all the same."""
    compiling_takes(monkeypatch, 1.0)
    monkeypatch.setattr(openvino, "openvino_version", lambda: "2026.4")
    monkeypatch.setattr("fastbb.engine.choose.openvino_version", lambda: "2026.4")
    maps = ways.openvino_maps

    def slow(*arguments: Any) -> openvino.Converted:
        found = maps(*arguments)
        device_run, calls = found.run, []

        def run(pixels: Any) -> Any:
            result = device_run(pixels)
            calls.append(1)
            device.say(100.0 if len(calls) == 1 else 0.1)
            return result

        return found._replace(run=run)

    monkeypatch.setattr(ways, "openvino_maps", slow)
    backbone = auto(one, tmp_path, device, expected_images=MANY)
    assert_right(backbone, one)
    row = only_row(backbone)
    assert row.runs == "openvino" and "compile: " in row.others and "not tried" not in row.others
    made = backbone._engine.chooser.ways
    assert made.has_artefact("openvino") and not made.has_artefact("compile")


@pytest.mark.parametrize(
    ("expected", "why"),
    [
        (None, "converting takes seconds: say expected_images=, or mode='openvino'"),
        (3, "converting for OpenVINO takes about 6 s and would save about 600 ms on 3 images"),
    ],
)
def test_auto_does_not_convert_for_few_images(
    expected: int | None, why: str, one: Pair, tmp_path: Path, device: Device
) -> None:
    backbone = auto(one, tmp_path, device, expected_images=expected)
    with no_warning():
        assert_right(backbone, one)
    row = only_row(backbone)
    assert row.runs == "eager" and why in row.why


def test_a_measured_choice_is_remembered_for_its_version_only(
    one: Pair, tmp_path: Path, device: Device, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiling_takes(monkeypatch, 1.0)
    for version, is_known in (("2026.4", False), ("2026.4", True), ("2027.0", False)):
        monkeypatch.setattr(openvino, "openvino_version", lambda version=version: version)
        monkeypatch.setattr("fastbb.engine.choose.openvino_version", openvino.openvino_version)
        device.n_timed = 0
        backbone = auto(one, tmp_path, device, expected_images=MANY)
        assert_right(backbone, one)
        assert only_row(backbone).runs == "openvino"
        assert (device.n_timed == 0) == is_known


def test_fastbb_does_not_import_it_before_it_runs() -> None:
    code = (
        "import sys, torch, fastbb\n"
        "from fastbb import ResNetBackbone, ResNetConfig\n"
        "config = ResNetConfig(depths=(1,), hidden_sizes=(8,), out_indices=(1,))\n"
        "with torch.no_grad():\n"
        "    ResNetBackbone(config).eval().prepare(expected_images=1)(torch.ones(1, 3, 32, 32))\n"
        "assert 'openvino' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mode='openvino' needs a CPU, the backbone is on cuda"):
        Settings("openvino").check_device(torch.device("cuda", 0), "backbone")


def test_loading_by_name_needs_no_more_than_the_mode() -> None:
    backbone = AutoBackbone.from_pretrained("nano-resnet-digits").prepare("openvino")
    with torch.no_grad(), no_warning():
        backbone(PIXELS)
    assert only_row(backbone).runs == "openvino"
