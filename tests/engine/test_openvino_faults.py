"""Faults of OpenVINO and of the files of converted models: eager runs, and a warning says why."""

import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_rig import PIXELS, assert_right, resnet_pair
from pretended_device import Compiler, explained, install, no_warning, only_row
from reference_models import Pair, images

from fastbb.engine import openvino
from fastbb.engine.computation import BackboneMaps
from fastbb.engine.model_files import _digests
from fastbb.engine.settings import EngineWarning

library: Any = pytest.importorskip("openvino")
CORE = library.Core
LONG = (
    "Exception from src/core.cpp:12:\n\n Exception from src/plugin.cpp:3:\n"
    "Check 'is_known(layer)' failed at src/layer.cpp:7:\nno such layer\nmore"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "fastbb" / "openvino"


def raises(error: Exception) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise error

    return call


def core_with(**methods: Any) -> type:
    return type("Core", (CORE,), methods)


class Spoiled:
    """A compiled model whose requests fail, or compute something else."""

    def __init__(self, compiled: Any, spoil: Callable[[Any], None]) -> None:
        self._compiled, self._spoil = compiled, spoil

    def __getattr__(self, name: str) -> Any:
        return getattr(self._compiled, name)

    def create_infer_request(self) -> Any:
        request, spoil = self._compiled.create_infer_request(), self._spoil
        infer = request.infer

        class Request:
            def __getattr__(self, name: str) -> Any:
                return getattr(request, name)

            def infer(self) -> None:
                infer()
                spoil(request)

        return Request()


def spoiled(spoil: Callable[[Any], None]) -> type:
    def compile_model(self: Any, *args: Any) -> Any:
        return Spoiled(CORE.compile_model(self, *args), spoil)

    return core_with(compile_model=compile_model)


def wrong(request: Any) -> None:
    request.get_output_tensor(1).data[0, 0, 0, 0] += 1


class InHalf(Spoiled):
    """A compiled model that says that it computes in fp16."""

    def get_property(self, name: str) -> Any:
        return library.Type.f16


def in_half(self: Any, *args: Any) -> Any:
    return InHalf(CORE.compile_model(self, *args), lambda request: None)


class Unconverted(Exception):
    """As OpenVINO's `OpConversionFailure`, which is no RuntimeError."""


FAULTS: dict[str, tuple[str, Any, str]] = {
    "conversion": ("convert_model", raises(RuntimeError(LONG)), "OpenVINO: no such layer"),
    "compile": (
        "Core",
        core_with(compile_model=raises(RuntimeError(LONG))),
        "OpenVINO: no such layer",
    ),
    "plug-in": (
        "Core",
        core_with(get_property=raises(RuntimeError(LONG))),
        "its plug-in for CPUs is missing",
    ),
    "operation": ("convert_model", raises(Unconverted(LONG)), "OpenVINO: no such layer"),
    "silent": ("convert_model", raises(RuntimeError()), "OpenVINO: RuntimeError"),
    "call": ("Core", spoiled(raises(RuntimeError(LONG))), "OpenVINO: no such layer"),
    "memory": ("convert_model", raises(MemoryError()), "out of memory"),
    "wrong": ("Core", spoiled(wrong), "map 1 is wrong: error"),
    "precision": (
        "Core",
        core_with(compile_model=in_half),
        "computes in f16 on this CPU",
    ),
}


def assert_eager_runs(pair: Pair, problem: str) -> None:
    with pytest.warns(EngineWarning, match=f"openvino is off, eager runs: .*{problem}") as warned:
        backbone = pair.ours.prepare("openvino", example=PIXELS)
    assert len(warned) == 1
    with no_warning():
        assert_right(backbone, pair)
    row = explained(backbone).rows[0]
    assert (row.runs, row.why) == ("eager", "openvino failed") and problem in row.others


@pytest.mark.parametrize("fault", FAULTS)
def test_eager_runs_instead(fault: str, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    name, broken, problem = FAULTS[fault]
    monkeypatch.setattr(library, name, broken)
    assert_eager_runs(pair, problem)


def test_an_export_that_fails_is_off(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.export, "export", raises(ValueError("not traced")))
    assert_eager_runs(pair, "ValueError: not traced")


def test_a_call_that_fails_later_is_replaced_by_eager(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken: list[int] = []

    def fail(request: Any) -> None:
        if broken:
            raise RuntimeError(LONG)

    monkeypatch.setattr(library, "Core", spoiled(fail))
    backbone = pair.ours.prepare("openvino", example=PIXELS)
    broken.append(1)
    with pytest.warns(EngineWarning, match="openvino failed, eager runs: .*no such layer"):
        assert_right(backbone, pair)
    with no_warning():
        assert_right(backbone, pair)


def test_without_the_package_a_sentence_says_how_to_get_it(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("openvino", "choose"):
        monkeypatch.setattr(f"fastbb.engine.{module}.openvino_version", lambda: None)
    install(Compiler(), monkeypatch)
    missing = r"OpenVINO is not installed: pip install 'fastbb[openvino]'"
    with pytest.warns(EngineWarning, match=r"openvino is off, eager runs: .*'fastbb\[openvino\]'"):
        backbone = pair.ours.prepare("openvino", example=PIXELS)
    assert missing in only_row(backbone).others
    with no_warning():
        for expected in (None, 10, 10**9, 10**9):  # measured, then remembered
            backbone = pair.ours.prepare(example=PIXELS, expected_images=expected)
            assert f"{missing}, which may be faster" in only_row(backbone).why
        low = pair.ours.prepare(precision="fp16", example=PIXELS)
    assert not any("OpenVINO" in row.why for row in explained(low).rows)  # it would not run that


def test_a_broken_installation_is_off(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert_eager_runs(pair, "ModuleNotFoundError: import of openvino halted")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    pair = resnet_pair()
    backbone = pair.ours.to(dtype).prepare("openvino")
    name = str(dtype).removeprefix("torch.")
    with pytest.warns(EngineWarning, match=f"float32 and bfloat16 here, the weights are {name}"):
        assert torch.no_grad()(backbone)(PIXELS).feature_maps[0].dtype == dtype


def test_bf16_is_refused_by_a_cpu_without_it(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("openvino", "ways"):
        name = f"fastbb.engine.{module}.has_arithmetic"
        monkeypatch.setattr(name, lambda dtype: dtype.itemsize > 2)
    with pytest.warns(EngineWarning, match="this CPU has no bfloat16 arithmetic"):
        backbone = pair.ours.prepare("openvino", "bf16", example=PIXELS)
    assert only_row(backbone).runs == "eager, in fp32"


# files


def prepared(pair: Pair) -> Any:
    with no_warning():
        backbone = pair.ours.prepare("openvino", example=PIXELS)
        assert_right(backbone, pair, PIXELS, images(64, 64, 3))
    assert explained(backbone).rows[0].runs == "openvino"
    return backbone


def notes(backbone: Any) -> list[str]:
    return [row.why for row in explained(backbone).rows if row.what == "cache"]


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    made: list[int] = []
    convert = library.convert_model
    monkeypatch.setattr(library, "convert_model", lambda x: (made.append(1), convert(x))[1])
    return made


def test_a_later_process_finds_the_model(pair: Pair, conversions: list[int]) -> None:
    assert not notes(prepared(pair)) and not notes(prepared(pair))
    assert len(conversions) == 1


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def changed(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def digest_of_nonsense(file: Path) -> None:
    """Files as they were written, which OpenVINO cannot read."""
    file.write_text("nonsense")
    (file.parent / "sha256.json").write_text(json.dumps(_digests(file.parent)))


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("model.bin", cut),
        ("model.bin", changed),
        ("model.bin", Path.unlink),
        ("model.xml", cut),
        ("model.xml", digest_of_nonsense),
        ("sha256.json", cut),
        ("sha256.json", Path.unlink),
    ],
)
def test_a_broken_file_is_told_and_replaced(
    name: str, spoil: Callable[[Path], None], pair: Pair, folder: Path, conversions: list[int]
) -> None:
    prepared(pair)
    (entry,) = folder.iterdir()
    spoil(entry / name)
    (note,) = notes(prepared(pair))
    assert f"converted anew, {entry} is broken" in note
    assert not notes(prepared(pair)) and len(conversions) == 2


def test_a_folder_that_cannot_be_written_costs_a_note(
    pair: Pair, tmp_path: Path, folder: Path
) -> None:
    (tmp_path / "fastbb").mkdir()
    folder.write_text("a file in its place")
    (note,) = [note for note in notes(prepared(pair)) if "results are not kept" not in note]
    assert note == f"not kept in {folder}: File exists"


def test_a_full_disk_costs_a_note(
    pair: Pair, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "save_model", raises(RuntimeError("Can't write")))
    (note,) = notes(prepared(pair))
    assert note == f"not kept in {folder}: Can't write" and not list(folder.iterdir())


def test_several_at_once_write_one_model(folder: Path) -> None:
    pairs = [resnet_pair() for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        for backbone in pool.map(prepared, pairs):
            assert not notes(backbone)
    assert len(list(folder.iterdir())) == 1


def test_the_key_depends_on_all_that_decides_the_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = resnet_pair()
    prepared(pair)
    pair.ours.prepare("openvino", example=(1, 32, 32))
    pair.ours.prepare("openvino", "bf16", example=(1, 64, 64))
    with torch.no_grad():
        next(pair.ours.parameters()).mul_(2)
    pair.ours.prepare("openvino", example=(1, 64, 64))
    n_models = 3 + openvino.has_arithmetic(torch.bfloat16)
    assert len(list(folder.iterdir())) == n_models
    pair.ours.prepare("openvino", example=(2, 64, 64))
    assert len(list(folder.iterdir())) == n_models  # one serves every batch
    pair.ours.out_features = pair.ours.out_features[:1]
    pair.ours.prepare("openvino", example=(1, 64, 64))
    assert len(list(folder.iterdir())) == n_models + 1
    monkeypatch.setattr(openvino, "openvino_version", lambda: "2027.0")
    pair.ours.prepare("openvino", example=(1, 64, 64))
    assert len(list(folder.iterdir())) == n_models + 2


def test_the_key_of_another_librarys_model_holds_the_versions(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = torch.nn.Conv2d(3, 4, 3).eval()
    host: Any = SimpleNamespace(module=layer, cache_key="host", outputs=())
    keys: dict[str, set[str]] = {"host": set(), "ours": set()}
    for version in ("1.0", "1.1", None):
        monkeypatch.setattr(
            openvino, "_version", lambda name, version=version: version if name == "timm" else "2"
        )
        keys["host"].add(openvino._key(host, PIXELS))
        keys["ours"].add(openvino._key(BackboneMaps(pair.ours), PIXELS))
    assert len(keys["host"]) == 3 and len(keys["ours"]) == 1


def test_a_wrong_model_that_was_kept_is_replaced(
    folder: Path, conversions: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = resnet_pair()
    prepared(pair)
    (entry,) = folder.iterdir()
    with torch.no_grad():
        for model in (pair.ours, pair.upstream):
            next(model.parameters()).mul_(2)
    # that of the weights before, under the key of the weights now
    monkeypatch.setattr(openvino, "_key", lambda *_: entry.name)
    (note,) = notes(prepared(pair))
    assert f"converted anew, {entry} is broken: map 0 is wrong" in note
    assert len(conversions) == 2 and not notes(prepared(pair)) and len(conversions) == 2


def test_a_model_that_vanishes_after_it_was_written_runs(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = core_with(read_model=raises(RuntimeError(LONG)))
    monkeypatch.setattr(library, "Core", broken)
    assert not notes(prepared(pair))
