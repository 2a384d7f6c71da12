"""Ways to run a backbone: each computes upstream's maps; worker processes answer or say why not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from openvino_settings import recorded_settings
from safetensors.torch import load_file

from fastbb import AutoBackbone, ResNetConfig, SwinConfig
from fastbb.backbone.registry import family_of
from fastbb.bench.backbones import BackboneSubject
from fastbb.bench.processes import Worker, WorkerError
from fastbb.bench.subject import Truth, WaySpec
from fastbb.bench.ways import check_installed, make_runner
from fastbb.inspect.upstream import run_upstream, upstream_of
from fastbb.inspect.verify import random_images

STAGES = ["stage1", "stage2", "stage3", "stage4"]
SWIN = SwinConfig(
    embed_dim=16, depths=(2, 1, 1, 2), num_heads=(1, 2, 4, 8), window_size=2, out_features=STAGES
)
RESNET = ResNetConfig(depths=(1, 1, 1, 1), out_features=STAGES)
BASIC = ResNetConfig(
    layer_type="basic",
    hidden_sizes=(64, 128, 256, 512),
    depths=(1, 2, 1, 1),
    out_features=["stage2", "stage4"],
)
CPU = torch.device("cpu")


def saved(config: Any, folder: Path) -> str:
    AutoBackbone.from_config(config).save_pretrained(folder)
    return str(folder)


def subject(config: Any, tmp_path: Path, **options: Any) -> BackboneSubject:
    name = saved(config, tmp_path / "saved")
    options = {"size": (64, 64), "modes": ("eager",), **options}
    return BackboneSubject(name, tmp_path / "files", device=CPU, random_weights=True, **options)


def judged(one: BackboneSubject, spec: WaySpec, truth: Truth) -> Any:
    runner = make_runner(spec.spec)
    with torch.no_grad():
        runner.load()
        runner.start()
        batch = len(runner.pixels)
        return truth.judge(runner.outputs(runner.run()), batch, one.skipped(spec.name))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("config", [SWIN, RESNET], ids=["swin", "resnet"])
def test_every_way_computes_upstreams_maps(config: Any, precision: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    one = subject(config, tmp_path, against=("timm", "onnxruntime"))
    specs = one.ways(precision, 9, tmp_path / "cell")
    names = [spec.name for spec in specs]
    assert names == ["transformers eager", "timm eager", "ONNX Runtime", "fastbb eager"]
    truth = one.truth(precision, 9)
    assert set(truth.exact) == set(STAGES) and len(truth.exact["stage1"]) == 7
    for spec in specs:
        if spec.name == "ONNX Runtime" and precision != "fp32":
            assert spec.reason == "its CPU kernels have no bf16"
            continue
        result = judged(one, spec, truth)
        assert result.wrong is None and 0 <= result.error <= result.allowed, spec.name
        compared = {"stage1", "stage2", "stage3", "stage4"} - set(one.skipped(spec.name))
        assert set(result.errors) == compared


@pytest.mark.parametrize("change", ["bias", "stage", "nan", "shape", "missing"])
def test_a_wrong_result_is_found(change: str, tmp_path: Path) -> None:
    one = subject(RESNET, tmp_path)
    truth = one.truth("fp32", 3)
    got = {name: exact.float() for name, exact in truth.exact.items()}
    assert truth.judge(got, 3).wrong is None
    if change == "bias":
        got["stage3"] = got["stage3"] * (1 + 3e-5)
    elif change == "stage":
        got["stage1"], got["stage2"] = got["stage2"], got["stage1"]
    elif change == "nan":
        got["stage4"][-1, 0, 0, 0] = float("nan")
    elif change == "shape":
        got["stage4"] = got["stage4"][:2]
    else:
        del got["stage2"]
    assert truth.judge(got, 3).wrong is not None
    skipped = {"stage1": "a reason", "stage2": "another", "stage3": "", "stage4": ""}
    left = truth.judge(got, 3, skipped)
    assert left.wrong is None and left.error is None and "a reason" in left.note


def test_every_image_of_a_batch_is_checked() -> None:
    exact = torch.arange(7.0).double().reshape(7, 1)
    truth = Truth({"a": exact.float()}, {"a": exact}, 1e-5)
    batch = torch.tensor([[float(row % 7)] for row in range(16)])
    assert truth.judge({"a": batch}, 16).wrong is None
    for row in range(16):
        changed = batch.clone()
        changed[row] += 1
        assert truth.judge({"a": changed}, 16).wrong is not None
    for wrong in (batch.roll(8, 0), batch[:15], batch[:7], batch.flip(0)):
        assert truth.judge({"a": wrong}, 16).wrong is not None
    assert truth.judge({"a": batch[:5]}, 5).wrong is not None  # has the shape of other images


def test_a_number_is_compared_whatever_the_batch() -> None:
    truth = Truth({"loss": torch.tensor(2.0)}, {"loss": torch.tensor(2.0).double()}, 1e-5)
    assert truth.judge({"loss": torch.tensor(2.0)}, 16).wrong is None
    assert truth.judge({"loss": torch.tensor(2.1)}, 16).wrong is not None


@pytest.mark.parametrize("size", [(64, 64), (64, 128), (128, 128)])
@pytest.mark.parametrize("config", [SWIN, RESNET, BASIC], ids=["swin", "resnet", "basic"])
def test_timm_has_the_same_weights(config: Any, size: tuple[int, int]) -> None:
    pytest.importorskip("transformers")
    backbone = AutoBackbone.from_config(config).eval()
    for norm in (m for m in backbone.modules() if "Norm" in type(m).__name__):
        torch.nn.init.normal_(norm.weight, 1.0, 0.2)  # type: ignore[arg-type]
    pixels = random_images(backbone, size, 2).double()
    find = family_of(config.model_type)[0].timm_upstream
    assert find is not None
    timm, (upstream, _) = find(backbone, size), upstream_of(backbone)
    wanted = run_upstream(upstream, pixels)
    compared = 0
    for stage, got, want in zip(config.out_features, run_upstream(timm, pixels), wanted):
        assert got.shape == want.shape
        difference = (got - want).abs().max() / want.abs().max()
        assert (difference > 1e-3) if stage in timm.other_maps else (difference < 1e-12)
        compared += stage not in timm.other_maps
    assert compared >= len(config.out_features) - 1


@pytest.mark.parametrize(
    ("config", "size", "reason"),
    [
        (SWIN, (72, 72), "multiple of 64x64"),
        (SwinConfig(hidden_act="relu"), (224, 224), "activation"),
        (SwinConfig(out_indices=[0, 1]), (224, 224), "stem"),
        (ResNetConfig(out_indices=[0]), (64, 64), "stem"),
        (ResNetConfig(downsample_in_bottleneck=True), (64, 64), "strides"),
        (ResNetConfig(embedding_size=32), (64, 64), "widths"),
    ],
)
def test_timm_that_has_no_such_model_says_so(config: Any, size: Any, reason: str) -> None:
    backbone = AutoBackbone.from_config(config)
    find = family_of(config.model_type)[0].timm_upstream
    assert find is not None
    with pytest.raises(ValueError, match=reason):
        find(backbone, size)


def test_another_library_without_the_model_is_a_reason(tmp_path: Path) -> None:
    one = BackboneSubject(
        "resnet18",
        tmp_path,
        device=CPU,
        size=(32, 32),
        random_weights=True,
        against=("timm", "transformers"),
    )
    specs = {spec.name: spec for spec in one.ways("fp32", 1, tmp_path / "cell")}
    assert list(specs) == ["timm eager", "transformers eager", "fastbb auto"]
    assert judged(one, specs["timm eager"], one.truth("fp32", 1)).wrong is None
    assert specs["transformers eager"].reason == "transformers has no model for these weights"
    assert judged(one, specs["fastbb auto"], one.truth("fp32", 1)).wrong is None


def test_timm_is_measured_as_timm_builds_it(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    options: dict[str, Any] = {"device": CPU, "size": (32, 32), "random_weights": True}
    one = BackboneSubject("regnetx_002", folder, out_indices=[1, 3], **options)
    spec = one.ways("fp32", 2, tmp_path / "cell")[0]
    assert spec.name == "timm eager" and judged(one, spec, one.truth("fp32", 2)).wrong is None
    runner = make_runner(spec.spec)
    runner.load()
    measured = sum(p.numel() for p in runner.model.parameters())
    import timm

    theirs = timm.create_model("regnetx_002", features_only=True, out_indices=(1, 3))
    assert measured == sum(p.numel() for p in theirs.parameters()) == one.params


def test_no_way_is_timed_of_which_no_map_can_be_compared(tmp_path: Path) -> None:
    config = SwinConfig(
        embed_dim=16, depths=(1, 2), num_heads=(1, 2), window_size=4, out_features=["stage2"]
    )
    one = subject(config, tmp_path, size=(32, 64), against=("timm",))
    reasons = {spec.name: spec.reason for spec in one.ways("fp32", 1, tmp_path / "cell")}
    assert "no map can be compared" in str(reasons["timm eager"])


def test_software_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    check_installed(["timm", "compile"])
    monkeypatch.setattr("fastbb.bench.ways.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--against openvino: openvino .*fastbb\[bench\]"):
        check_installed(["compile", "openvino"])


def test_openvino_has_the_threads_of_torch_and_pins_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = recorded_settings(monkeypatch)
    one = subject(RESNET, tmp_path, against=("openvino",))
    (spec,) = (s for s in one.ways("fp32", 1, tmp_path / "cell") if "OpenVINO" in s.name)
    runner = make_runner(spec.spec)
    with torch.no_grad():
        runner.load()
        runner.start()
    (settings,) = seen
    assert settings["INFERENCE_NUM_THREADS"] == torch.get_num_threads()
    assert settings["ENABLE_CPU_PINNING"] is False


def test_a_size_that_the_model_does_not_take_is_known_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pixel_values"):
        BackboneSubject(
            "vit_tiny_patch16_224", tmp_path, device=CPU, size=(225, 225), random_weights=True
        )


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Any:
    one = Worker(tmp_path_factory.mktemp("worker"))
    yield one
    one.close()


def test_a_process_runs_a_way(tmp_path: Path, worker: Worker) -> None:
    one = subject(RESNET, tmp_path)
    spec = one.ways("fp32", 2, tmp_path / "cell")[-1]
    outputs = tmp_path / "outputs.safetensors"
    with pytest.raises(WorkerError, match="FileNotFoundError|OSError") as wrong:
        worker.start({**spec.spec, "model": str(tmp_path / "gone")})
    assert wrong.value.kind == "error"
    started = worker.start({**spec.spec, "outputs": str(outputs)}, timeout_s=120)
    assert started["import_s"] > 0 and started["load_s"] > 0 and started["start_s"] > 0
    truth = one.truth("fp32", 2)
    assert truth.judge(load_file(outputs), 2).wrong is None
    outputs.unlink()
    assert worker.ask("warm", max_s=0.1, outputs=str(outputs))["seconds"]
    assert truth.judge(load_file(outputs), 2).wrong is None
    turn = worker.ask("turn", seconds=0.05)
    assert sum(turn["seconds"]) >= 0.05 and turn["inside"] is None
    assert 1e6 < turn["peak_bytes"] < 1e9


def test_a_process_that_dies_or_hangs_is_an_error(tmp_path: Path) -> None:
    one = Worker(tmp_path / "one")
    try:
        with pytest.raises(WorkerError, match="longer than 0 s") as late:
            one.ask("warm", timeout_s=0.01, max_s=1)
        assert late.value.kind == "timeout"
        os.kill(one._process.pid, signal.SIGKILL)
        with pytest.raises(WorkerError, match="SIGKILL") as died:
            one.ask("warm", max_s=1)
            one.ask("warm", max_s=1)
        assert died.value.kind == "memory"
    finally:
        one.close()


def test_a_worker_ends_with_the_process_that_asked(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from fastbb.bench.processes import Worker; "
        "w = Worker(Path(sys.argv[1])); print(w._process.pid, flush=True); w.ask('nothing')"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "one")]
    asker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert asker.stdout is not None
    pid = int(asker.stdout.readline())
    asker.kill()
    asker.wait()
    for _ in range(300):
        if not Path(f"/proc/{pid}/stat").exists() or " Z " in Path(f"/proc/{pid}/stat").read_text():
            return
        time.sleep(0.1)
    raise AssertionError("the worker still runs")


def test_files_of_the_working_directory_are_no_libraries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "queue.py").write_text("raise RuntimeError('not this one')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    one = Worker(tmp_path / "one")
    try:
        with pytest.raises(WorkerError, match="AttributeError"):
            one.ask("nothing")
    finally:
        one.close()


def test_a_worker_goes_on_after_a_wrong_command(worker: Worker) -> None:
    with pytest.raises(WorkerError, match="AttributeError"):
        worker.ask("nothing")
    assert worker.ask("warm", max_s=0.0)["seconds"]
