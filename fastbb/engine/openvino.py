"""OpenVINO on a CPU: converts a whole backbone for one size of images, and runs any batch of it.

One model for any batch took 0.93 to 1.03 times as long as one for each batch (Swin-T and ResNet-50,
fp32 and bf16, batch 1 and 8).
"""

import gc
import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastbb_kernels import use_impl
from fastbb_kernels.result_cache import user_cache

from ..backbone.description import description
from ..weights.folded_model import unfold
from .computation import NUMERICS, Computation, MapsModule, device_of, dtype_of
from .cpu import has_arithmetic
from .model_files import ModelFiles
from .trial import Run

OPENVINO = "openvino"
MISSING = "OpenVINO is not installed: pip install 'fastbb[openvino]'"
_PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}
_FILE = "model.xml"  # the weights are in model.bin
_converting = threading.Lock()  # torch.export is for one thread at a time


class Converted(NamedTuple):
    """A converted backbone.

    Attributes:
        run: for pixels of one size.
        batch: the number of images that it takes; None: any.
    """

    run: Run
    batch: int | None


def openvino_version() -> str | None:
    """The version of OpenVINO that is installed, or None; imports nothing."""
    try:
        return metadata.version("openvino")
    except metadata.PackageNotFoundError:
        return None


def why_not_openvino(computation: Computation) -> str | None:
    """The reason why OpenVINO cannot run a computation here, or None."""
    device, dtype = device_of(computation.module), dtype_of(computation.module)
    if openvino_version() is None:
        return MISSING
    if device.type != "cpu":
        return f"OpenVINO runs on a CPU, the weights are on {device}"
    name = str(dtype).removeprefix("torch.")
    if dtype not in _PRECISIONS:
        return f"OpenVINO runs float32 and bfloat16 here, the weights are {name}"
    return None if has_arithmetic(dtype) else f"this CPU has no {name} arithmetic"


def model_files() -> ModelFiles:
    """Converted models, in the user's cache."""
    return ModelFiles(user_cache() / OPENVINO)


def openvino_maps(computation: Computation, example: Tensor, files: ModelFiles) -> Converted:
    """Converts the maps of a computation for the size of an example, or finds it converted.

    The weights are baked in: the caller has to watch them by a `ModuleStamp`.

    Args:
        computation: in eval mode, on a CPU.
        example: [B, C, H, W] in the dtype of the weights.
        files: converted models of earlier processes.

    Raises:
        RuntimeError: OpenVINO cannot run it; the message says why.
        Exception: any error of the export.
    """
    why_not = why_not_openvino(computation)
    if why_not is not None:
        raise RuntimeError(why_not)
    import openvino

    precision = _PRECISIONS[example.dtype]
    with _errors_in_one_line():
        core = openvino.Core()
        if "CPU" not in core.available_devices:
            raise RuntimeError("its plug-in for CPUs is missing: reinstall the package openvino")
        with _converting:
            model = _model(core, computation, example, files)
        batch = model.input(0).partial_shape[0]
        settings = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        compiled = core.compile_model(model, "CPU", settings)
        ran = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        if ran != precision:
            raise RuntimeError(f"it computes in {ran} on this CPU, wanted {precision}")
        return Converted(_runner(compiled), None if batch.is_dynamic else batch.get_length())


def _model(core: Any, computation: Computation, example: Tensor, files: ModelFiles) -> Any:
    """The converted model; its weights are mapped from the file if there is one."""
    key = _key(computation, example)
    folder = files.find(key)
    if folder is not None:
        try:
            return core.read_model(folder / _FILE)
        except RuntimeError as error:
            files.remove(key, str(error).strip().splitlines()[-1])
    model = _convert(computation, example)
    folder = files.keep(key, lambda new: _save(model, new))
    if folder is not None:
        model = core.read_model(folder / _FILE)
    gc.collect()  # torch's graphs, with copies of the weights, hold each other
    return model


def _save(model: Any, folder: Path) -> None:
    import openvino

    openvino.save_model(model, folder / _FILE, compress_to_fp16=False)


def _convert(computation: Computation, example: Tensor) -> Any:
    """The model with inputs and outputs in the dtype of the weights, and weights in fp32.

    The weights of a low precision are rounded already, so a wide copy loses nothing, and OpenVINO
    rounds only where its kernels do.
    """
    import openvino
    from openvino.preprocess import PrePostProcessor

    with torch.inference_mode(False):
        wide = computation
        if example.dtype != torch.float32:
            wide = computation.copied()
            wide.module.float()
        program, batch = _exported(wide, example)
    model: Any = openvino.convert_model(program)
    if wide is not computation:
        unfold(wide.module)  # forwards that are bound on it would keep the copy alive
    model.reshape([batch, *example.shape[1:]])
    if wide is not computation:
        low = openvino.Type.bf16
        with_types = PrePostProcessor(model)
        with_types.input().tensor().set_element_type(low)
        for index in range(len(model.outputs)):
            with_types.output(index).tensor().set_element_type(low)
        model = with_types.build()
    return model


def _exported(computation: Computation, example: Tensor) -> tuple[Any, int]:
    """The computation as a graph, and the batch that it takes; -1: any."""
    maps = MapsModule(computation)
    with torch.no_grad(), use_impl("eager"):
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
    made_by = (NUMERICS, torch.__version__, openvino_version())
    wanted = (computation.cache_key, computation.outputs, example.shape[1:], example.dtype)
    digest.update(repr((made_by, wanted)).encode())
    for name, part in module.named_modules():
        digest.update(f"{name} {description(part)}\n".encode())
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        flat: Any = tensor.detach().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def _runner(compiled: Any) -> Run:
    # of a map of an image; raises if it is not known
    shapes = [[n.get_length() for n in list(x.partial_shape)[1:]] for x in compiled.outputs]

    def run(pixel_values: Tensor) -> tuple[Tensor, ...]:
        pixels = pixel_values.detach().contiguous()
        maps = tuple(torch.empty(len(pixels), *shape, dtype=pixels.dtype) for shape in shapes)
        with _errors_in_one_line():
            # made in some 10 us, and lets go of the tensors when the call is over
            request = compiled.create_infer_request()
            request.set_input_tensor(_shared(pixels))
            for index, one in enumerate(maps):
                request.set_output_tensor(index, _shared(one))
            request.infer()
        return maps

    return run


def _shared(tensor: Tensor) -> Any:
    """OpenVINO's tensor over the memory of a contiguous one."""
    import openvino

    if tensor.dtype == torch.bfloat16:  # which numpy has not
        bits = tensor.view(torch.int16).numpy()
        return openvino.Tensor(bits, list(tensor.shape), openvino.Type.bf16)
    return openvino.Tensor(tensor.numpy(), shared_memory=True)


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """Leaves out where in its sources OpenVINO raised an error."""
    try:
        yield
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        said = [line for line in lines if line and not line.startswith("Exception from")]
        raise RuntimeError(f"OpenVINO: {said[0] if said else error}") from error
