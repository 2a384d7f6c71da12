"""The package OpenVINO: imported without telemetry, its errors in one line, no trace in logging."""

import logging
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_TELEMETRY = "openvino_telemetry"
_importing = threading.Lock()
# where in its sources OpenVINO raised an error
_PLACE = re.compile(r"Exception from |Check '.*' failed at ")


def openvino_library() -> Any:
    """Imports OpenVINO without its telemetry, unless the program imported it before.

    It would send events to Intel at the import and at every conversion. Where the package
    openvino_telemetry cannot be imported, OpenVINO takes a stub in its place.

    Raises:
        ImportError: it is not installed, or broken.
    """
    with _importing:
        if "openvino" not in sys.modules:
            missing = object()
            before: Any = sys.modules.get(_TELEMETRY, missing)
            modules: dict[str, Any] = sys.modules
            modules[_TELEMETRY] = None  # an import of it raises ImportError
            try:
                import openvino
            finally:
                if before is missing:
                    del modules[_TELEMETRY]
                else:
                    modules[_TELEMETRY] = before
    import openvino

    return openvino


@contextmanager
def openvino_errors() -> Iterator[None]:
    """Raises errors of OpenVINO as a RuntimeError with one line, without places in its sources.

    A lack of memory stays as it is.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise RuntimeError(f"OpenVINO: {in_one_line(error)}") from error


def in_one_line(error: Exception) -> str:
    """What an error of OpenVINO says; its type if it says nothing."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = [line for line in lines if line and not _PLACE.match(line)]
    if not said:
        return type(error).__name__
    is_heading = said[0].endswith(":") and len(said) > 1
    return f"{said[0]} {said[1]}" if is_heading else said[0]


@contextmanager
def root_logger_restored() -> Iterator[None]:
    """Undoes what `openvino.convert_model` does to the root logger, also where it raises.

    Inside the block, messages of fastbb are logged as outside, although OpenVINO lets the root
    logger drop warnings.
    """
    root, own = logging.getLogger(), logging.getLogger("fastbb")
    state = root.level, root.filters[:], root.handlers[:], own.level
    own.setLevel(own.getEffectiveLevel())
    if not root.handlers and logging.lastResort is not None:
        root.handlers = [logging.lastResort]  # else OpenVINO adds one with a format of its own
    try:
        yield
    finally:
        root.setLevel(state[0])
        root.filters[:], root.handlers[:] = state[1], state[2]
        own.setLevel(state[3])
