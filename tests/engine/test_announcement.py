"""The line that says that a compilation goes on, once it takes long."""

import logging
import re
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
from engine_rig import EngineRig

from fastbb.engine import compile_cost

LINE = r"fastbb: compiling \w+Backbone in fp32 on cpu for 2x64x64 \((.*)\)"


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_cost, "ANNOUNCED_AFTER_S", 0.05)


def compile_slowly(rig: EngineRig, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns a prepared backbone, for which the compiler took 0.3 s."""

    def maps(*args: Any) -> Any:
        time.sleep(0.3)
        return rig.compiler.maps(*args)

    monkeypatch.setattr("fastbb.engine.ways.compile_maps", maps)
    return rig.prepare(mode="compile", example=rig.pixels)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "compiling" in record.getMessage()]


def test_a_long_compilation_says_what_and_how_long_it_took_before(
    rig: EngineRig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for usual in ("it may take minutes", r"300 ms the last time"):
        caplog.clear()
        backbone = compile_slowly(rig, monkeypatch)
        (line,) = lines(caplog)
        found = re.fullmatch(LINE, line)
        assert found and re.fullmatch(usual.replace("300", r"[3-9]\d\d"), found[1]), line
        (record,) = [r for r in caplog.records if r.getMessage() == line]
        assert record.levelno == logging.WARNING and record.name.startswith("fastbb.")
        rig.assert_right(backbone)


def test_a_short_compilation_says_nothing(rig: EngineRig, caplog: pytest.LogCaptureFixture) -> None:
    rig.prepare(mode="compile", example=rig.pixels)
    time.sleep(0.1)
    assert rig.compiler.compiled and not lines(caplog)


def test_a_failed_compilation_says_nothing_later(
    rig: EngineRig, caplog: pytest.LogCaptureFixture
) -> None:
    rig.compiler.error = RuntimeError("no compiler")
    with pytest.warns(UserWarning, match="no compiler"):
        rig.prepare(mode="compile", example=rig.pixels)
    time.sleep(0.1)
    assert not lines(caplog)


PROGRAM = """
import sys, time
{before}
from fastbb.engine import compile_cost
compile_cost.ANNOUNCED_AFTER_S = 0.05
with compile_cost._announced("fastbb: compiling it"):
    time.sleep(0.3)
"""


def run(before: str = "") -> Any:
    command = [sys.executable, "-c", PROGRAM.format(before=before)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_line_is_on_stderr_only_and_logging_silences_it() -> None:
    shown = run()
    assert (shown.returncode, shown.stdout, shown.stderr) == (0, "", "fastbb: compiling it\n")
    silence = "import logging; logging.getLogger('fastbb').setLevel(logging.ERROR)"
    silent = run(before=silence)
    assert (silent.returncode, silent.stdout, silent.stderr) == (0, "", "")


def test_a_progress_bar_does_not_share_the_line() -> None:
    bar = "from tqdm import tqdm; bar = tqdm(total=2, file=sys.stderr)"
    shown = run(before=bar).stderr
    assert re.search(r"[\r\n]fastbb: compiling it\n", shown), repr(shown)


def test_the_timer_keeps_no_process_alive_and_is_gone_after_the_block() -> None:
    def timers() -> list[threading.Thread]:
        return [t for t in threading.enumerate() if isinstance(t, threading.Timer)]

    with compile_cost._announced("nothing"):
        assert timers() and all(t.daemon for t in timers())
    for timer in timers():
        timer.join(0.04)  # less than it would wait
    assert not timers()
