"""The mode of a run is chosen once, recorded in the plan, and used again by a resumed run."""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from pretended_device import baked, compiling_takes
from torch import Tensor

from fastbb.backbone.base import Backbone
from fastbb.cli import main
from fastbb.engine import ways
from fastbb.engine.engine import Engine
from fastbb.engine.trial import Run
from fastbb.extraction import FeatureExtractor, PlanMismatchError, Report, extract, open_features
from fastbb.extraction.store import FeatureWriter


@pytest.fixture
def compiled_for(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Replaces the compiler, and hides OpenVINO; returns the shapes that are compiled."""
    monkeypatch.setattr("fastbb.engine.openvino.openvino_version", lambda: None)
    shapes: list[tuple[int, ...]] = []

    def compile_maps(backbone: Backbone, example: Tensor, impl: str) -> Run:
        shapes.append(tuple(example.shape))
        return baked(backbone)

    monkeypatch.setattr(ways, "compile_maps", compile_maps)
    return shapes


def test_few_images_run_eager(
    run: Callable[..., Report], tmp_path: Path, compiled_for: list[tuple[int, ...]]
) -> None:
    assert run().ok == 9
    features = open_features(tmp_path / "out")
    assert (features.plan["mode"], features.plan["runs"]) == ("auto", "eager")
    assert "fp32 on cpu (eager)" in features.describe() and not compiled_for


def test_a_resumed_run_takes_the_mode_that_auto_chose(
    run: Callable[..., Report],
    model: Path,
    images: Path,
    tmp_path: Path,
    compiled_for: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run(tmp_path / "whole", mode="compile")
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "mode_for", lambda self, pixels: "compile")
        patch.setattr(FeatureWriter, "commit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run()
        assert open_features(tmp_path / "out").plan["runs"] == "compile"
    compiled_for.clear()
    monkeypatch.setattr(Engine, "mode_for", None)  # nobody may choose again
    assert run().ok == 9
    assert compiled_for == [(3, 3, 32, 32)]
    whole, resumed = open_features(tmp_path / "whole"), open_features(tmp_path / "out")
    assert torch.equal(whole["embedding"], resumed["embedding"])


def interrupted(*args: object) -> None:
    raise KeyboardInterrupt


def test_many_images_choose_the_mode_by_measuring(
    model: Path,
    images: Path,
    compiled_for: list[tuple[int, ...]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiling_takes(monkeypatch, 0.0)  # compiling pays for any number
    ex = FeatureExtractor(model, batch_size=4)
    assert ex.choose_mode("auto", 100) in ("eager", "compile")
    assert compiled_for == [(4, 3, 32, 32)]
    row = ex.explain().rows[0]
    assert row.what == "4x32x32" and "the fastest that passed its check" in row.why


def test_images_of_many_shapes_run_eager(
    aspect_model: Path, images: Path, tmp_path: Path, compiled_for: list[tuple[int, ...]]
) -> None:
    extract(aspect_model, images, tmp_path / "out")
    assert open_features(tmp_path / "out").plan["runs"] == "eager" and not compiled_for


def test_a_resume_keeps_the_mode_and_says_so(
    run: Callable[..., Report], capsys: pytest.CaptureFixture[str]
) -> None:
    run()
    run(mode="compile")
    assert "mode stays auto, as at the first start, not compile" in capsys.readouterr().err


def test_a_resume_of_openvino_needs_its_version(
    run: Callable[..., Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(FeatureWriter, "commit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(mode="openvino")
    plan = open_features(tmp_path / "out").plan
    assert plan["runs"] == "openvino" and plan["versions"]["openvino"] == version("openvino")
    for here, said in ((None, "which is not installed here"), ("2027.0", "here is 2027.0")):
        with monkeypatch.context() as patch:
            patch.setattr("fastbb.extraction.plan.openvino_version", lambda here=here: here)
            with pytest.raises(PlanMismatchError, match=said) as error:
                run()
        assert f"pip install openvino=={version('openvino')}" in str(error.value)
    assert run().ok == 9
    run(tmp_path / "eager", mode="eager")
    assert "openvino" not in open_features(tmp_path / "eager").plan["versions"]
    got, want = (open_features(tmp_path / name)["embedding"] for name in ("out", "eager"))
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_a_resume_where_openvino_cannot_run_ends_with_3(
    run: Callable[..., Report], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library: Any = pytest.importorskip("openvino")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(FeatureWriter, "commit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(mode="openvino")

    def get_property(*_: object) -> None:
        raise RuntimeError("no plug-in")

    monkeypatch.setattr(
        library, "Core", type("Core", (library.Core,), {"get_property": get_property})
    )
    result = CliRunner().invoke(main, ["extract", str(images), "--out", str(tmp_path / "out")])
    assert result.exit_code == 3, result.output
    assert "its plug-in for CPUs is missing" in result.output
    assert open_features(tmp_path / "out").plan["runs"] == "openvino"


@pytest.mark.parametrize(
    ("mode", "message"),
    [("triton", "needs a CUDA or ROCm device"), ("fast", "is not one of 'auto', 'eager'")],
)
def test_an_impossible_mode_is_refused(
    mode: str, message: str, model: Path, images: Path, tmp_path: Path
) -> None:
    arguments = ["extract", str(images), "--out", str(tmp_path / "out"), "--model", str(model)]
    result = CliRunner().invoke(main, [*arguments, "--mode", mode, "--device", "cpu"])
    assert result.exit_code == 2 and message in result.output, result.output
    assert not (tmp_path / "out" / "plan.json").exists()
    with pytest.raises(ValueError, match="mode"):
        FeatureExtractor(model, mode=mode, device="cpu")
