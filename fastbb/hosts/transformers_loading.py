"""Loads modules of transformers strictly from the tensors of any checkpoint around them."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..backbone.checkpoint import (
    LoadingInfo,
    StateDict,
    as_dtype,
    check_dtypes,
    find_prefix,
    rename,
    shapes_only,
    some,
    strip_prefix,
)
from ..models.stage_norms import NORMS
from .transformers_config import transformers


def _dtype_of(tensors: Iterable[Tensor]) -> torch.dtype:
    return next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)


def load_module(
    empty: Any,
    config: Any,
    state: StateDict,
    name: str,
    dtype: torch.dtype | str | None = None,
) -> tuple[Any, LoadingInfo]:
    """Loads a module of transformers strictly, in eval mode, on the CPU.

    Args:
        empty: the module on the meta device, as transformers builds it.
        config: of the module, of transformers.
        state: tensors of a checkpoint, of the module or of a model around it.
        name: of the checkpoint, for messages.
        dtype: of the weights; default (or "auto"): that of the checkpoint.

    Returns:
        The module, and the use of the tensors; `initialized` are norms of maps, not yet with their
        values.

    Raises:
        ValueError: the weights do not fit; lists what is missing or misshapen.
    """
    model_class = type(empty)
    what = f"{model_class.__name__} from {name!r}"
    if config.model_type in _DETECTORS:
        state = rename(state, _detector_name)
    prefix = find_prefix(state, _names(empty), what)
    found, outside = strip_prefix(state, prefix)
    # read inside inference mode, they could not become parameters
    found = {n: t.clone() if t.is_inference() else t for n, t in found.items()}
    weights = [n for n, tensor in empty.state_dict().items() if tensor.is_floating_point()]
    check_dtypes(found, weights, what)
    with quiet():
        model, info = model_class.from_pretrained(
            None,
            config=config,
            state_dict=found,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are an error below, with their names
            dtype=as_dtype(dtype) or _dtype_of(found.values()),
        )
    _mend_pixio(model, found)
    optional = {n for n in info["missing_keys"] if n.endswith("num_batches_tracked")}
    initialized = sorted(n for n in info["missing_keys"] if n.startswith(NORMS))
    missing = sorted(info["missing_keys"] - optional - _mended(model) - {*initialized})
    shapes = [
        f"{n}: {list(theirs)} in the checkpoint, {list(ours)} in the model"
        for n, theirs, ours in info["mismatched_keys"]
    ]
    unknown = _unknown(empty, info["unexpected_keys"])
    problems = [f"missing: {some(missing)}"] if missing else []
    problems += [f"unknown: {some(unknown)}"] if unknown else []
    problems += [f"of the wrong shape: {some(shapes)}"] if shapes else []
    if problems:
        raise ValueError(f"The weights do not fit {what}. " + "\n".join(problems))
    unused = sorted({*outside, *info["unexpected_keys"]})
    return model.eval(), LoadingInfo(prefix, unused, initialized)


# their detectors save layers under older names, which upstream renames for the detector only
_DETECTORS = ("lw_detr_vit", "rf_detr_dinov2")
_RENAMED = {
    ".attention.attention.query.": ".attention.q_proj.",
    ".attention.attention.key.": ".attention.k_proj.",
    ".attention.attention.value.": ".attention.v_proj.",
    ".attention.output.dense.": ".attention.o_proj.",
    ".attention.output.": ".attention.o_proj.",
}


def _detector_name(name: str) -> str:
    for old, new in _RENAMED.items():
        name = name.replace(old, new)
    return name


def _names(model: Any) -> set[str]:
    """Names of a module's tensors, in memory and in files of transformers, or of its base model."""
    state = model.state_dict()
    names = set(state)
    with suppress(Exception):  # internals of transformers, which may move
        internals = import_module(f"{transformers().__name__}.core_model_loading")
        names |= set(internals.revert_weight_conversion(model, state))
    return names | {name.removeprefix(f"{model.base_model_prefix}.") for name in names}


def _mended(model: Any) -> set[str]:
    return {"layernorm.weight", "layernorm.bias"} if hasattr(model, "pixio") else set()


@torch.no_grad()
def _mend_pixio(model: Any, state: StateDict) -> None:
    """Gives a PixioBackbone the final norm of its checkpoint.

    Upstream loads the norm of a PixioModel into another layer and leaves the norm of the maps as
    it was built, and swaps the two of a checkpoint that a PixioBackbone saved.
    """
    if not hasattr(model, "pixio"):
        return
    for part in ("weight", "bias"):
        norm = state[f"layernorm.{part}"]
        model.get_parameter(f"layernorm.{part}").copy_(norm)
        whole = state.get(f"encoder.layernorm.{part}", norm)
        model.get_parameter(f"pixio.layernorm.{part}").copy_(whole)


def _unknown(model: Any, unexpected: Iterable[str]) -> list[str]:
    """Tensors inside parts of a module, for which neither it nor transformers' full model has room.

    Such as a layer more than its configuration says.
    """
    inner = [n for n in unexpected if n.partition(".")[0] in dict(model.named_children())]
    full_class = transformers().AutoModel._model_mapping.get(type(model.config), None)
    if not inner or full_class is None:
        return sorted(inner)
    with shapes_only():
        full = set(full_class(model.config).state_dict())
    base = f"{model.base_model_prefix}."
    return sorted(n for n in inner if n.removeprefix(base) not in full and n not in full)


_quiet_lock = threading.Lock()
_quiet_calls: list[tuple[int, bool]] = []


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers from drawing progress bars and tables of names, which errors here have."""
    logging = transformers().utils.logging
    with _quiet_lock:  # the first of several threads remembers, the last one restores
        _quiet_calls.append((logging.get_verbosity(), logging.is_progress_bar_enabled()))
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    try:
        yield
    finally:
        with _quiet_lock:
            level, bars = _quiet_calls[0]
            if len(_quiet_calls) > 1:
                _quiet_calls.pop()
            else:
                _quiet_calls.clear()
                logging.set_verbosity(level)
                if bars:
                    logging.enable_progress_bar()
