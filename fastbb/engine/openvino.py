"""OpenVINO on a CPU: converts a whole backbone for one size of images, and runs any batch of it."""

import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastbb_kernels import use_impl
from fastbb_kernels.heap import release_freed_memory, release_mapped_files
from fastbb_kernels.result_cache import user_cache

from ..backbone.base import Backbone
from ..backbone.description import description
from ..weights.folded_model import unfold
from .computation import NUMERICS, Computation, MapsModule, device_of, dtype_of
from .cpu import has_arithmetic
from .model_files import ModelFiles
from .openvino_graph import rewrite_for_cpu
from .openvino_library import in_one_line, openvino_errors, openvino_library, root_logger_restored
from .trial import Run

OPENVINO = "openvino"
MISSING = "OpenVINO is not installed: pip install 'fastbb[openvino]'"
_CONVERSION = 3  # raised when the same model is converted in another way
_PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}
_FILE = "model.xml"  # the weights are in model.bin
_converting = threading.Lock()  # torch.export is for one thread at a time
_process: int | None = None  # in which OpenVINO has started threads


class Converted(NamedTuple):
    """A converted backbone.

    Attributes:
        run: for pixels of one size.
        batch: the number of images that it takes; None: any.
        found: whether it was on disk, so that nothing was converted.
    """

    run: Run
    batch: int | None
    found: bool


def openvino_version() -> str | None:
    """The version of OpenVINO that is installed, or None; imports nothing."""
    return _version("openvino")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def why_not_openvino(computation: Computation) -> str | None:
    """The reason why OpenVINO cannot run a computation here, or None.

    It is `MISSING` only where installing OpenVINO would help.
    """
    device, dtype = device_of(computation.module), dtype_of(computation.module)
    if device.type != "cpu":
        return f"OpenVINO runs on a CPU, the weights are on {device}"
    name = str(dtype).removeprefix("torch.")
    if dtype not in _PRECISIONS:
        return f"OpenVINO runs float32 and bfloat16 here, the weights are {name}"
    if not has_arithmetic(dtype):
        return f"this CPU has no {name} arithmetic"
    return MISSING if openvino_version() is None else None


def model_files() -> ModelFiles:
    """Converted models, in the user's cache."""
    return ModelFiles(user_cache() / OPENVINO)


def openvino_maps(
    computation: Computation,
    example: Tensor,
    files: ModelFiles,
    problem_of: Callable[[Sequence[Tensor]], str | None],
) -> Converted:
    """Converts the maps of a computation for the size of an example, or finds it converted.

    The weights are baked in: the caller has to watch them by a `ModuleStamp`. A model that was
    found and is wrong is removed and converted anew.

    Args:
        computation: in eval mode, on a CPU.
        example: [B, C, H, W] in the dtype of the weights.
        files: converted models of earlier processes.
        problem_of: why the maps of the example are wrong, or None.

    Raises:
        RuntimeError: OpenVINO cannot run it; the message says why.
        Exception: any error of the export.
    """
    global _process
    why_not = why_not_openvino(computation)
    if why_not is not None:
        raise RuntimeError(why_not)
    _check_process()
    _process = os.getpid()
    core = openvino_library().Core()
    try:
        core.get_property("CPU", "FULL_DEVICE_NAME")
    except Exception as error:
        reason = "OpenVINO: its plug-in for CPUs is missing, reinstall the package openvino"
        raise RuntimeError(reason) from error
    with _converting:
        key = _key(computation, example)
        for name in (key, _key_of_batch(key, example)):
            model = _found(core, name, files)
            if model is not None:
                run = _CompiledModel(core, model, example, files)
                problem = problem_of(run(example))
                if problem is None:
                    return Converted(run, run.batch, True)
                files.remove(name, problem)
        model = _kept(core, _convert(computation, example), key, example, files)
    run = _CompiledModel(core, model, example, files)
    return Converted(run, run.batch, False)


def _check_process() -> None:
    """Refuses to run in a forked process, which has none of OpenVINO's threads to wait for."""
    if _process not in (None, os.getpid()):
        raise RuntimeError("OpenVINO ran in the process that forked this one: start it by spawn")


def _key_of_batch(key: str, example: Tensor) -> str:
    """Key of a model that takes the batch of the example only."""
    return f"{key}-{len(example)}"


def _found(core: Any, key: str, files: ModelFiles) -> Any | None:
    """The model that was kept under a key; its weights are mapped from the file."""
    folder = files.find(key)
    if folder is None:
        return None
    try:
        return core.read_model(folder / _FILE)
    except Exception as error:
        files.remove(key, in_one_line(error))
        return None


def _kept(core: Any, model: Any, key: str, example: Tensor, files: ModelFiles) -> Any:
    """Keeps a model, and returns it with its weights mapped from the file, if it was kept."""
    if model.input(0).partial_shape[0].is_static:
        key = _key_of_batch(key, example)
    folder = files.keep(key, lambda new: _save(model, new))
    if folder is not None:
        with suppress(Exception):  # another process may have removed it
            model = core.read_model(folder / _FILE)
    release_freed_memory()  # of torch's graph, with copies of the weights
    return model


def _save(model: Any, folder: Path) -> None:
    openvino_library().save_model(model, folder / _FILE, compress_to_fp16=False)


