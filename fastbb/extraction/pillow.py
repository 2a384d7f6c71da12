"""Pillow's process-wide settings, kept at its defaults while images are extracted.

Other code of a program may set them, and they decide whether and how a file decodes. Pillow keeps
them in its modules, so they cannot be set for our threads alone.
"""

from __future__ import annotations

import contextlib
import re
import threading
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from PIL import BmpImagePlugin, GifImagePlugin, Image, ImageFile, PngImagePlugin, TiffImagePlugin

try:
    from PIL import AvifImagePlugin
except ImportError:  # Pillow before 11.3
    AvifImagePlugin = None  # type: ignore[assignment]

# Pillow's defaults, written out: the program may have changed them before this is imported.
# Not here: ImageFile.MAXBLOCK and SAFEBLOCK (sizes of reads), AvifImagePlugin.DEFAULT_MAX_THREADS.
_SETTINGS: list[tuple[ModuleType | None, str, Any]] = [
    (ImageFile, "LOAD_TRUNCATED_IMAGES", False),
    (Image, "MAX_IMAGE_PIXELS", 89_478_485),
    (PngImagePlugin, "MAX_TEXT_CHUNK", 2**20),
    (PngImagePlugin, "MAX_TEXT_MEMORY", 2**26),
    (GifImagePlugin, "LOADING_STRATEGY", GifImagePlugin.LoadingStrategy.RGB_AFTER_FIRST),
    (BmpImagePlugin, "USE_RAW_ALPHA", False),
    (TiffImagePlugin, "READ_LIBTIFF", False),
    (AvifImagePlugin, "DECODE_CODEC_CHOICE", "auto"),
]
_PRESENT = [(module, name, value) for module, name, value in _SETTINGS if hasattr(module, name)]
# as made by `warnings.filterwarnings`: a warning raised as an error would fail an image
_FILTER: Any = ("ignore", None, Warning, re.compile(r"PIL\."), 0)

# reentrant: the garbage collector may end an abandoned run inside of it
_lock = threading.RLock()
_n_runs = 0
_state = object()  # a new token after every change that was found
_before: list[Any] = []  # the program's values, in the order of `_PRESENT`
_filter_lists: list[Any] = []  # `warnings.catch_warnings` exchanges the list


@contextlib.contextmanager
def fixed_settings() -> Iterator[None]:
    """Fixes the settings until every such context has ended, then restores the program's.

    The values restored are those that the program set last, also while the settings were fixed.
    """
    global _n_runs
    with _lock:
        _n_runs += 1
        if _n_runs == 1:
            _before[:] = [getattr(module, name) for module, name, _ in _PRESENT]
        fix_settings()
    try:
        yield
    finally:
        with _lock:
            _n_runs -= 1
            if _n_runs == 0:
                _give_back()


def fix_settings() -> object:
    """Sets the settings, inside of `fixed_settings`.

    Takes no lock: a thread that holds it may wait for one that calls this.

    Returns:
        A token; it is a new object whenever a setting was found changed.
    """
    global _state
    for index, (module, name, value) in enumerate(_PRESENT):
        if (found := getattr(module, name)) != value:
            _state = (
                object()
            )  # first: a thread that sees the setting restored must see this as well
            _before[index] = found
            setattr(module, name, value)
    filters: Any = warnings.filters
    if not filters or filters[0] is not _FILTER:
        _state = object()
        filters.insert(0, _FILTER)
    if not any(filters is known for known in _filter_lists):
        _filter_lists.append(filters)
    return _state


def _give_back() -> None:
    fix_settings()  # records values that the program has set since the last image
    for (module, name, _), value in zip(_PRESENT, _before):
        setattr(module, name, value)
    for filters in [*_filter_lists, warnings.filters]:
        with contextlib.suppress(ValueError):  # no more of it
            while True:
                filters.remove(_FILTER)
    _filter_lists.clear()
