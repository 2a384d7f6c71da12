"""Compares fastbb with other ways to run backbones on a CPU.

    python bench/peers.py --json peers.json --plot peers.png    # every cell, one to two hours
    python bench/peers.py --model resnet50 --dtype float32 --batch 8 --only peers
    python bench/peers.py --only memory --only early_exit

A cell is a model, a dtype and a batch size. The peers of a cell are built once and then take turns:
in every round each peer runs for some seconds, and each round begins with another peer, so that
other load on the machine affects all of them. The tables show medians over all repetitions, and the
lowest and highest median of a round. --repeats N adds N repetitions in new processes. All peers get
the same weights, images and number of threads, and return all four stages. Their maps are compared
once with those of transformers' eager fp32.

The other sections measure one cell for each model, with the first dtype and the largest batch size:
time to the first result, time to the first result at a second size, peak memory (each in a new
process), and `out_indices=(1,)`.
"""

import argparse
import gc
import importlib.metadata
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from peer_models import DTYPES, MODELS, PEERS, Cell, Peer, Skip, random_weights
from peer_report import report
from torch import Tensor

LARGEST_FP32_DIFFERENCE = 1e-3
LARGEST_BF16_DIFFERENCE = 4.0  # times the error of transformers' eager bf16
UPSTREAM = "transformers eager"
SECTIONS = ("peers", "first_result", "second_size", "memory", "early_exit")
LIBRARIES = (
    *("torch", "triton", "transformers", "timm", "openvino", "onnxruntime", "onnx", "onnxscript"),
    *("numpy", "fastbb"),
)
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")


@dataclass
class Result:
    """Result of one peer in one cell.

    Attributes:
        reason: why it has no time; None if it has one.
        note: explanation of its number for readers.
        start_s: from a loaded model to the first result, seconds; compiled code may come from a
            cache.
        differences: largest difference to transformers' eager fp32 map over that map's largest
            value, by stage; None without transformers.
        differs: whether a map differs by more than rounding explains.
        rounds_s: seconds of each repetition, by round.
    """

    peer: str
    reason: str | None = None
    note: str = ""
    start_s: float | None = None
    differences: dict[str, float] | None = None
    differs: bool = False
    rounds_s: list[list[float]] = field(default_factory=list)


