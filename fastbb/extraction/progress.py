"""Progress of an extraction, on stderr."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from types import TracebackType
from typing import Any

_SECONDS_PER_LINE = 30.0


class Progress:
    """A bar on a terminal, else a line at intervals; a context manager.

    Args:
        enabled: whether anything is shown.

    Attributes:
        n_done: rows that are done, those of earlier runs included.
    """

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._bar: Any = None
        self._n_rows = self._n_first = self.n_done = 0
        self._started = self._last_line = time.perf_counter()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def say(self, text: str) -> None:
        """Shows a line."""
        if self._enabled and sys.stderr is not None:
            # a full, closed or ASCII stderr: the run does not depend on it
            with suppress(OSError, ValueError):
                print(text, file=sys.stderr, flush=True)

    def start(self, n_rows: int, n_done: int) -> None:
        """Begins to count up to `n_rows`; a bar that there was is closed."""
        self._close()
        self._n_rows, self._n_first, self.n_done = n_rows, n_done, n_done
        self._started = self._last_line = time.perf_counter()
        if self._enabled and sys.stderr is not None and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=n_rows, initial=n_done, unit=" images", dynamic_ncols=True)

    def advance(self, n_rows: int) -> None:
        """Counts rows, and shows how many there are, how fast, and the time left.

        Args:
            n_rows: less than 0 for rows that are not done after all.
        """
        self.n_done += n_rows
        now = time.perf_counter()
        if self._bar is not None:
            self._bar.update(n_rows)
        elif n_rows > 0 and now - self._last_line >= _SECONDS_PER_LINE:
            self._last_line = now
            speed = (self.n_done - self._n_first) / (now - self._started)
            left_s = (self._n_rows - self.n_done) / speed
            self.say(
                f"{self.n_done:,} of {self._n_rows:,} images, {speed:,.1f} images/s, "
                f"{left_s / 60:,.1f} minutes left"
            )
