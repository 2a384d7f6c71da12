"""Rows, deadlines and processes of the stages of `gpu.py`."""

import ctypes
import json
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, TypeVar

# a fork starts at once with torch imported; only processes that do not fork touch CUDA
FORK = multiprocessing.get_context("fork")

_PR_SET_PDEATHSIG = 1

Item = TypeVar("Item")
Tasks = Mapping[str, Callable[[], dict[str, Any]]]


class Work:
    """Argument of a stage: its file for rows, and its deadline."""

    def __init__(self, name: str, file: Path, begin: float, deadline: float, out: Path) -> None:
        """
        Args:
            name: of the stage.
            file: to which all processes of a stage append rows, one JSON value per line.
            begin: start of the whole run, on the monotonic clock.
            deadline: time after which no new item begins, on the same clock.
            out: folder of the results, for other files.
        """
        self.name, self.file, self.begin, self.deadline = name, file, begin, deadline
        self.out = out
        self._done = {value["began"] for value in read_lines(file) if "began" in value}

    @property
    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    def plan(self, items: Sequence[str]) -> None:
        """Announces the items of a stage; those without a row are reported as not reached."""
        self.append({"plan": list(items)})

    def row(self, item: str, **values: Any) -> None:
        """Adds a row to the results."""
        self.append({"row": {"item": item, **values}})

    def say(self, text: str) -> None:
        """Prints a line of progress."""
        print(f"[{time.monotonic() - self.begin:6.1f} s] {self.name}: {text}", flush=True)

    def in_time(self, items: dict[str, Item]) -> Iterator[tuple[str, Item]]:
        """Yields items by name until the deadline, without those that an earlier process began."""
        self.plan(list(items))
        for name, item in items.items():
            if name in self._done:
                continue
            if self.left_s <= 0:
                return
            self.append({"began": name})
            yield name, item

    def in_processes(
        self,
        tasks: Tasks,
        n_at_once: int,
        task_s: float = math.inf,
    ) -> None:
        """Runs tasks in several processes; the row of a task is its result, or its problem.

        A process runs one task after the other, until one of them finds a problem; then a new
        process runs the following tasks.

        Args:
            tasks: by name; tasks that an earlier process of this stage began are left out.
            n_at_once: number of processes.
            task_s: seconds after which a task is killed.
        """
        self.plan(list(tasks))
        waiting = [name for name in tasks if name not in self._done]
        running: list[_Worker] = []
        n_ended = 0
        try:
            while (waiting or any(worker.task for worker in running)) and self.left_s > 0:
                while waiting and len(running) < min(n_at_once, len(tasks)):
                    running.append(_Worker(self, tasks))
                for worker in running:
                    if waiting and worker.task is None:
                        self.append({"began": waiting[0]})
                        worker.begin(waiting.pop(0))
                ready = wait([worker.replies for worker in running], timeout=0.1)
                for worker in [*running]:
                    ended = worker.ended(worker.replies in ready, task_s)
                    if ended is None:
                        continue
                    n_ended += 1
                    if ended:
                        self.row(worker.task or "", problem=ended)
                        self.say(f"{worker.task}: {ended}")
                    elif n_ended % 20 == 0:
                        self.say(f"{n_ended} of {len(tasks)} done")
                    worker.task = None
                    if not worker.is_fine:
                        worker.end()
                        running.remove(worker)
        finally:
            for worker in running:
                worker.end()

    def do(self, name: str, task: Callable[[], dict[str, Any]]) -> bool:
        """Runs a task here and writes its row; returns whether it found no problem."""
        try:
            values = task()
        except Exception as error:
            values = {"problem": describe(error)}
        self.row(name, **values)
        return not (values.get("problem") or values.get("problems"))

    def append(self, value: dict[str, Any]) -> None:
        """Adds a line to the file."""
        with self.file.open("a") as file:
            file.write(json.dumps(value) + "\n")


class _Worker:
    """A process that runs tasks by their names.

    Attributes:
        task: the running task, or None.
        is_fine: whether it may run another task.
        replies: receives after each task whether it found no problem.
    """

    def __init__(self, work: Work, tasks: Tasks) -> None:
        self.task: str | None = None
        self.is_fine = True
        self._began = 0.0
        self.replies, other_end = FORK.Pipe()
        self._process = FORK.Process(target=self._run, args=(work, tasks, other_end))
        self._process.start()
        other_end.close()

    def begin(self, name: str) -> None:
        self.task, self._began = name, time.monotonic()
        try:
            self.replies.send(name)
        except OSError:  # the process has ended; `ended` finds that out
            self.is_fine = False

    def ended(self, is_ready: bool, task_s: float) -> str | None:
        """Returns the end of its task: "" if normal, else that of the process; None: it runs."""
        if self.task is None:
            return None
        if is_ready:
            try:
                self.is_fine = self.replies.recv()
                return ""
            except (EOFError, OSError):
                self.is_fine = False
                self._process.join(10)
                return f"its process {ending(self._process.exitcode)}"
        if time.monotonic() - self._began > task_s:
            self.is_fine = False
            return f"ended after {task_s:g} s"
        return None

    def end(self) -> None:
        self._process.kill()
        self._process.join(10)
        self.replies.close()

    @staticmethod
    def _run(work: Work, tasks: Tasks, orders: Any) -> None:
        end_with_parent()
        while True:
            name = orders.recv()  # killed when there are no more tasks
            orders.send(work.do(name, tasks[name]))


def leave(exit_code: int) -> None:
    """Ends this process without the clean-up of libraries, which can hang after a CUDA error."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def end_with_parent() -> None:
    """Asks the kernel to end this process when its parent ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def ending(exit_code: int | None) -> str:
    """Describes the end of a process, as text after its name."""
    if exit_code is not None and exit_code < 0:
        return f"ended by {signal.Signals(-exit_code).name}"
    return f"ended with exit code {exit_code}"


def describe(error: BaseException) -> str:
    """Formats an error on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Reads the values of a stage's file, without an incomplete last line."""
    values = []
    for line in file.read_text(errors="replace").splitlines():
        try:
            values.append(json.loads(line))
        except ValueError:
            continue
    return values