def interleave(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[dict[str, list[list[float]]], dict[str, str]]:
    """Times calls in turns; each round begins with the next call.

    Args:
        calls: by name, after their warm-up.
        rounds: number of turns of each call.
        seconds: duration of a turn. A turn has at least one repetition, and three if they fit in
            four times that duration.
        clock: returns seconds, from any start.

    Returns:
        Seconds of every repetition by round, and the reasons of those that failed.
    """
    names = list(calls)
    times: dict[str, list[list[float]]] = {name: [] for name in names}
    reasons: dict[str, str] = {}
    for turn in range(rounds):
        first = turn % max(len(names), 1)
        for name in names[first:] + names[:first]:
            if name in reasons:
                continue
            try:
                times[name].append(_repeat(calls[name], seconds, clock))
            except Exception as error:
                reasons[name] = reason_of(error)
                del times[name]
    return times, reasons


def _repeat(call: Callable[[], object], seconds: float, clock: Callable[[], float]) -> list[float]:
    taken: list[float] = []
    while not taken or sum(taken) < (4 * seconds if len(taken) < 3 else seconds):
        start = clock()
        call()
        taken.append(clock() - start)
    return taken


def reason_of(error: BaseException) -> str:
    """Formats an exception on one line."""
    text = (str(error).strip().splitlines() or [""])[0][:300]
    if isinstance(error, Skip):
        return text
    if isinstance(error, ImportError):
        return f"{text}: pip install 'fastbb[bench]'"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def relative_differences(
    got: Sequence[Tensor], want: Sequence[Tensor], stages: Sequence[str]
) -> dict[str, float]:
    """Returns, by stage, the largest difference over the wanted map's largest value; NaN: inf."""
    if len(got) != len(want):
        raise ValueError(f"returned {len(got)} maps instead of {len(want)}")
    differences = {}
    for stage, ours, theirs in zip(stages, got, want):
        if ours.shape != theirs.shape:
            raise ValueError(f"{stage}: shape {tuple(ours.shape)} instead of {tuple(theirs.shape)}")
        difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        differences[stage] = difference if difference == difference else float("inf")
    return differences


class CellRun:
    """All peers of one cell in this process."""

    def __init__(self, cell: Cell, peers: Mapping[str, Peer]) -> None:
        self.cell = cell
        self.peers = peers
        self.state = random_weights(cell)
        self.pixels = cell.pixels()
        self.reference = self._upstream_maps("float32")
        self.allowed = dict.fromkeys(cell.stages, LARGEST_FP32_DIFFERENCE)
        if cell.dtype == "bfloat16" and self.reference is not None:
            eager = self._upstream_maps(cell.dtype)
            assert eager is not None
            lost = relative_differences(eager, self.reference, cell.stages)
            self.allowed = {s: LARGEST_BF16_DIFFERENCE * loss for s, loss in lost.items()}

    def measure(self, rounds: int, seconds: float) -> dict[str, Result]:
        results: dict[str, Result] = {}
        calls: dict[str, Callable[[], object]] = {}
        for name, peer in self.peers.items():
            results[name] = result = Result(name)
            try:
                calls[name] = self._start(peer, result)
            except Exception as error:
                result.reason = reason_of(error)
            took = "" if result.start_s is None else f"first result after {result.start_s:.1f} s"
            _say(f"{self.cell.title}: {name}: {result.reason or took}")
        times, reasons = interleave(calls, rounds, seconds)
        for name, reason in reasons.items():
            results[name].reason = reason
        for name, rounds_s in times.items():
            results[name].rounds_s = rounds_s
        return results

    def _upstream_maps(self, dtype: str) -> list[Tensor] | None:
        peer = PEERS[UPSTREAM]
        cell = Cell(**{**asdict(self.cell), "dtype": dtype})
        try:
            model = peer.load(cell, self.state)
        except ImportError:
            return None
        return peer.maps(model(self.pixels.to(cell.torch_dtype)), cell, self.state)

    def _start(self, peer: Peer, result: Result) -> Callable[[], object]:
        model = peer.load(self.cell, self.state)
        pixels = peer.pixels(self.pixels)
        start = time.perf_counter()
        started = peer.start(model, self.cell)
        maps = started.run(pixels)
        result.start_s = time.perf_counter() - start
        result.note = started.note
        if self.reference is not None:
            maps = peer.maps(maps, self.cell, self.state)
            stages = self.cell.stages
            result.differences = relative_differences(maps, self.reference, stages)
            own = peer.own_maps.get(self.cell.model.family, ())
            result.differs = any(
                stage not in own and difference > self.allowed[stage]
                for stage, difference in result.differences.items()
            )
        return lambda: started.run(pixels)


def measure_cell(
    cell: Cell, peers: Mapping[str, Peer], rounds: int, seconds: float
) -> dict[str, Any]:
    """Measures a cell; returns its JSON."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from exporters
        results = CellRun(cell, peers).measure(rounds, seconds)
    gc.collect()
    torch._dynamo.reset()  # its code caches count every model of this process
    return summarize(cell, results)


def summarize(cell: Cell, results: Mapping[str, Result]) -> dict[str, Any]:
    """Computes statistics of a cell.

    Returns:
        The cell's fields, `peers` by name, and, where both sides have a time: `best_ours`,
        `best_peer` and `ratio` of their images/s, `eager_ratio` to transformers' eager. A peer
        whose result differs is never the best.
    """
    peers: dict[str, dict[str, Any]] = {}
    for name, result in results.items():
        peers[name] = asdict(result)
        if result.rounds_s:
            taken = [one for one_round in result.rounds_s for one in one_round]
            medians = [cell.batch / statistics.median(one_round) for one_round in result.rounds_s]
            peers[name] |= {
                "images_per_s": cell.batch / statistics.median(taken),
                "lowest": min(medians),
                "highest": max(medians),
                "repetitions": len(taken),
            }
    summary: dict[str, Any] = {**asdict(cell), "title": cell.title, "peers": peers}
    speed = {
        name: row["images_per_s"]
        for name, row in peers.items()
        if "images_per_s" in row and not row["differs"]
    }
    ours = [name for name in speed if name.startswith("fastbb")]
    others = [name for name in speed if name not in ours]
    if ours and others:
        best_ours, best_peer = (max(names, key=speed.__getitem__) for names in (ours, others))
        summary |= {
            "best_ours": best_ours,
            "best_peer": best_peer,
            "ratio": speed[best_ours] / speed[best_peer],
        }
    if UPSTREAM in speed and "fastbb eager" in speed:
        summary["eager_ratio"] = speed["fastbb eager"] / speed[UPSTREAM]
    return summary


def early_exit(cell: Cell, rounds: int, seconds: float) -> dict[str, Any]:
    """Measures the first stage only; transformers computes all stages and discards the others."""
    cell = Cell(**{**asdict(cell), "stages": ("stage1",)})
    return measure_cell(
        cell, {name: PEERS[name] for name in (UPSTREAM, "fastbb eager")}, rounds, seconds
    )


def repeat(options: argparse.Namespace) -> dict[str, Any]:
    """Measures the peers again in a new process; returns its cells, or a reason if it has none."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "repeat.json"
        arguments = [sys.executable, __file__, "--only", "peers", "--repeats", "0"]
        arguments += ["--json", str(path), "--rounds", str(options.rounds)]
        arguments += ["--seconds", str(options.seconds), "--size", str(options.size)]
        for name in ("model", "dtype", "batch", "peers"):
            for value in getattr(options, name):
                arguments += [f"--{name}", str(value)]
        arguments += ["--tiny"] * options.tiny
        done = subprocess.run(arguments, stdout=subprocess.DEVNULL)
        if not path.exists():
            return {"reason": f"the process ended with {done.returncode}"}
        return {"cells": json.loads(path.read_text())["cells"]}


def machine() -> dict[str, Any]:
    """Returns hardware and versions on which the numbers depend."""
    cpuinfo = _read("/proc/cpuinfo")
    facts = dict(line.split(":", 1) for line in cpuinfo.splitlines() if ":" in line)
    facts = {name.strip(): value.strip() for name, value in facts.items()}
    flags = facts.get("flags", "").split()
    versions = {}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            versions[library] = ""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return {
        "cpu": facts.get("model name", ""),
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "transparent_hugepages": _read("/sys/kernel/mm/transparent_hugepage/enabled").strip(),
        "load_average": _read("/proc/loadavg").split()[:3],
        "python": sys.version.split()[0],
        "versions": versions,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip(),
    }


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = partial(parser.add_argument, action="append")
    add("--model", choices=list(MODELS), help="model to measure; may be repeated; default: all")
    add(
        "--dtype", choices=list(DTYPES), help="dtype of the weights; may be repeated; default: both"
    )
    add("--batch", type=int, help="batch size; may be repeated; default: 1 and 8")
    add(
        "--peers",
        choices=list(PEERS),
        metavar="NAME",
        help=f"one of {', '.join(PEERS)}; may be repeated",
    )
    add("--only", choices=SECTIONS, help="measure only this section; may be repeated")
    add("--skip", choices=SECTIONS, help="skip this section; may be repeated")
    parser.add_argument("--size", type=int, help="height and width of the images; default: 224")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of a cell; default: 3")
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="time of each peer in a round; default: 3"
    )
    parser.add_argument(
        "--repeats", type=int, default=1, help="repetitions in new processes; default: 1"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=900,
        help="time limit of a process in seconds; default: 900",
    )
    parser.add_argument(
        "--tiny", action="store_true", help="use tiny models and 64 px, to test the script"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="file of the results")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="file of the plot")
    parser.add_argument(
        "--markdown",
        action="store_true",
        help="print tables only, without the description of the machine",
    )
    options = parser.parse_args()
    if options.rounds < 1 or options.seconds < 0:
        parser.error("--rounds must be 1 or more, --seconds 0 or more")
    options.model = options.model or list(MODELS)
    options.dtype = options.dtype or list(DTYPES)
    options.batch = options.batch or [1, 8]
    options.peers = options.peers or list(PEERS)
    options.size = options.size or (64 if options.tiny else 224)
    chosen = options.only or SECTIONS
    options.sections = [s for s in SECTIONS if s in chosen and s not in (options.skip or [])]
    return options


