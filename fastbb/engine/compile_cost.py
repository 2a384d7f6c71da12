"""Decides whether compiling pays: the seconds that it takes against the seconds that it saves.

Converting for OpenVINO counts as compiling, with seconds of its own.
"""

import logging
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

from torch import Tensor

from fastbb_kernels.result_cache import ResultCache

from .measuring import Clock, duration
from .openvino import OPENVINO
from .trial import Run

logger = logging.getLogger(__name__)

ANNOUNCED_AFTER_S = 3.0


class Usual(NamedTuple):
    """What is usual of ways that a compiler or a converter builds.

    Attributes:
        seconds: to build, of a model that was not built on this machine yet (Swin-T and
            ResNet-50, 2 cores of a CPU).
        gain: share of the time of a forward pass.
        verb: what takes these seconds.
        nobody_said: why it is not tried where nobody said how many images come.
    """

    seconds: float
    gain: float
    verb: str
    nobody_said: str


USUAL = {
    "compile": Usual(
        90.0,
        0.15,
        "compiling",
        "compiling takes a minute or more: say expected_images=, or mode='compile'",
    ),
    OPENVINO: Usual(
        6.0,
        0.2,
        "converting for OpenVINO",
        "converting takes seconds: say expected_images=, or mode='openvino'",
    ),
}


@contextmanager
def _announced(text: str) -> Iterator[None]:
    """Logs a line if the block has not ended after `ANNOUNCED_AFTER_S`.

    As a warning, which Python's logging shows on stderr unless the program asks for less.
    """
    timer = threading.Timer(ANNOUNCED_AFTER_S, _announce, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _announce(text: str) -> None:
    # a bar would share the line with the text
    bar = getattr(sys.modules.get("tqdm"), "tqdm", None)
    with nullcontext() if bar is None else bar.external_write_mode(file=sys.stderr):
        logger.warning(text)


class CompileCost:
    """Decides for one backbone whether compiling pays for the images that are expected.

    Args:
        expected_images: number of images to come, or None if nobody said.
        plain: builds the run for a shape of pixels without a compiler.
        clock: times a call.
        cache: remembers how long compiling took.
        key: name of the model and its precision in the cache.
    """

    def __init__(
        self,
        expected_images: int | None,
        plain: Callable[[Tensor], Run],
        clock: Clock,
        cache: ResultCache,
        key: str,
    ) -> None:
        self._expected = expected_images
        self._plain, self._clock, self._cache, self._key = plain, clock, cache, key
        self._first_s_per_pixel: float | None = None
        self._s_per_pixel: float | None = None

    def compile_s(self, name: str) -> float:
        """Seconds that a way takes to build: of this model on this machine, if measured."""
        measured = self._measured_s(name)
        return USUAL[_kind(name)].seconds if measured is None else measured

    def _measured_s(self, name: str) -> float | None:
        measured = self._cache.get(f"{_kind(name)}_s", self._key)
        return float(measured) if isinstance(measured, (int, float)) else None

    @contextmanager
    def compiling(self, name: str, what: str) -> Iterator[Callable[[], None]]:
        """Says that building in the block goes on.

        Yields a function that remembers the time since the start of the block; it is to be called
        if something was built, not found on disk.

        Args:
            name: of the way.
            what: is compiled, for the message.
        """
        measured = self._measured_s(name)
        usual = "it may take minutes" if measured is None else f"{duration(measured)} the last time"
        with _announced(f"fastbb: {USUAL[_kind(name)].verb} {what} ({usual})"):
            started = time.perf_counter()
            yield lambda: self.record(name, time.perf_counter() - started)

    def record(self, name: str, seconds: float) -> None:
        """Stores the seconds that a way took to build."""
        self._cache.put(f"{_kind(name)}_s", self._key, round(seconds, 1))

    def saved_s(self, name: str, pixel_values: Tensor) -> float:
        """Seconds that a way saves on all expected images of this size [B, C, H, W]."""
        at_most = self._at_most_saved_s(name, pixel_values)
        if self._s_per_pixel is None:
            if at_most < self.compile_s(name):
                return at_most
            time = self._time(pixel_values)
            time()
            n_pixels = len(pixel_values) * pixel_values.shape[2:].numel()
            self._s_per_pixel = statistics.median(time() for _ in range(3)) / n_pixels
        return self._s_per_pixel * self._saved_pixels(name, pixel_values)

    def _at_most_saved_s(self, name: str, pixel_values: Tensor) -> float:
        """Does the same by the first run of one image, which is never faster than later ones."""
        if self._first_s_per_pixel is None:
            few = pixel_values[:1]
            self._first_s_per_pixel = self._time(few)() / few.shape[2:].numel()
        return self._first_s_per_pixel * self._saved_pixels(name, pixel_values)

    def _saved_pixels(self, name: str, pixel_values: Tensor) -> float:
        n_pixels = pixel_values.shape[2:].numel() * (self._expected or 0)
        return n_pixels * USUAL[_kind(name)].gain

    def why_not(self, name: str, pixel_values: Tensor) -> str | None:
        """The reason why building a way for this size does not pay, or None if it does."""
        if self._expected is None:
            return USUAL[_kind(name)].nobody_said
        return self._compared(name, self.saved_s(name, pixel_values))

    def why_not_measured(self, name: str, saved_s_per_image: float) -> str | None:
        """Does the same as `why_not`, with the measured seconds saved on an image."""
        if self._expected is None:
            return USUAL[_kind(name)].nobody_said
        return self._compared(name, saved_s_per_image * self._expected)

    def wasted(self, name: str, pixel_values: Tensor) -> str | None:
        """The reason why building a way surely does not pay for the expected images, or None.

        It runs one image at most, because the way is built anyway.
        """
        if self._expected is None:
            return None
        return self._compared(name, self._at_most_saved_s(name, pixel_values))

    def _compared(self, name: str, saved_s: float) -> str | None:
        if saved_s >= self.compile_s(name):
            return None
        takes = f"{USUAL[_kind(name)].verb} takes about {duration(self.compile_s(name))}"
        return f"{takes} and would save about {duration(saved_s)} on {self._expected} images"

    def _time(self, pixel_values: Tensor) -> Callable[[], float]:
        run = self._plain(pixel_values)
        return lambda: self._clock(lambda: run(pixel_values))


def _kind(name: str) -> str:
    return OPENVINO if name == OPENVINO else "compile"
