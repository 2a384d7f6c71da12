"""Checkpoints: reads and writes weights, and matches their names strictly to a backbone's."""

import errno
import fnmatch
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .hub import DEFAULT_HUB, HubOptions, find_file, read_json

StateDict = dict[str, Tensor]

WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# errors of access, which do not mean that a file is corrupt
_NO_ACCESS = {
    *(errno.EACCES, errno.EPERM, errno.ENOENT, errno.EISDIR, errno.EIO, errno.ESTALE),
    *(errno.ENOMEM, errno.EMFILE, errno.ENFILE),
}
# in the order of preference; an index names the shards of a split checkpoint
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@dataclass(frozen=True)
class LoadingInfo:
    """The use of the tensors of a checkpoint.

    Attributes:
        prefix: prefix of the backbone's names in the checkpoint.
        ignored: names outside the backbone (heads, classifiers), and names that it does not need.
        initialized: optional tensors that are missing and keep their initial value.
    """

    prefix: str = ""
    ignored: list[str] = field(default_factory=list)
    initialized: list[str] = field(default_factory=list)


def read_state_dict(
    name_or_dir: str | os.PathLike[str], hub: HubOptions = DEFAULT_HUB
) -> StateDict:
    """Reads all tensors of a checkpoint in transformers' layout of files.

    Args:
        name_or_dir: local directory, bundled model or Hub repository.
        hub: options for the Hub.

    Returns:
        Names and tensors, on the CPU, in the dtype of the file.

    Raises:
        OSError: there are no weights, or a file is corrupt or truncated; nothing is loaded partly.
    """
    for filename in WEIGHT_FILES:
        path = find_file(name_or_dir, filename, hub)
        if path is None:
            continue
        if not filename.endswith(".index.json"):
            return read_weights_file(path)
        return _read_shards(name_or_dir, path, hub)
    raise OSError(f"{str(name_or_dir)!r} has no weights: wanted one of {', '.join(WEIGHT_FILES)}")


def read_weights_file(path: Path) -> StateDict:
    """Reads one .safetensors file, or a .bin file with `weights_only=True`.

    Raises:
        OSError: the file is corrupt, truncated, or holds more than tensors.
    """
    from safetensors.torch import load_file

    with reading(path):
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    loaded = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    problem = not_tensors(loaded)
    if problem:
        raise OSError(f"{path} must hold a dictionary of tensors, {problem}")
    return loaded


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns any error of reading a damaged file into an OSError of one line.

    Files that cannot be accessed, or do not fit into memory, may be intact: their errors do not
    advise to delete them.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # an unpickler may raise any exception
        if isinstance(error, OSError) and error.errno in _NO_ACCESS:
            raise OSError(f"{path} cannot be read: {error.strerror}") from error
        if "Unsupported global" in str(error):  # the file is intact, but not safe to load
            raise OSError(
                f"{path} holds Python objects other than tensors, which are not loaded: save "
                "model.state_dict() alone"
            ) from error
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise OSError(
            f"{path} is corrupt, truncated or not a file of weights ({reason}); "
            "delete it and download or save it again"
        ) from error


def not_tensors(loaded: Any) -> str | None:
    """The end of an error about a value that is no dictionary of tensors; None if it is one."""
    if not isinstance(loaded, Mapping):
        return f"got {type(loaded).__name__}"
    for name, value in loaded.items():
        if not isinstance(name, str):
            return f"but the name of its entry {name!r} is of type {type(name).__name__}"
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            return (
                f"but its entry {name!r} is of type {kind}: wanted the model's state_dict() alone"
            )
    return None


def _read_shards(name_or_dir: str | os.PathLike[str], index: Path, hub: HubOptions) -> StateDict:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise OSError(f"{index} has no weight_map, so it is not the index of a split checkpoint")
    state: StateDict = {}
    for shard in sorted(set(weight_map.values())):
        path = find_file(name_or_dir, shard, hub)
        if path is None:
            raise OSError(f"{str(name_or_dir)!r} lacks the shard {shard!r} that its index names")
        state |= read_weights_file(path)
    missing = sorted(weight_map.keys() - state.keys())
    if missing:
        raise OSError(
            f"the shards of {str(name_or_dir)!r} lack {some(missing)}, named in its index"
        )
    return state


def save_state_dict(state: StateDict, directory: Path) -> None:
    """Writes model.safetensors as transformers does; replaces an existing file atomically."""
    from safetensors.torch import save_file

    # save_file refuses tensors that share memory or have gaps
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / "model.safetensors"
    temporary = directory / f".model.safetensors.{os.getpid()}"
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # save_file leaves 0600 whatever the umask
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def find_prefix(names: Iterable[str], expected: Iterable[str], what: str) -> str:
    """Finds the prefix of a module's tensors in a checkpoint.

    Args:
        names: all names of the checkpoint.
        expected: names of the module's tensors, some of which the checkpoint has; a tensor may have
            several, with a prefix of its own and without.
        what: the module, for the error.

    Returns:
        The prefix, "" or ending with a dot, under which most of `expected` are.

    Raises:
        ValueError: there is no such prefix, or two fit equally well.
    """
    names, expected = sorted(names), set(expected)
    found = (_shortest_prefix(name, expected) for name in names)
    votes = Counter(prefix for prefix in found if prefix is not None)
    if not votes:
        raise ValueError(
            f"The checkpoint holds no {what}: it has none of its tensors, with or without a "
            f"prefix. It holds {some(names)}"
        )
    best = [prefix for prefix, count in votes.items() if count == max(votes.values())]
    if len(best) > 1:
        raise ValueError(f"The checkpoint holds more than one {what}: under {sorted(best)}")
    return best[0]