def measure_all(options: argparse.Namespace, save: Callable[[dict[str, Any]], None]) -> bool:
    """Runs the requested measurements, and saves after every step.

    Returns:
        Whether anything was measured.
    """
    from peer_processes import SECTIONS_IN_PROCESSES

    peers = {name: PEERS[name] for name in options.peers}
    wanted = {name: getattr(options, name) for name in ("size", "rounds", "seconds", "tiny")}
    data: dict[str, Any] = {"machine": machine(), "options": wanted, "cells": [], "repeats": []}
    measured = False
    if "peers" in options.sections:
        for model, dtype, batch in product(options.model, options.dtype, options.batch):
            cell = Cell(model, dtype, batch, options.size, options.tiny)
            summary = measure_cell(cell, peers, options.rounds, options.seconds)
            measured |= any(row["rounds_s"] for row in summary["peers"].values())
            data["cells"].append(summary)
            save(data)
        for _ in range(options.repeats):
            _say("once more in a new process")
            data["repeats"].append(repeat(options))
            save(data)
    for section in options.sections[options.sections.count("peers") :]:
        data[section] = []
        for model in options.model:
            cell = Cell(model, options.dtype[0], max(options.batch), options.size, options.tiny)
            _say(f"{section}: {cell.title}")
            if section == "early_exit":
                row = early_exit(cell, options.rounds, options.seconds)
                measured |= any(one["rounds_s"] for one in row["peers"].values())
            else:
                row = SECTIONS_IN_PROCESSES[section](cell, peers, options.timeout)
                measured |= any("reason" not in one for one in row["peers"].values())
            data[section].append(row)
            save(data)
    return measured


def main() -> int:
    options = parse()
    data: dict[str, Any] = {}

    def save(state: dict[str, Any]) -> None:
        data.update(state)
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(state, indent=1) + "\n")

    measured = measure_all(options, save)
    print(report(data, with_machine=not options.markdown))
    if options.plot and data.get("cells"):
        from peers_plot import plot  # needs matplotlib, the extra `plot`

        plot(data, options.plot)
    return 0 if measured else 1


if __name__ == "__main__":
    sys.exit(main())
