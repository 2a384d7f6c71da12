"""A signal ends a command with the exit code of that signal, at any point of the program."""

import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from check_interrupts import SECOND_WITHIN_S, Interrupts, foreground_signals
from click.testing import CliRunner, Result
from PIL import Image

from fastbb.backbone import checkpoint
from fastbb.cli import main
from fastbb.engine import interruption, trial
from fastbb.engine.interruption import (
    Interrupted,
    check_interrupted,
    ending_on_signals,
    interruption_code,
)
from fastbb.extraction import open_features, pipeline
from fastbb.extraction.store import FeatureWriter

MODEL = "nano-resnet-digits"
GOES_ON = "the same command again goes on after the last finished shard"


@pytest.fixture(autouse=True)
def default_disposition() -> Iterator[None]:
    """Restores Python's handler of SIGINT, which is ignored in children of a background job."""
    with foreground_signals():
        yield


def send(number: signal.Signals = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


class Killer:
    """Sends the signal from `__del__`, where Python swallows the exception of the handler."""

    def __init__(self, number: signal.Signals = signal.SIGINT) -> None:
        self.number = number

    def __del__(self) -> None:
        send(self.number)


# the parts


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_raises_and_sets_the_exit_code(
    number: signal.Signals, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interruption, "_AGAIN_S", 600.0)  # a busy machine stops for a second
    with ending_on_signals():
        assert interruption_code() is None
        check_interrupted()
        with pytest.raises(Interrupted):
            send(number)
        assert interruption_code() == code
        with pytest.raises(Interrupted):
            check_interrupted()
    assert interruption_code() is None
    check_interrupted()


def test_handlers_and_timers_are_restored() -> None:
    names = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    before = [signal.getsignal(name) for name in names], sys.unraisablehook
    with ending_on_signals():
        assert signal.getsignal(signal.SIGTERM) is not before[0][1]
        with pytest.raises(Interrupted):
            send()
    assert before == ([signal.getsignal(name) for name in names], sys.unraisablehook)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize("place", ["__del__", "weakref callback"])
def test_an_interruption_that_python_swallows_is_raised_again(place: str, capsys: Any) -> None:
    with ending_on_signals():
        killer = Killer() if place == "__del__" else type("Plain", (), {})()
        _reference = weakref.ref(killer, lambda _: send()) if place != "__del__" else None
        del killer
        assert interruption_code() == 130
        with pytest.raises(Interrupted):
            check_interrupted()
        with pytest.raises(Interrupted):
            time.sleep(5)
    assert "Interrupted" not in capsys.readouterr().err


def test_a_finally_block_is_not_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interruption, "_AGAIN_S", 0.01)
    cleaned = []
    with ending_on_signals(), pytest.raises(Interrupted):
        try:
            send()
        finally:
            time.sleep(0.1)
            cleaned.append(True)
    assert cleaned


def test_an_ignored_signal_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the fixture undoes it
    with ending_on_signals():
        send()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert interruption_code() is None
        with pytest.raises(Interrupted):
            send(signal.SIGTERM)


def test_other_threads_install_no_signal_handlers() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def run() -> None:
        with ending_on_signals():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]


# signals anywhere in a run, also swallowed or inside another error: the command reports them


@pytest.fixture
def images(tmp_path: Path) -> Path:
    directory = tmp_path / "images"
    directory.mkdir()
    for i in range(6):
        Image.new("RGB", (9, 8), (40 * i, 40, 200)).save(directory / f"{i}.png")
    return directory


@pytest.fixture
def extract(images: Path, tmp_path: Path) -> Callable[..., Result]:
    def extract(*options: str) -> Result:
        arguments = ["extract", str(images), "--out", str(tmp_path / "out"), "--model", MODEL]
        arguments += ["--batch-size", "2", "--shard-rows", "2", *options]
        return CliRunner().invoke(main, arguments)

    return extract


def once(function: Callable[..., Any], before: Callable[[], None]) -> Callable[..., Any]:
    calls: list[None] = []

    def patched(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) == 1:
            before()
        return function(*args, **kwargs)

    return patched


def swallowed(number: signal.Signals = signal.SIGINT) -> None:
    Killer(number)  # collected at once


