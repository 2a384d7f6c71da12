"""Peers: other ways to run a backbone on a CPU, with which ours are compared, and ours.

All take the same random weights, with transformers' names, and return the maps of the selected
stages. A `Peer` has two steps, because a user waits for them at different times: `load` makes the
model, `start` makes it ready to run (exports, converts, wraps for the compiler).
"""

import importlib
import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastbb import AutoBackbone, ResNetConfig, SwinConfig

StateDict = dict[str, Tensor]
STAGES = ("stage1", "stage2", "stage3", "stage4")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MANY_IMAGES = 1_000_000  # a long run, in which any compilation is worth its time


@dataclass(frozen=True)
class Model:
    """An architecture, as each library names it.

    Attributes:
        title: in tables.
        family: "swin" or "resnet".
        config: fields of transformers' configuration and ours.
        timm_name: the architecture in timm.
        timm_options: options of timm's constructor for the same shape.
    """

    title: str
    family: str
    config: dict[str, Any]
    timm_name: str
    timm_options: dict[str, Any] = field(default_factory=dict)


MODELS = {
    "swin_t": Model("Swin-T", "swin", {}, "swin_tiny_patch4_window7_224"),
    "resnet50": Model("ResNet-50", "resnet", {}, "resnet50"),
}
_TINY_SWIN = {
    "embed_dim": 16,
    "depths": (2, 1, 1, 2),
    "num_heads": (1, 2, 4, 8),
    "window_size": 2,
}
_TINY_RESNET = (2, 1, 1, 1)
TINY_MODELS = {
    "swin_t": Model(
        "tiny Swin", "swin", _TINY_SWIN, "swin_tiny_patch4_window7_224", {**_TINY_SWIN}
    ),
    "resnet50": Model(
        "tiny ResNet", "resnet", {"depths": _TINY_RESNET}, "resnet50", {"layers": _TINY_RESNET}
    ),
}


@dataclass(frozen=True)
class Cell:
    """Configuration that all peers run in a comparison.

    Attributes:
        name: of the model, a key of `MODELS`.
        dtype: "float32" or "bfloat16".
        batch: images per call.
        size: height and width of the images, pixels.
        tiny: whether to run a miniature of the model.
        stages: those with returned maps.
    """

    name: str
    dtype: str
    batch: int
    size: int
    tiny: bool = False
    stages: tuple[str, ...] = STAGES

    @property
    def model(self) -> Model:
        return (TINY_MODELS if self.tiny else MODELS)[self.name]

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def title(self) -> str:
        return f"{self.model.title}, {self.size} px, {self.dtype}, batch {self.batch}"

    def pixels(self, size: int | None = None) -> Tensor:
        """Makes pixels [batch, 3, size, size] in the cell's dtype, equal in every dtype."""
        size = size or self.size
        generator = torch.Generator().manual_seed(1)
        pixels = torch.randn(self.batch, 3, size, size, generator=generator)
        return pixels.bfloat16().to(self.torch_dtype)


def random_weights(cell: Cell) -> StateDict:
    """Makes seeded fp32 weights with unit gain; no bias is zero and no norm is the identity."""
    generator = torch.Generator().manual_seed(0)
    state = fastbb_model(cell).state_dict()
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            continue
        if tensor.ndim > 1 and not name.endswith("bias_table"):
            std = tensor[0].numel() ** -0.5
        elif name.endswith(("running_var", ".weight")):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            continue
        else:
            std = 0.3
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * std)
    return state


class Skip(Exception):
    """A peer does not run this cell; the message says why."""


@dataclass(frozen=True)
class Started:
    """A peer that is ready to run.

    Attributes:
        run: computes the maps (tensors or arrays) from the result of `Peer.pixels`.
        note: explanation of its number for readers.
    """

    run: Callable[[Any], Sequence[Any]]
    note: str = ""


def _unchanged(pixels: Tensor) -> Any:
    return pixels


def _maps(maps: Sequence[Any], cell: Cell, state: StateDict) -> list[Tensor]:
    return [_float32(one_map) for one_map in maps]


@dataclass(frozen=True)
class Peer:
    """One way to run a backbone.

    Attributes:
        name: in tables; names of ours start with "fastbb".
        load: makes the model of a cell with these weights.
        start: makes it ready; the first call may compile.
        pixels: makes the input of `run` from the cell's pixels; not timed.
        maps: converts the result of `run` to transformers' maps in fp32; not timed.
        own_maps: by family, stages with maps of the library's own kind, not transformers'.
        compiles: whether it compiles with the inductor and its cache.
        any_size: whether a started peer takes images of another size.
    """

    name: str
    load: Callable[[Cell, StateDict], Any]
    start: Callable[[Any, Cell], Started]
    pixels: Callable[[Tensor], Any] = _unchanged
    maps: Callable[[Sequence[Any], Cell, StateDict], list[Tensor]] = _maps
    own_maps: dict[str, tuple[str, ...]] = field(default_factory=dict)
    compiles: bool = False
    any_size: bool = True

    @property
    def ours(self) -> bool:
        return self.name.startswith("fastbb")


