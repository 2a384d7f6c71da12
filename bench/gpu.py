"""Measures fastbb on a GPU in three runs of less than eight minutes each: `make gpu RUN=1`.

    PYTHONPATH=.:kernels:bench python bench/gpu.py --run 1                # correctness and speed
    PYTHONPATH=.:kernels:bench python bench/gpu.py --run 2                # launch configurations
    PYTHONPATH=.:kernels:bench python bench/gpu.py --run 3                # NVIDIA's tools, the rest
    PYTHONPATH=.:kernels:bench python bench/gpu.py --run 1 --stage models # one section of a run
    PYTHONPATH=.:kernels:bench python bench/gpu.py --run 1 --dry-run      # a rehearsal on the CPU

Each run has results of its own. It uses the Python, torch and triton of the machine, installs and
downloads nothing, and skips what needs a package that is not installed. Every stage runs in its
own process with a time limit; the most important stages run first. A stage that fails, hangs or
crashes is named in the results, and the next stage runs. After a crash at one item, the other items
run in a new process. Results are written to bench/results/ after each stage.
"""

import argparse
import json
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import import_module
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from gpu_report import DRY_RUN, markdown
from gpu_work import FORK, Work, describe, end_with_parent, ending, leave, read_lines

RESULTS = Path(__file__).parent / "results"
BUDGET_S = 465.0  # including Python's start and end, a run takes less than eight minutes
RUNS = (1, 2, 3)
NO_GPU = 2  # exit code, as for wrong arguments
PROBE_S = 90.0
CUT_OFF = "cut off"
# modules that several stages import, each in a separate process; none of them touches CUDA
IMPORTED_AHEAD = (
    "torch._dynamo",
    "transformers.models.swin.modeling_swin",
    "transformers.models.resnet.modeling_resnet",
)
_MARGIN_S = 5.0  # time for a stage to end by itself, before its process is killed


@dataclass(frozen=True)
class Stage:
    """A part of the run with a separate process.

    Attributes:
        name: of the process.
        section: of the results with its rows; also the value of `--stage`.
        box_s: seconds reserved for it; unused time of earlier stages is added.
        run: function that is called in the process.
        module: of that function.
    """

    name: str
    section: str
    box_s: float
    run: Callable[[Work], None]
    module: str = ""


def stages_of(run: int, dry_run: bool) -> list[Stage]:
    """Returns the stages of a run in order."""

    def stage(name: str, box_s: float, module: str, function: str, *args: Any) -> Stage:
        def in_process(work: Work) -> None:
            getattr(import_module(module), function)(work, dry_run, *args)

        return Stage(name, name.partition(",")[0], box_s, in_process, module)

    environment = stage("environment", 20, "gpu_environment", "environment")
    stages = {
        1: [
            stage("checks, production binaries", 100, "gpu_checks", "production"),
            stage("models, main", 60, "gpu_models", "main_cells"),
            stage("devices", 25, "gpu_checks", "devices"),
            stage("models, compiling", 100, "gpu_models", "compile_ahead"),
            stage("models, compiled Swin-T", 50, "gpu_models", "compiled", "swin_t"),
            stage("models, compiled ResNet-50", 40, "gpu_models", "compiled", "resnet50"),
            stage("models, compiled Swin-B", 60, "gpu_models", "compiled", "swin_b"),
        ],
        2: [
            stage("sweep, compiling", 190, "gpu_sweep", "compile_ahead"),
            stage("sweep", 150, "gpu_sweep", "sweep"),
            stage("libraries", 20, "gpu_sweep", "libraries"),
            stage("conv3x3", 25, "gpu_sweep", "conv3x3"),
            stage("ops", 60, "gpu_ops", "ops"),
        ],
        3: [
            stage("tools, ncu", 150, "gpu_tools", "ncu"),
            stage("tools, memcheck", 80, "gpu_tools", "sanitize", "memcheck"),
            stage("tools, racecheck", 50, "gpu_tools", "sanitize", "racecheck"),
            stage("models, max-autotune Swin-T", 80, "gpu_models", "max_autotune", "swin_t"),
            stage("models, max-autotune ResNet-50", 40, "gpu_models", "max_autotune", "resnet50"),
            stage("checks, small cases", 25, "gpu_checks", "small"),
            stage("models, other precisions", 15, "gpu_models", "other_precisions"),
            stage("models, other batches", 5, "gpu_models", "other_batches"),
        ],
    }
    return [environment, *stages[run]]


