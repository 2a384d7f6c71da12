"""Warnings that point at the line of the program that called, not at a file of a library."""

import sys
import warnings
from types import FrameType

# packages that lie between a program and a warning of ours
_PASSED = {
    *("fastbb", __name__.partition(".")[0], "torch"),
    *("transformers", "timm", "torchvision", "segmentation_models_pytorch", "peft"),
    *("contextlib", "functools", "threading", "concurrent"),
}


def warn_caller(text: str, category: type[Warning] = UserWarning) -> None:
    """Warns with the file and the line of the nearest caller outside of the libraries.

    Args:
        text: of the warning.
        category: of the warning.
    """
    frame = own = sys._getframe(1)
    while frame.f_back is not None and _package_of(frame) in _PASSED:
        frame = frame.f_back
    if _package_of(frame) in _PASSED:  # a thread began inside a library
        frame = own
    warnings.warn_explicit(
        text,
        category,
        frame.f_code.co_filename,
        frame.f_lineno,
        module=frame.f_globals.get("__name__"),
        # by which the usual filter shows a text once per line of the program
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )


def _package_of(frame: FrameType) -> str:
    # code that torch.fx generates has no name
    return frame.f_globals.get("__name__", "torch").partition(".")[0]
