"""Shows the progress of a long run and the approximate remaining time."""

import io
import shutil
import sys
from typing import Any, TextIO

# between two lines without a terminal
_LINES_S = 20.0
_FORMAT = "{percentage:3.0f}% done in {elapsed}, about {remaining} left: {desc}"


class Progress:
    """A bar on a terminal, otherwise a line now and then; both on stderr."""

    def __init__(self, total: int, file: TextIO | None = None) -> None:
        """Starts the display.

        Args:
            total: sum of the weights of all steps.
            file: where to write; default: stderr.
        """
        from tqdm import tqdm

        stream = file or sys.stderr
        options: dict[str, Any] = {"total": total, "desc": "starting", "smoothing": 0}
        if stream.isatty():
            # tqdm shows nothing on a terminal that reports zero lines
            ncols, nrows = shutil.get_terminal_size()
            options |= {"ncols": ncols, "nrows": nrows}
            bar = "{bar:20} " + _FORMAT
            self._bar = tqdm(file=stream, bar_format=bar, leave=False, **options)
        else:
            options |= {"mininterval": _LINES_S, "miniters": 1}
            self._bar = tqdm(file=_Lines(stream), bar_format=_FORMAT, **options)

    def begin(self, what: str) -> None:
        """Names the current step."""
        self._bar.set_description_str(what, refresh=False)

    def step(self, weight: int) -> None:
        """Counts a step that has ended."""
        self._bar.update(weight)

    def close(self) -> None:
        """Ends the display."""
        self._bar.close()


class _Lines(io.TextIOBase):
    """Writes each state of a bar as a separate line."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> int:
        if text.strip():
            self._file.write(text.strip() + "\n")
        return len(text)

    def flush(self) -> None:
        self._file.flush()