@torch.inference_mode(False)
@torch.no_grad()
def _convert(computation: Computation, example: Tensor) -> Any:
    """The model with inputs and outputs in the dtype of the weights, and weights in fp32.

    The weights of a low precision are rounded already, so a wide copy loses nothing, and OpenVINO
    rounds only where its kernels do.
    """
    openvino = openvino_library()
    wide = computation
    try:
        if example.dtype != torch.float32:
            wide = computation.copied()
            wide.module.float()
        program, batch = _exported(wide, example)
        with openvino_errors(), root_logger_restored():
            model: Any = openvino.convert_model(program)
            model.reshape([batch, *example.shape[1:]])
            rewrite_for_cpu(model)
    finally:
        if wide is not computation:
            unfold(wide.module)  # forwards that are bound on it would keep the copy alive
    return model if wide is computation else _in_bf16(model)


def _in_bf16(model: Any) -> Any:
    """The same model with inputs and outputs in bf16."""
    openvino = openvino_library()
    from openvino.preprocess import PrePostProcessor

    with openvino_errors():
        with_types = PrePostProcessor(model)
        with_types.input().tensor().set_element_type(openvino.Type.bf16)
        for index in range(len(model.outputs)):
            with_types.output(index).tensor().set_element_type(openvino.Type.bf16)
        return with_types.build()


def _exported(computation: Computation, example: Tensor) -> tuple[Any, int]:
    """The computation as a graph, and the batch that it takes; -1: any."""
    maps = MapsModule(computation)
    with use_impl("eager"):
        try:
            # of one image a graph would hold that it is one
            two = example.new_zeros(2, *example.shape[1:], dtype=torch.float32)
            any_batch = ({0: torch.export.Dim("batch")},)
            return torch.export.export(maps, (two,), dynamic_shapes=any_batch), -1
        except Exception:  # some models of other libraries read the number of images
            return torch.export.export(maps, (torch.zeros_like(example).float(),)), len(example)


def _key(computation: Computation, example: Tensor) -> str:
    """Digest of all that decides the model: weights, modules, size, precision, versions."""
    module = computation.module
    digest = hashlib.sha256()
    made_by = (_CONVERSION, NUMERICS, torch.__version__, openvino_version())
    if not isinstance(module, Backbone):  # its forwards are upstream's
        made_by += tuple(map(_version, ("transformers", "timm", "torchvision")))
    wanted = (computation.cache_key, computation.outputs, example.shape[1:], example.dtype)
    digest.update(repr((made_by, wanted)).encode())
    for name, part in module.named_modules():
        digest.update(f"{name} {description(part)}\n".encode())
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        flat: Any = tensor.detach().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


class _CompiledModel:
    """Runs a model, compiled for the batch of an example, and for any batch when another comes.

    A model for any batch takes up to 6 % longer (ResNet-50 in fp32, batch 1).

    Args:
        core: OpenVINO's.
        model: for any batch, or for that of the example.
        example: [B, C, H, W].
        files: from which the weights of the model may be mapped.

    Attributes:
        batch: the number of images that the model takes; None: any.

    Raises:
        RuntimeError: OpenVINO cannot compile it, or computes in another precision.
    """

    def __init__(self, core: Any, model: Any, example: Tensor, files: ModelFiles) -> None:
        self._core, self._model, self._precision = core, model, _PRECISIONS[example.dtype]
        self._files = files
        self._library = openvino_library()
        self._settings = {
            "INFERENCE_PRECISION_HINT": self._precision,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
            # the plug-in pins to the first cores, which several processes would share
            "ENABLE_CPU_PINNING": False,
        }
        self._lock = threading.Lock()
        self._of_any: Any = None
        self._first_batch = len(example)
        with openvino_errors():
            batch = model.input(0).partial_shape[0]
            self.batch: int | None = None if batch.is_dynamic else batch.get_length()
            first = model
            if batch.is_dynamic:
                first = model.clone()
                first.reshape(list(example.shape))
        self._of_first = self._compiled(first)
        # of a map of an image; raises if it is not known
        self._shapes = [
            [n.get_length() for n in list(x.partial_shape)[1:]] for x in self._of_first.outputs
        ]

    def _compiled(self, model: Any) -> Any:
        with openvino_errors():
            compiled = self._core.compile_model(model, "CPU", self._settings)
            ran = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        if ran != self._precision:
            raise RuntimeError(f"OpenVINO computes in {ran} on this CPU, not {self._precision}")
        release_mapped_files(self._files.directory)  # most weights are packed by now
        return compiled

    def _for_batch(self, batch: int) -> Any:
        if self.batch is not None or batch == self._first_batch:
            return self._of_first
        with self._lock:
            if self._of_any is None:
                self._of_any = self._compiled(self._model)
            return self._of_any

    def __call__(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Computes maps from pixels [B, C, H, W] of the size of the example.

        Raises:
            RuntimeError: OpenVINO failed, or started in a process that forked this one.
        """
        _check_process()
        pixels = pixel_values.detach().contiguous()
        compiled = self._for_batch(len(pixels))
        maps = tuple(pixels.new_empty(len(pixels), *shape) for shape in self._shapes)
        with openvino_errors():
            # made in some 10 us, and lets go of the tensors when the call is over
            request = compiled.create_infer_request()
            request.set_input_tensor(self._shared(pixels))
            for index, one in enumerate(maps):
                request.set_output_tensor(index, self._shared(one))
            request.infer()
        return maps

    def _shared(self, tensor: Tensor) -> Any:
        """OpenVINO's tensor over the memory of a contiguous one."""
        openvino = self._library
        if tensor.dtype == torch.bfloat16:  # which numpy has not
            bits = tensor.view(torch.int16).numpy()
            return openvino.Tensor(bits, list(tensor.shape), openvino.Type.bf16)
        return openvino.Tensor(tensor.numpy(), shared_memory=True)