def _float32(one_map: Any) -> Tensor:
    if isinstance(one_map, Tensor):
        return one_map.float()
    return torch.from_numpy(np.array(one_map, dtype=np.float32))


def transformers_model(cell: Cell) -> Any:
    import transformers

    config = {"swin": transformers.SwinConfig, "resnet": transformers.ResNetConfig}
    config = config[cell.model.family](out_features=list(cell.stages), **cell.model.config)
    return transformers.AutoBackbone.from_config(config).eval()


def load_transformers(cell: Cell, state: StateDict) -> nn.Module:
    return _load_fp32_transformers(cell, state).to(cell.torch_dtype)


def _load_fp32_transformers(cell: Cell, state: StateDict) -> nn.Module:
    model = transformers_model(cell)
    # our weights also have norms of stages that are not selected
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    return FeatureMaps(model)


class FeatureMaps(nn.Module):
    """The maps of a backbone as a tuple, which every exporter understands."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone.eval()

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.backbone(pixels).feature_maps)


def start_eager(model: nn.Module, cell: Cell) -> Started:
    return Started(model)


@contextmanager
def freezing() -> Iterator[None]:
    """Makes the inductor take weights as constants, fold and prepack them; only while compiling."""
    from torch._inductor import config

    with torch.no_grad(), config.patch(freezing=True):
        yield


def start_compiled(model: nn.Module, cell: Cell) -> Started:
    from torch._dynamo.exc import TorchDynamoException

    pixels = cell.pixels()
    try:
        compiled, note = torch.compile(model, fullgraph=True), ""
        with freezing():
            compiled(pixels)
    except TorchDynamoException as error:
        compiled, note = torch.compile(model), f"with graph breaks ({_first_line(error)})"
    with freezing():
        compiled(pixels)
        compiled(pixels)
    return Started(compiled, note)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def load_timm(cell: Cell, state: StateDict) -> nn.Module:
    import timm

    stages = [STAGES.index(stage) for stage in cell.stages]
    swin = cell.model.family == "swin"
    options: dict[str, Any] = {"img_size": cell.size} if swin else {}
    options |= {"out_indices": stages if swin else [stage + 1 for stage in stages]}
    model = timm.create_model(
        cell.model.timm_name, features_only=True, **options, **cell.model.timm_options
    )
    names = model.state_dict().keys()
    timm_state = (timm_swin_state if swin else timm_resnet_state)(state)
    model.load_state_dict({name: timm_state[name] for name in names})
    return model.to(cell.torch_dtype).eval()


def timm_swin_state(state: StateDict) -> StateDict:
    """Renames transformers' Swin to timm's: q, k and v are one, a stage begins with its merging."""
    timm_state: StateDict = {}
    for name, tensor in state.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            others = (name.replace(".q_proj.", f".{part}_proj.") for part in "kv")
            tensor = torch.cat([tensor, *(state[other] for other in others)])
        for pattern, replacement in _TIMM_SWIN_NAMES:
            name = re.sub(pattern, replacement, name)
        name = re.sub(
            r"layers_(\d+)\.downsample", lambda m: f"layers_{int(m[1]) + 1}.downsample", name
        )
        timm_state[name] = tensor
    return timm_state


_TIMM_SWIN_NAMES = [
    (r"^swin\.embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"^swin\.embeddings\.norm", "patch_embed.norm"),
    (r"^swin\.encoder\.layers\.(\d+)", r"layers_\1"),
    (r"attention\.q_proj", "attn.qkv"),
    (r"attention\.o_proj", "attn.proj"),
    (r"attention\.relative_position_bias\.", "attn."),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
]


def timm_resnet_state(state: StateDict) -> StateDict:
    """Renames the weights of transformers' ResNet to timm's names."""

    def conv_or_norm(m: re.Match[str]) -> str:
        part = "conv" if m[2] == "convolution" else "bn"
        return f"{part}{int(m[1]) + 1}"

    timm_state: StateDict = {}
    for name, tensor in state.items():
        name = name.replace("embedder.embedder.convolution", "conv1")
        name = name.replace("embedder.embedder.normalization", "bn1")
        name = re.sub(r"^encoder\.stages\.(\d+)\.layers", lambda m: f"layer{int(m[1]) + 1}", name)
        name = name.replace("shortcut.convolution", "downsample.0")
        name = name.replace("shortcut.normalization", "downsample.1")
        name = re.sub(r"layer\.(\d+)\.(convolution|normalization)", conv_or_norm, name)
        timm_state[name] = tensor
    return timm_state


# timm does not shift the windows of a map that is one window
TIMM_OWN_MAPS = {"swin": ("stage4",)}


def timm_maps(maps: Sequence[Any], cell: Cell, state: StateDict) -> list[Tensor]:
    """Adds the norm of each map, which timm's Swin leaves out, and moves the channels."""
    if cell.model.family == "resnet":
        return _maps(maps, cell, state)
    normed = []
    for stage, one_map in zip(cell.stages, maps):
        weight, bias = (state[f"hidden_states_norms.{stage}.{part}"] for part in ("weight", "bias"))
        one_map = F.layer_norm(one_map.float(), weight.shape, weight, bias)
        normed.append(one_map.permute(0, 3, 1, 2))
    return normed


