"""What OpenVINO does to a process: telemetry, logging, forks, inference mode, compiled models."""

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_rig import PIXELS, assert_right, resnet_pair
from pretended_device import explained, no_warning, only_row
from reference_models import Pair, images

from fastbb.engine import openvino
from fastbb.engine.settings import EngineWarning

library: Any = pytest.importorskip("openvino")


def test_nothing_is_reported_to_intel(tmp_path: Path) -> None:
    code = (
        "import sys, torch\n"
        "from fastbb import ResNetBackbone, ResNetConfig\n"
        "config = ResNetConfig(depths=(1,), hidden_sizes=(8,), out_indices=(1,))\n"
        "backbone = ResNetBackbone(config).eval().prepare('openvino', example=(1, 32, 32))\n"
        "assert backbone.explain().rows[0].runs == 'openvino', backbone.explain()\n"
        "assert 'openvino' in sys.modules and 'openvino_telemetry' not in sys.modules\n"
    )
    env = {key: value for key, value in os.environ.items() if key not in ("CI", "TF_BUILD")}
    env |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
    assert not (tmp_path / "intel").exists()


@pytest.mark.parametrize("fails", [False, True])
def test_logging_stays_as_it_was(
    fails: bool, pair: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root, own = logging.getLogger(), logging.getLogger("fastbb")

    def state() -> tuple[Any, ...]:
        return root.level, root.filters[:], root.handlers[:], own.level

    convert = library.convert_model

    def converting(program: Any) -> Any:
        root.setLevel("ERROR")
        root.addFilter(lambda record: False)
        root.addHandler(logging.NullHandler())
        logging.getLogger("fastbb.engine.compile_cost").warning("it goes on")
        if fails:
            raise RuntimeError("no such layer")
        return convert(program)

    monkeypatch.setattr(library, "convert_model", converting)
    root.setLevel("WARNING")
    before = state()
    backbone = pair.ours.prepare("openvino")
    if fails:
        with pytest.warns(EngineWarning, match="no such layer"):
            assert_right(backbone, pair)
    else:
        with no_warning():
            assert_right(backbone, pair)
    assert state() == before and "it goes on" in caplog.messages


def test_a_forked_process_runs_eager(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenVINO would wait for threads that a forked process does not have."""
    backbone = pair.ours.prepare("openvino", example=PIXELS)
    monkeypatch.setattr(openvino, "_process", os.getpid() + 1)
    with pytest.warns(EngineWarning, match="in the process that forked this one"):
        assert_right(backbone, pair)
    assert only_row(backbone).runs == "eager"
    with pytest.warns(EngineWarning, match="in the process that forked this one"):
        pair.ours.prepare("openvino", example=PIXELS)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_is_converted_inside_inference_mode(precision: Any, pair: Pair) -> None:
    if precision == "bf16" and not openvino.has_arithmetic(torch.bfloat16):
        pytest.skip("this CPU has no bf16 arithmetic")
    backbone = pair.ours.prepare("openvino", precision)
    with no_warning(), torch.inference_mode():
        backbone(PIXELS)
    assert only_row(backbone).runs == "openvino"


def test_maps_are_on_the_cpu_whatever_the_default_device(pair: Pair) -> None:
    backbone = pair.ours.prepare("openvino", example=PIXELS)
    with torch.no_grad(), torch.device("meta"):
        maps = backbone(PIXELS).feature_maps
    assert {x.device.type for x in maps} == {"cpu"}
    assert only_row(backbone).runs == "openvino"


def test_it_is_compiled_for_the_first_batch_and_once_for_all_others(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[str] = []

    class Core(library.Core):
        def compile_model(self, model: Any, *args: Any) -> Any:
            shapes.append(str(model.input(0).partial_shape))
            return super().compile_model(model, *args)

    monkeypatch.setattr(library, "Core", Core)
    backbone = pair.ours.prepare("openvino", example=(3, 64, 64))
    assert_right(backbone, pair, images(64, 64, 3))
    assert shapes == ["[3,3,64,64]"]
    failed: list[BaseException] = []

    def work(n: int) -> None:
        try:
            assert_right(backbone, pair, images(64, 64, n))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in (1, 2, 5, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and len(shapes) == 2 and shapes[1].endswith(",3,64,64]")
    assert_right(backbone, pair, images(64, 64, 3))
    assert {row.runs for row in explained(backbone).rows} == {"openvino"} and len(shapes) == 2


@pytest.fixture(scope="module")
def pair() -> Pair:
    return resnet_pair()
