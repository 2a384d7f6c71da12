"""Signals that end a command: raised where they arrive, and never lost.

A handler raises its exception at the current point of the main thread. In a weakref callback, in
`__del__` or in the garbage collector, Python swallows the exception; in a lock, an import or a C++
call it becomes another error. So the handler also sets a flag: `check_interrupted` reads it between
two batches, any error counts as the interruption once it is set, and the exception is raised again
every second until some block handles it.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_AGAIN_S = 1.0
_ECHO_S = 0.2  # wrappers such as `timeout` signal a process, and then its group
_received = 0  # number of the first signal
_received_at = 0.0
_raises = False  # whether handlers raise what they receive


class Interrupted(KeyboardInterrupt):
    """A signal asked the command to end."""


def interruption_code() -> int | None:
    """Exit code: 130 after SIGINT, 143 after SIGTERM, None if no signal came."""
    return 128 + _received if _received else None


def interruption_word() -> str:
    """Word for a user: "terminated" after SIGTERM, else "interrupted"."""
    return "terminated" if _received == signal.SIGTERM else "interrupted"


def check_interrupted() -> None:
    """Raises if a signal came, also if the exception of its handler was lost.

    Raises:
        Interrupted: inside `ending_on_signals` only.
    """
    if _received:
        raise Interrupted


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """Makes SIGINT and SIGTERM raise `Interrupted`; a second one ends the process at once.

    For commands. Does nothing outside the main thread. A signal that the process was started to
    ignore, as a shell does for jobs in the background, stays ignored.
    """
    global _received, _raises
    wanted = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    if threading.current_thread() is not threading.main_thread() or not wanted:
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before_hook = sys.unraisablehook

    def quiet(unraisable: Any) -> None:
        if not isinstance(unraisable.exc_value, Interrupted):  # which is raised once more
            before_hook(unraisable)

    sys.unraisablehook = quiet
    # Python runs handlers between two instructions; this hears signals inside a long call as well
    threading.Thread(target=_end_at_the_second, args=(reader,), daemon=True).start()
    before_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    handlers = {**dict.fromkeys(wanted, _interrupt), signal.SIGALRM: _raise_again}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        _raises = True
        try:
            check_interrupted()  # a signal that came in the lines above
            yield
        finally:
            _raises = False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            # None: not installed from Python, so it cannot be put back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(before_fd)
        os.close(writer)  # ends the thread, which closes the other end
        sys.unraisablehook = before_hook
        _received = 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _received, _received_at
    if _received:
        if time.monotonic() - _received_at > _ECHO_S:
            os._exit(128 + number)
        return
    _received, _received_at = number, time.monotonic()
    if _raises:
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_S, _AGAIN_S)
        raise Interrupted


def _raise_again(number: int, frame: FrameType | None) -> None:
    if _raises and _received and not _is_under_way():
        raise Interrupted


def _is_under_way() -> bool:
    """Whether some block of the main thread is handling the interruption, or cleaning up for it."""
    error: BaseException | None = sys.exc_info()[1]
    while error is not None:
        if isinstance(error, Interrupted):
            return True
        error = error.__context__
    return False


def _end_at_the_second(reader: int) -> None:
    first_at: float | None = None
    with suppress(OSError):
        while numbers := os.read(reader, 16):
            for number in numbers:
                if number not in _SIGNALS:
                    continue
                if first_at is None:
                    first_at = time.monotonic()
                elif time.monotonic() - first_at > _ECHO_S:
                    os._exit(128 + number)
    os.close(reader)


def _forget_in_child() -> None:
    if _raises:  # or a signal to a child would be taken for one to us
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget_in_child)