def fp32_array(pixels: Tensor) -> Any:
    return pixels.float().numpy()


def start_openvino(model: nn.Module, cell: Cell) -> Started:
    openvino = importlib.import_module("openvino")  # an extra that may be missing for type checkers
    precision = {"float32": "f32", "bfloat16": "bf16"}[cell.dtype]
    with torch.no_grad():
        program = torch.export.export(model, (cell.pixels().float(),))
    compiled = openvino.Core().compile_model(
        openvino.convert_model(program),
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        },
    )
    ran = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    note = "" if ran == precision else f"asked for {precision}, computes in {ran} here"

    def run(pixels: Any) -> list[Any]:
        outputs = compiled(pixels, share_inputs=True, share_outputs=True)
        return [outputs[index] for index in range(len(cell.stages))]

    return Started(run, note)


def start_onnxruntime(model: nn.Module, cell: Cell) -> Started:
    if cell.dtype != "float32":
        raise Skip(f"its CPU kernels have no {cell.dtype}")
    onnxruntime = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    file, note = _onnx_file(model, cell)
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    (input_name,) = (argument.name for argument in session.get_inputs())
    return Started(lambda pixels: session.run(None, {input_name: pixels}), note)


def _onnx_file(model: nn.Module, cell: Cell) -> tuple[bytes, str]:
    pixels = cell.pixels()
    with torch.no_grad():  # Swin's export fails with gradients
        try:
            program = torch.onnx.export(model, (pixels,), dynamo=True, verbose=False)
            assert program is not None
            return program.model_proto.SerializeToString(), ""
        except torch.onnx.OnnxExporterError as error:
            file = io.BytesIO()
            torch.onnx.export(model, (pixels,), file, dynamo=False)  # type: ignore[arg-type]
            return file.getvalue(), f"exported by tracing ({_first_line(error)})"


def fastbb_model(cell: Cell) -> Any:
    config = {"swin": SwinConfig, "resnet": ResNetConfig}[cell.model.family]
    config = config(out_features=list(cell.stages), **cell.model.config)
    return AutoBackbone.from_config(config).eval()


def load_fastbb(cell: Cell, state: StateDict) -> nn.Module:
    return FeatureMaps(_load_fp32_fastbb(cell, state).to(cell.torch_dtype))


def _load_fp32_fastbb(cell: Cell, state: StateDict) -> Any:
    model = fastbb_model(cell)
    model.load_state_dict(state)
    return model


def prepared(backbone: Any, mode: str, precision: str, example: tuple[int, int, int]) -> Started:
    """Returns a started peer that runs a prepared backbone.

    Args:
        backbone: fp32.
        mode: of `prepare`.
        precision: "fp32" or "bf16".
        example: batch, height and width.
    """
    from fastbb.engine.prepare import explain

    ready = backbone.prepare(
        mode=mode, precision=precision, example=example, expected_images=MANY_IMAGES
    )
    note = "; ".join(f"runs {row.runs}" for row in explain(ready).rows if row.runs != mode)
    return Started(lambda pixels: ready(pixels).feature_maps, note)


def _start_prepared(mode: str) -> Callable[[Any, Cell], Started]:
    def start(backbone: Any, cell: Cell) -> Started:
        precision = {"float32": "fp32", "bfloat16": "bf16"}[cell.dtype]
        return prepared(backbone, mode, precision, (cell.batch, cell.size, cell.size))

    return start


PEERS = {
    peer.name: peer
    for peer in [
        Peer("transformers eager", load_transformers, start_eager),
        Peer("transformers compiled", load_transformers, start_compiled, compiles=True),
        Peer(
            "timm eager",
            load_timm,
            start_eager,
            maps=timm_maps,
            own_maps=TIMM_OWN_MAPS,
            any_size=False,
        ),
        Peer(
            "timm compiled",
            load_timm,
            start_compiled,
            maps=timm_maps,
            own_maps=TIMM_OWN_MAPS,
            compiles=True,
            any_size=False,
        ),
        Peer(
            "OpenVINO",
            _load_fp32_transformers,
            start_openvino,
            pixels=fp32_array,
            any_size=False,
        ),
        Peer(
            "ONNX Runtime",
            _load_fp32_transformers,
            start_onnxruntime,
            pixels=fp32_array,
            any_size=False,
        ),
        Peer("fastbb eager", load_fastbb, start_eager),
        Peer("fastbb compile", _load_fp32_fastbb, _start_prepared("compile"), compiles=True),
        Peer("fastbb auto", _load_fp32_fastbb, _start_prepared("auto"), compiles=True),
    ]
}
