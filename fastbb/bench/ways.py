"""Ways to run a backbone: the runners of worker processes, and which of them a model has."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..auto import AutoBackbone
from ..backbone.registry import Upstream, family_of
from ..engine.measuring import describe
from ..engine.openvino_library import openvino_library
from ..engine.prepare import explain
from ..engine.settings import torch_dtype
from ..inspect.upstream import upstream_of
from .subject import SkippedError

LIBRARIES = ("transformers", "timm", "torchvision")
# of the engines beside torch.compile, which run on a CPU
TITLES = {"openvino": "OpenVINO", "onnxruntime": "ONNX Runtime"}
_NEEDED = {"compile": (), "openvino": ("openvino",), "onnxruntime": ("onnxruntime", "onnxscript")}


def check_installed(against: Sequence[str]) -> None:
    """Raises a ValueError for software to compare with that is not installed."""
    for name in against:
        missing = [one for one in _NEEDED.get(name, (name,)) if not _has(one)]
        if missing:
            raise ValueError(
                f"--against {name}: {' and '.join(missing)} cannot be imported; "
                "pip install 'fastbb[bench]', or leave it out"
            )


def _has(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def engine_problem(engine: str, precision: str, device: torch.device) -> str | None:
    """Why an engine does not run a precision on a device, or None."""
    if engine in TITLES and device.type != "cpu":
        return f"is measured on a CPU only, this is {device}"
    if engine == "onnxruntime" and precision != "fp32":
        return f"its CPU kernels have no {precision}"
    return None


def library_of(upstream: Upstream) -> str:
    """Name of the library of an upstream model, as `--against` has it."""
    name = upstream.name.partition(" ")[0]
    return name if name in LIBRARIES else "plain PyTorch"


def other_upstream(backbone: Any, library: str, size: tuple[int, int]) -> Upstream:
    """The same model in a library that is not the backbone's own, with its weights.

    Raises:
        ValueError: the library has no such model.
    """
    family, _ = family_of(backbone.config.model_type)
    if library != "timm" or family.timm_upstream is None:
        raise ValueError(f"{library} has no model for these weights")
    return family.timm_upstream(backbone, size)


def make_runner(spec: Mapping[str, Any]) -> Any:
    """Makes the runner of a way of a backbone.

    Args:
        spec: "library" ("upstream", "timm" or "fastbb"), "engine" ("eager", "compile", one of
            `TITLES`, or of fastbb a mode of `prepare`), "model" (a directory), "precision",
            "device" and "pixels" (a safetensors file).
    """
    dtype = torch_dtype(spec["precision"])
    pixels = load_file(spec["pixels"])["pixels"].to(spec["device"], dtype)
    if spec["library"] == "fastbb":
        return _Prepared(spec, pixels)
    backbone = AutoBackbone.from_pretrained(spec["model"], dtype=torch.float32)
    return _STARTS[spec["engine"]](spec, pixels, backbone)


class _Runner:
    """A runner whose result is a sequence of maps.

    Args:
        spec: see `make_runner`.
        pixels: [B, C, H, W] in the dtype and on the device that run.
    """

    note = ""

    def __init__(self, spec: Mapping[str, Any], pixels: Tensor) -> None:
        self.spec = spec
        self.pixels: Any = pixels
        self.call: Callable[[Any], Sequence[Any]]

    def run(self) -> Sequence[Any]:
        return self.call(self.pixels)

    def outputs(self, result: Sequence[Any]) -> dict[str, Tensor]:
        maps = (x if isinstance(x, Tensor) else torch.from_numpy(np.array(x)) for x in result)
        return dict(zip(self.spec["stages"], maps))

    def inside_s(self) -> None:
        return None


class _Prepared(_Runner):
    """fastbb, prepared in a mode."""

    def load(self) -> None:
        dtype = torch_dtype(self.spec["precision"])
        self.backbone = AutoBackbone.from_pretrained(
            self.spec["model"], dtype=dtype, device=self.spec["device"]
        )

    def start(self) -> Sequence[Tensor]:
        mode, precision = self.spec["engine"], self.spec["precision"]
        prepared = self.backbone.prepare(
            mode=mode,
            precision=precision if precision == "tf32" else None,
            example=self.pixels,
        )
        rows = explain(prepared).rows
        self.note = "; ".join(f"runs {r.runs}: {r.why}" for r in rows if r.runs not in ("", mode))
        self.call = lambda pixels: prepared(pixels).feature_maps
        return self.run()


class _Maps(nn.Module):
    """The maps of a model as a tuple, which compilers and exporters take."""

    def __init__(self, upstream: Upstream) -> None:
        super().__init__()
        self.model = upstream.module.eval()
        self._maps = upstream.maps

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        return tuple(self._maps(self.model, pixels))


class _Eager(_Runner):
    """Another library's model, op by op.

    Args:
        backbone: has the weights.
    """

    def __init__(self, spec: Mapping[str, Any], pixels: Tensor, backbone: Any) -> None:
        super().__init__(spec, pixels)
        self._backbone = backbone

    def load(self) -> None:
        size = (self.pixels.shape[2], self.pixels.shape[3])
        load_file(Path(self.spec["model"]) / "model.safetensors")  # as its library would
        if self.spec["library"] == "upstream":
            upstream, _ = upstream_of(self._backbone)
        else:
            upstream = other_upstream(self._backbone, self.spec["library"], size)
        del self._backbone
        dtype = torch_dtype(self.spec["precision"])
        self.model = _Maps(upstream).to(self.spec["device"], dtype)

    def start(self) -> Sequence[Any]:
        self.call = self.model
        return self.run()


class _Compiled(_Eager):
    """torch.compile, with weights as constants."""

    def start(self) -> Sequence[Any]:
        from torch._dynamo.exc import TorchDynamoException

        compiled = torch.compile(self.model, fullgraph=True)
        try:
            with _freezing():
                compiled(self.pixels)
        except TorchDynamoException as error:
            compiled = torch.compile(self.model)
            self.note = f"with graph breaks ({describe(error)})"
        self.call = compiled
        with _freezing():
            return self.run()


@contextmanager
def _freezing() -> Iterator[None]:
    """Has the inductor fold and prepack weights, which inference does not change."""
    from torch._inductor import config

    with torch.no_grad(), config.patch(freezing=True):
        yield


class _OpenVINO(_Eager):
    """OpenVINO's CPU plugin, in exactly the precision that was asked for."""

    def start(self) -> Sequence[Any]:
        precision = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}[self.spec["precision"]]
        openvino = openvino_library()
        model = self.model.float()
        self.pixels = self.pixels.float()
        program = torch.export.export(model, (self.pixels,))
        compiled = openvino.Core().compile_model(
            openvino.convert_model(program),
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": precision,
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                "PERFORMANCE_HINT": "LATENCY",
                # to the first cores, which other processes would share
                "ENABLE_CPU_PINNING": False,
            },
        )
        ran = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        if ran != precision:
            raise SkippedError(f"computes in {ran} on this CPU, asked for {precision}")
        n_maps = len(self.spec["stages"])
        self.pixels = self.pixels.numpy()
        del self.model

        def call(pixels: Any) -> list[Any]:
            found = compiled(pixels, share_inputs=True, share_outputs=True)
            return [found[index] for index in range(n_maps)]

        self.call = call
        return self.run()


class _ONNXRuntime(_Eager):
    """ONNX Runtime's CPU provider."""

    def start(self) -> Sequence[Any]:
        onnxruntime = import_module("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors
        # its threads may not spin while another way has its turn
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(
            self._file(), options, providers=["CPUExecutionProvider"]
        )
        (argument,) = session.get_inputs()
        self.pixels = self.pixels.numpy()
        del self.model
        self.call = lambda pixels: session.run(None, {argument.name: pixels})
        return self.run()

    def _file(self) -> bytes:
        try:
            program = torch.onnx.export(self.model, (self.pixels,), dynamo=True, verbose=False)
            assert program is not None
            return program.model_proto.SerializeToString()
        except torch.onnx.OnnxExporterError as error:
            self.note = f"exported by tracing ({describe(error)})"
            file = io.BytesIO()
            torch.onnx.export(self.model, (self.pixels,), file, dynamo=False)  # type: ignore[arg-type]  # a file is allowed, the stub lacks it
            return file.getvalue()


_STARTS: dict[str, type[_Eager]] = {
    "eager": _Eager,
    "compile": _Compiled,
    "openvino": _OpenVINO,
    "onnxruntime": _ONNXRuntime,
}