class Results:
    """Results so far, and the two files that contain them."""

    def __init__(self, folder: Path, dry_run: bool, run: int = 1) -> None:
        self.folder = folder
        self.data: dict[str, Any] = {
            "label": DRY_RUN if dry_run else "measured",
            "run": run,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "stages": [],
            "sections": {},
        }
        self._stem: str | None = None

    def add(self, stage: Stage, outcome: str, seconds: float, file: Path) -> None:
        """Adds the rows of a stage, and writes the files."""
        found = read_lines(file)
        rows = [value["row"] for value in found if "row" in value]
        planned = dict.fromkeys(item for value in found for item in value.get("plan", []))
        reached = {row["item"] for row in rows}
        missing = [item for item in planned if item not in reached]
        if outcome == "finished" and missing:
            outcome = "finished as far as its time went"
        entry = {"stage": stage.name, "outcome": outcome, "seconds": round(seconds, 1)}
        pretended = [value["pretended"] for value in found if "pretended" in value]
        entry |= {"pretended": pretended[-1]} if pretended else {}
        self.data["stages"].append({**entry, "not_reached": missing})
        section = self.data["sections"].setdefault(stage.section, [])
        section += [{"stage": stage.name, "label": self.data["label"], **row} for row in rows]
        self.write()

    @property
    def stem(self) -> Path:
        """Path of the files without suffix; files of an earlier run are not overwritten."""
        if self._stem is None:
            facts = {row["item"]: row for row in self.data["sections"].get("environment", [])}
            name = "dry run" if self.data["label"] == DRY_RUN else "unknown GPU"
            name = facts.get("GPU", {}).get("value", name)
            slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
            stem = first = f"{slug}-run{self.data['run']}-{self.data['date'][:10]}"
            n = 1
            while (self.folder / f"{stem}.json").exists():
                n += 1
                stem = f"{first}-{n}"
            self._stem = stem
        return self.folder / self._stem

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        texts = {".json": json.dumps(self.data, indent=1) + "\n", ".md": markdown(self.data)}
        for suffix, text in texts.items():
            file = self.stem.with_name(self.stem.name + suffix)
            draft = file.with_name(f".{file.name}.{os.getpid()}")
            draft.write_text(text)
            draft.replace(file)


def run_stages(
    stages: Sequence[Stage], results: Results, budget_s: float, begin: float | None = None
) -> bool:
    """Runs stages one after the other; returns whether none failed.

    Args:
        stages: in order.
        results: gets the rows of each stage when it ends.
        budget_s: seconds for all of them; the boxes of stages shrink if they do not fit.
        begin: start of the budget, on the monotonic clock; default: now.
    """
    begin = time.monotonic() if begin is None else begin
    scale = min(1.0, budget_s / sum(stage.box_s for stage in stages))
    all_well = True
    with tempfile.TemporaryDirectory() as folder:
        for index, stage in enumerate(stages):
            file = Path(folder) / str(index)
            file.touch()
            later_s = scale * sum(other.box_s for other in stages[index + 1 :])
            start = time.monotonic()
            box_s = begin + budget_s - later_s - start
            outcome = "interrupted"
            try:
                outcome = _run_stage(stage, file, begin, box_s, results.folder)
            finally:  # also if this process is interrupted
                seconds = time.monotonic() - start
                print(f"[{start + seconds - begin:6.1f} s] {stage.name}: {outcome}", flush=True)
                results.add(stage, outcome, seconds, file)
            all_well &= outcome == "finished" or outcome.startswith((CUT_OFF, "not reached"))
    return all_well


def _run_stage(stage: Stage, file: Path, begin: float, box_s: float, out: Path) -> str:
    """Runs a stage, in another process after each crash; returns its outcome."""
    if box_s < 1:
        return "not reached: no time was left"
    print(f"[{time.monotonic() - begin:6.1f} s] {stage.name}: has {box_s:.0f} s", flush=True)
    end = time.monotonic() + box_s
    crashes = []
    while True:
        left_s = end - time.monotonic()
        outcome = _run_process(stage, file, begin, left_s, out)
        if outcome == "finished":
            return f"finished, after it {'; '.join(crashes)}" if crashes else outcome
        if outcome == CUT_OFF:
            return "; ".join([*crashes, f"{CUT_OFF} after {box_s:.0f} s"])
        crashes.append(outcome)
        if not _mark_crash(file, outcome) or end - time.monotonic() < 1:
            return "; ".join(crashes)


def _run_process(stage: Stage, file: Path, begin: float, box_s: float, out: Path) -> str:
    """Runs the remaining items of a stage in one process; returns the outcome of the process."""
    deadline = time.monotonic() + box_s - min(_MARGIN_S, box_s / 5)
    work = Work(stage.name, file, begin, deadline, out)
    process = FORK.Process(target=_child, args=(stage, work))
    process.start()
    try:
        process.join(box_s)
        is_late = process.is_alive()
    finally:
        _end_group(process)
    if is_late:
        return CUT_OFF
    if process.exitcode == 0:
        return "finished"
    errors = [value["error"] for value in read_lines(file) if "error" in value]
    is_error = process.exitcode == 1 and errors
    return f"failed: {errors[-1]}" if is_error else ending(process.exitcode)