def turned_into(error: Exception) -> Callable[[], None]:
    def fail() -> None:
        try:
            send()
        except KeyboardInterrupt:
            raise error from None

    return fail


def broken_lock() -> None:
    try:
        send()
    except KeyboardInterrupt:
        threading.Lock().release()  # the error that `ThreadPoolExecutor.submit` raises for it


PLACES: dict[str, tuple[Any, str, Callable[[], None]]] = {
    "raised in a batch": (pipeline.FeatureExtractor, "_batch", send),
    "swallowed in a batch": (pipeline.FeatureExtractor, "_batch", swallowed),
    "swallowed in a commit": (FeatureWriter, "commit", swallowed),
    "swallowed while the mode is chosen": (pipeline.FeatureExtractor, "choose_mode", swallowed),
    "raised in a lock": (pipeline.ThreadPoolExecutor, "submit", broken_lock),
    "reading weights": (
        checkpoint.torch,
        "device",
        turned_into(OSError("the file is corrupt; delete it")),
    ),
    "in a C++ call": (
        pipeline.FeatureExtractor,
        "outputs",
        turned_into(RuntimeError("meta tensor")),
    ),
    "in an assertion": (FeatureWriter, "rows", turned_into(AssertionError("nothing"))),
    "before the command": (type(main), "make_context", send),
    "swallowed before the command": (type(main), "make_context", swallowed),
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_an_interruption_anywhere_exits_with_130_and_resumes(
    place: tuple[Any, str, Callable[[], None]],
    extract: Callable[..., Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    owner, name, before = place
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, once(getattr(owner, name), before))
        result = extract()
    assert result.exit_code == 130, result.output
    assert "Traceback" not in result.output and "corrupt" not in result.output
    if name != "make_context":
        assert f"interrupted; {GOES_ON}" in result.stderr
    assert not list(tmp_path.rglob("*.tmp-*"))
    resumed = extract()
    assert resumed.exit_code == 0 and "6 of 6 images have features" in resumed.stdout


def test_sigterm_exits_with_143_and_says_terminated(
    extract: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = once(pipeline.FeatureExtractor._batch, lambda: swallowed(signal.SIGTERM))
    monkeypatch.setattr(pipeline.FeatureExtractor, "_batch", batch)
    result = extract()
    assert result.exit_code == 143
    assert f"fastbb: terminated; {GOES_ON}" in result.stderr
    assert "reason    terminated\n" in open_features(tmp_path / "out").describe()


def test_an_interrupted_trial_is_not_remembered_as_a_failure() -> None:
    candidate = trial.Candidate("eager", lambda: lambda pixels: (broken_lock(), (pixels,))[1])
    with ending_on_signals(), pytest.raises(Interrupted):
        trial.run_trials(
            [candidate],
            torch.zeros(1),
            lambda maps: None,
            clock=lambda run: float(run() is None),
            budget_s=0.0,
            report=lambda text: None,
        )


def test_the_library_installs_no_handlers(images: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    seen = []

    def images_and_handlers() -> Iterator[Path]:
        for path in sorted(images.iterdir()):
            seen.append((signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)))
            yield path

    list(pipeline.FeatureExtractor(MODEL).stream(images_and_handlers()))
    assert set(seen) == {before}


# real processes


def test_a_second_signal_ends_even_a_long_call() -> None:
    """No Python handler runs while the main thread is inside a long C call."""
    program = (
        "import hashlib; from fastbb.engine.interruption import ending_on_signals\n"
        "with ending_on_signals():\n"
        "    print('ready', flush=True)\n"
        "    hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for _ in range(2):
            time.sleep(0.3)  # lets the call begin; and two signals at once would arrive as one
            process.send_signal(signal.SIGTERM)
        assert process.wait(SECOND_WITHIN_S) == 143


@pytest.mark.parametrize(("mode", "n"), [("eager", 10), ("compile", 2)])
def test_runs_interrupted_at_random_moments_resume(mode: str, n: int, tmp_path: Path) -> None:
    outcome = Interrupts(tmp_path, mode, n_images=400).check(n)
    assert not outcome.problems, str(outcome)
    assert outcome.n_interrupted > n // 2, str(outcome)
