"""Interrupts real runs of `fastbb extract` at random moments, and resumes them.

    python scripts/check_interrupts.py --eager 200 --compiling 30

Every run gets a SIGINT or (a quarter) a SIGTERM, and some get a second signal. A run has to end in
time with the exit code of its signal, unless it was complete. A second run of the same command has
to leave the same files, byte for byte, as a run without an interruption.
"""

import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import click
import torch
from PIL import Image

MODEL = "nano-resnet-digits"
N_IMAGES, BATCH_SIZE, SHARD_ROWS = 1500, 8, 64
SECOND_AFTER_S, SECOND_WITHIN_S = 0.4, 1.0
PATIENCE_S = 120.0
# limit after the signal: a batch of this model takes milliseconds
WITHIN_S = {"eager": 2.0, "compile": 10.0}
# a shell's exit codes of processes that died of a signal before they could handle it
CODES = {signal.SIGINT: (130, -signal.SIGINT), signal.SIGTERM: (143, -signal.SIGTERM)}


@dataclass
class Outcome:
    """Outcome of the interrupted runs of a mode.

    Attributes:
        n_interrupted: runs that ended with the exit code of the signal.
        n_complete: runs that were complete, or nearly, when the signal came.
        seconds: from the last signal to the end, of each interrupted run.
        problems: a line for each error.
    """

    n_interrupted: int = 0
    n_complete: int = 0
    seconds: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        text = f"{self.n_interrupted} interrupted, {self.n_complete} complete"
        if self.seconds:
            median, largest = statistics.median(self.seconds), max(self.seconds)
            text += f"; ended {median:.2f} s after the signal (median), at most {largest:.2f} s"
        return "\n".join([text, *self.problems])


class Interrupts:
    """Runs of one mode over the same images.

    Args:
        folder: an empty directory.
        mode: of `fastbb extract`, "eager" or "compile".
        n_images: number of images to extract.
    """

    def __init__(self, folder: Path, mode: str, n_images: int = N_IMAGES) -> None:
        self.folder, self.mode = folder, mode
        self.images = folder / "images"
        self.images.mkdir(parents=True)
        for i in range(n_images):
            color = (i % 256, i // 256 * 40, 90)
            Image.new("RGB", (12, 10), color).save(self.images / f"{i:05d}.png")
        start = time.monotonic()
        with self._started("whole") as process:
            _, message = process.communicate(timeout=PATIENCE_S)
        self.seconds = time.monotonic() - start
        if process.returncode != 0:
            raise RuntimeError(f"a run that nobody interrupts fails: {message}")
        self.whole = tree(folder / "whole")

    def check(self, n: int, seed: int = 0) -> Outcome:
        """Interrupts and resumes `n` runs."""
        outcome, chance = Outcome(), random.Random(seed)
        for index in range(n):
            number = signal.SIGTERM if index % 4 == 3 else signal.SIGINT
            is_twice, delay = index % 5 == 4, chance.uniform(0, self.seconds)
            problem = self._interrupt(f"run-{index}", number, delay, is_twice, outcome)
            problem = problem or self._resume(f"run-{index}")
            if problem is not None:
                what = f"{self.mode} run {index}, {number.name} after {delay:.2f} s"
                outcome.problems.append(f"{what}: {problem}")
        return outcome

    def _interrupt(
        self, name: str, number: signal.Signals, delay: float, is_twice: bool, outcome: Outcome
    ) -> str | None:
        """Interrupts a run; returns the problem of its end, or None."""
        with self._started(name) as process:
            time.sleep(delay)
            process.send_signal(number)
            sent, within = time.monotonic(), WITHIN_S[self.mode]
            if is_twice:
                time.sleep(SECOND_AFTER_S)
                process.send_signal(number)
                sent, within = time.monotonic(), SECOND_WITHIN_S
            _, message = process.communicate(timeout=PATIENCE_S)
            seconds = time.monotonic() - sent
        code = process.returncode
        if code == 0 and (self.folder / name / "manifest.json").exists():
            outcome.n_complete += 1
            return None
        # Python itself was interrupted, and has its own exit code for that
        is_starting = "Fatal Python error: init_" in message and "KeyboardInterrupt" in message
        if code not in CODES[number] and not is_starting:
            return f"exit code {code}: {message}"
        outcome.n_interrupted += 1
        outcome.seconds.append(seconds)
        if code > 0 and not is_starting and ("Traceback" in message or "delete it" in message):
            return f"it says something else: {message}"
        if seconds > within:
            return f"it ended after {seconds:.1f} s, wanted {within:.1f} s at most: {message}"
        return None

    def _resume(self, name: str) -> str | None:
        with self._started(name) as process:
            _, message = process.communicate(timeout=PATIENCE_S)
        if process.returncode != 0:
            return f"the resumed run exits with {process.returncode}: {message}"
        found = tree(self.folder / name)
        different = sorted(
            path for path in found.keys() | self.whole if found.get(path) != self.whole.get(path)
        )
        return f"the resumed run differs in {different[:3]}" if different else None

    @contextmanager
    def _started(self, out: str) -> Iterator[subprocess.Popen[str]]:
        options = {"--model": MODEL, "--mode": self.mode, "--out": self.folder / out}
        options |= {"--batch-size": BATCH_SIZE, "--shard-rows": SHARD_ROWS}
        with start_extraction(self.images, options, self.folder / "inductor" / out) as process:
            yield process


@contextmanager
def start_extraction(
    images: Path, options: dict[str, object], cache: Path
) -> Iterator[subprocess.Popen[str]]:
    """Starts `fastbb extract` with Python's own handling of SIGINT, which it may not inherit.

    Args:
        images: folder of the images.
        options: of the command.
        cache: of the compiler; with a new cache, a run compiles.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(torch.get_num_threads()),  # the order of sums may depend on it
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
    }
    command = [sys.executable, "-c", "from fastbb.cli import main; main()", "extract", str(images)]
    command += [str(part) for option in options.items() for part in option]
    with foreground_signals():
        process = subprocess.Popen(
            command, env=environment, text=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


@contextmanager
def foreground_signals() -> Iterator[None]:
    """Makes children receive SIGINT as at a terminal; a background job ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def tree(directory: Path) -> dict[str, bytes]:
    """Reads all files that must be equal for equal plans, by name."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name not in ("run.jsonl", ".lock")
    }


@click.command()
@click.option("--eager", default=200, show_default=True, help="Runs in mode eager.")
@click.option("--compiling", default=30, show_default=True, help="Runs in mode compile.")
@click.option("--seed", default=0, show_default=True)
def main(eager: int, compiling: int, seed: int) -> None:
    """Runs the checks; exits with 1 if a run did not end as it should."""
    failed = False
    for mode, n in (("eager", eager), ("compile", compiling)):
        if n:
            with tempfile.TemporaryDirectory() as folder:
                interrupts = Interrupts(Path(folder), mode)
                click.echo(f"{mode}: a whole run takes {interrupts.seconds:.1f} s")
                outcome = interrupts.check(n, seed)
            click.echo(f"{mode}, {n} runs: {outcome}")
            failed = failed or bool(outcome.problems)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