def _shortest_prefix(name: str, expected: set[str]) -> str | None:
    """The shortest prefix of a name before one of the expected names, or None."""
    parts = name.split(".")
    for start in range(len(parts)):
        if ".".join(parts[start:]) in expected:
            return "".join(f"{part}." for part in parts[:start])
    return None


def strip_prefix(state: StateDict, prefix: str) -> tuple[StateDict, list[str]]:
    """Returns the tensors under a prefix, which is removed, and the names of the others."""
    inside = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    return inside, sorted(name for name in state if not name.startswith(prefix))


class _NothingToFill(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.normal_, nn.init.normal_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextmanager
def shapes_only() -> Iterator[None]:
    """Creates modules on the meta device, with shapes and without memory.

    PyTorch initializes a meta tensor with normal values by Python code that imports torch._dynamo,
    which takes longer than loading a model. This context skips that initialization.
    """
    with torch.device("meta"), _NothingToFill():
        yield


def check_dtypes(state: Mapping[str, Any], weights: Iterable[str], what: str) -> None:
    """Refuses weights of a dtype that no backbone computes in, because a cast would corrupt them.

    Args:
        state: tensors of a checkpoint.
        weights: names of the tensors that are floating in the model, unlike counters and indices.
        what: the model, for the error.

    Raises:
        ValueError: names the tensors and their dtypes.
    """
    found = {name: state[name].dtype for name in weights if isinstance(state.get(name), Tensor)}
    wrong = [f"{name} is {dtype}" for name, dtype in found.items() if dtype not in WEIGHT_DTYPES]
    if wrong:
        raise ValueError(
            f"The weights of {what} must be float32, float16, bfloat16 or float64, but "
            f"{some(wrong, most=3)}: convert them and save them again"
        )


def load_strict(
    module: nn.Module,
    state: StateDict,
    *,
    what: str,
    optional: Sequence[str] = (),
    unused: Sequence[str] = (),
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> tuple[list[str], list[str]]:
    """Loads the tensors of a state dict into a module, all or none.

    Args:
        module: may be on the meta device; its parameters are replaced.
        state: names as in `module.state_dict()`.
        what: the model, for the error.
        optional: patterns of names that may be missing; they keep their value in `module`.
        unused: patterns of names that the module does not need.
        dtype: floating tensors are converted to it; default: that of the checkpoint.
        device: of the loaded tensors; default: CPU.

    Returns:
        Optional names that were missing, and unused names that were present.

    Raises:
        ValueError: names are missing or unknown or shapes differ (the message lists all of them),
            or weights are not floating.
    """
    expected = module.state_dict()
    weights = [name for name, tensor in expected.items() if tensor.is_floating_point()]
    check_dtypes(state, weights, what)
    missing = [name for name in expected if name not in state]
    initialized = [name for name in missing if matches(name, optional)]
    missing = [name for name in missing if not matches(name, optional)]
    unknown = [name for name in state if name not in expected]
    ignored = [name for name in unknown if matches(name, unused)]
    unknown = [name for name in unknown if not matches(name, unused)]
    shapes = [
        f"{name}: {list(state[name].shape)} in the checkpoint, {list(tensor.shape)} in the model"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    is_wanted = torch.device(device or "cpu").type != "meta"
    empty = [name for name in expected if name in state and state[name].is_meta and is_wanted]
    problems = [
        f"{title}: {some(found)}"
        for title, found in (
            ("missing", missing),
            ("unknown", unknown),
            ("of the wrong shape", shapes),
            ("without values, on the meta device", empty),
        )
        if found
    ]
    if problems:
        raise ValueError(f"The weights do not fit {what}. " + "\n".join(problems))

    found = [state[name].dtype for name in weights if name in state]
    floating = dtype or (found[0] if found else torch.get_default_dtype())
    new = {}
    for name, tensor in expected.items():
        source = tensor if name in initialized else state[name]
        # a copy, so that the module owns its memory and not a map of the file
        new[name] = source.detach().to(
            device=device or "cpu",
            dtype=floating if source.is_floating_point() else source.dtype,
            copy=True,
        )
    module.load_state_dict(new, assign=True)
    return initialized, ignored


def rename(state: StateDict, rule: Callable[[str], str]) -> StateDict:
    """Returns `state` with every name replaced by `rule(name)`."""
    return {rule(name): tensor for name, tensor in state.items()}


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name matches one of several shell patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def some(names: Sequence[Any], most: int = 20) -> str:
    """Joins the first names of a list for a message, with their number if there are more."""
    shown = ", ".join(str(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown}, ... ({len(names)} in all)"


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Returns the dtype that a dtype or its name means; None for None and "auto"."""
    if dtype is None or dtype == "auto":
        return None
    found = getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype must be a floating torch.dtype or its name, got {dtype!r}")
    return found