def _mark_crash(file: Path, outcome: str) -> bool:
    """Records a crash at the running item; returns whether there is one, and others remain."""
    found = read_lines(file)
    began = [value["began"] for value in found if "began" in value]
    reached = {value["row"]["item"] for value in found if "row" in value}
    with file.open("a") as lines:
        for item in dict.fromkeys(began):
            if item not in reached:
                row = {"item": item, "problem": f"its process {outcome}"}
                lines.write("\n" + json.dumps({"row": row}) + "\n")
    planned = {item for value in found for item in value.get("plan", [])}
    is_new = bool(began) and not any(value.get("crashed") == len(began) for value in found)
    with file.open("a") as lines:
        lines.write(json.dumps({"crashed": len(began)}) + "\n")
    return is_new and bool(planned - set(began))


def _child(stage: Stage, work: Work) -> None:
    os.setsid()
    end_with_parent()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    try:
        stage.run(work)
    except Exception as error:
        traceback.print_exc()
        work.append({"error": describe(error)})
        leave(1)
    pretended = sys.modules.get("gpu_pretended")
    if pretended is not None and pretended.CALLS:
        work.append({"pretended": dict(pretended.CALLS)})
    leave(0)


def _end_group(process: BaseProcess) -> None:
    """Kills the process of a stage and its children."""
    assert process.pid is not None
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()  # it has ended, or has no process group yet
    process.join(10)


def why_no_gpu() -> str | None:
    """Returns why the stages cannot run here, or None. Imports torch, but does not touch CUDA."""
    try:
        import torch
    except ImportError as error:
        return f"{sys.executable} cannot import torch ({error})"

    def probe() -> None:
        os._exit(0 if torch.cuda.is_available() else 1)

    process = FORK.Process(target=probe)
    process.start()
    process.join(PROBE_S)
    if process.is_alive():
        process.kill()
        return f"the GPU does not answer within {PROBE_S:.0f} s"
    if process.exitcode != 0:
        return f"torch {torch.__version__} of {sys.executable} sees none"
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0, 1 if a stage failed, 2 without a GPU."""
    begin = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--run", type=int, choices=RUNS, default=1, help="run 1, 2 or 3; default: 1"
    )
    parser.add_argument("--out", type=Path, help="directory of the results; default: bench/results")
    parser.add_argument(
        "--budget",
        type=float,
        default=BUDGET_S,
        help="time limit of the run in seconds; default: %(default)g",
    )
    parser.add_argument(
        "--stage",
        action="append",
        help="run this section and the environment section only; may be repeated; default: all",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="run tiny cases on the CPU to test the run; the numbers are meaningless",
    )
    options = parser.parse_args(argv)
    stages = stages_of(options.run, options.dry_run)
    sections = list(dict.fromkeys(stage.section for stage in stages))
    wanted = {"environment", *(options.stage or sections)}
    if not wanted.issubset(sections):
        parser.error(f"--stage of run {options.run} must be one of {', '.join(sections)}")
    stages = [stage for stage in stages if stage.section in wanted]
    if options.budget <= 0:
        parser.error(f"--budget must be more than 0 seconds, got {options.budget:g}")
    out = options.out or RESULTS
    os.environ["HF_HUB_OFFLINE"] = "1"  # upstream's libraries then use no network
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if not options.dry_run:
        reason = why_no_gpu()
        if reason is not None:
            print(
                f"gpu.py: wanted a CUDA or ROCm GPU, and {reason}; choose another Python with "
                "`make gpu PYTHON=...`, or see what would run with --dry-run",
                file=sys.stderr,
            )
            return NO_GPU
        return _run(stages, Results(out, False, options.run), options.budget, begin)
    out = options.out or Path(tempfile.mkdtemp(prefix="fastbb-dry-run-"))
    if out.resolve() == RESULTS.resolve():
        parser.error(f"--out must not be {RESULTS} in a dry run: that is for measurements")
    with import_module("gpu_pretended").pretended_programs():
        return _run(stages, Results(out, True, options.run), options.budget, begin)


def _run(stages: Sequence[Stage], results: Results, budget_s: float, begin: float) -> int:
    import_ahead(stages)
    all_well = run_stages(stages, results, budget_s, begin)
    print(f"results: {results.stem}.json and {results.stem}.md")
    return 0 if all_well else 1


def import_ahead(stages: Sequence[Stage]) -> None:
    """Imports modules once, which the process of each stage would otherwise import."""
    for module in [*(stage.module for stage in stages), *IMPORTED_AHEAD]:
        with suppress(Exception):  # the stage that needs it reports the error
            import_module(module)


if __name__ == "__main__":
    leave(main())  # do not wait for a process that even SIGKILL does not end
