"""What the processes of `gpu.py` share: their rows, their time, and how they end."""

import ctypes
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

# a fork starts at once with torch imported; CUDA is only ever touched in the last of them
FORK = multiprocessing.get_context("fork")

_PR_SET_PDEATHSIG = 1

Item = TypeVar("Item")


class Work:
    """What a stage is given: where its rows go, and until when."""

    def __init__(self, name: str, file: Path, begin: float, deadline: float) -> None:
        """
        Args:
            name: of the stage.
            file: that rows are appended to, one JSON value per line, by all processes of a stage.
            begin: of the whole run, on the monotonic clock.
            deadline: when no new item is begun any more, on the same clock.
        """
        self.name, self.file, self.begin, self.deadline = name, file, begin, deadline
        self._done = {value["began"] for value in read_lines(file) if "began" in value}

    @property
    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    def plan(self, items: Sequence[str]) -> None:
        """Says what is going to be done; items without a row are reported as not reached."""
        self.append({"plan": list(items)})

    def row(self, item: str, **values: Any) -> None:
        """Adds a row to the results."""
        self.append({"row": {"item": item, **values}})

    def say(self, text: str) -> None:
        """Prints a line of progress."""
        print(f"[{time.monotonic() - self.begin:6.1f} s] {self.name}: {text}", flush=True)

    def in_time(self, items: dict[str, Item]) -> Iterator[tuple[str, Item]]:
        """The items, by name, until the time is over; not those an earlier process began."""
        self.plan(list(items))
        for name, item in items.items():
            if name in self._done:
                continue
            if self.left_s <= 0:
                return
            self.append({"began": name})
            yield name, item

    def in_processes(self, tasks: dict[str, Callable[[], dict[str, Any]]], n_at_once: int) -> None:
        """Runs each task in a process of its own; what it returns, or its problem, is its row."""
        self.plan(list(tasks))
        waiting, running = list(tasks), dict[str, BaseProcess]()
        n_done = 0
        while (waiting or running) and self.left_s > 0:
            while waiting and len(running) < n_at_once:
                name = waiting.pop(0)
                running[name] = FORK.Process(target=self._task, args=(name, tasks[name]))
                running[name].start()
            time.sleep(0.02)
            for name in [name for name, process in running.items() if not process.is_alive()]:
                exit_code = running.pop(name).exitcode
                n_done += 1
                if exit_code != 0:
                    self.row(name, problem=f"its process {ending(exit_code)}")
                    self.say(f"{name}: its process {ending(exit_code)}")
                elif n_done % 10 == 0:
                    self.say(f"{n_done} of {len(tasks)} done")
        for process in running.values():
            process.kill()

    def _task(self, name: str, task: Callable[[], dict[str, Any]]) -> None:
        end_with_parent()
        try:
            values = task()
        except Exception as error:
            values = {"problem": describe(error)}
        self.row(name, **values)
        leave(0)

    def append(self, value: dict[str, Any]) -> None:
        """Adds a line to the file."""
        with self.file.open("a") as file:
            file.write(json.dumps(value) + "\n")


def leave(exit_code: int) -> None:
    """Ends this process without the clean-up of libraries, which can hang where CUDA failed."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def end_with_parent() -> None:
    """Has the kernel end this process when the one that started it is gone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def ending(exit_code: int | None) -> str:
    """How a process ended, to follow its name."""
    if exit_code is not None and exit_code < 0:
        return f"ended by {signal.Signals(-exit_code).name}"
    return f"ended with exit code {exit_code}"


def describe(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The values of a stage's file, but for a line that was cut off."""
    values = []
    for line in file.read_text(errors="replace").splitlines():
        try:
            values.append(json.loads(line))
        except ValueError:
            continue
    return values
