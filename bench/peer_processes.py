"""Measurements in fresh processes: the time to a first result, and peak memory.

Each measurement of each peer runs in a separate process, which `peers.py` starts:

    python bench/peer_processes.py MEASUREMENT CELL PEER WEIGHTS     # prints JSON

CELL contains the fields of a `Cell` as JSON, WEIGHTS is a safetensors file. So the process of a
peer loads no library of other peers.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peer_models import PEERS, Cell, Peer, StateDict, freezing, random_weights
from safetensors.torch import load_file, save_file

N_REPEATS = 3  # of the calls after a first result


def first_result(cell: Cell, peers: Mapping[str, Peer], timeout_s: float) -> dict[str, Any]:
    """Measures seconds from a loaded model to its first result, without and with compiler cache."""
    with _Processes(cell, timeout_s) as processes:
        rows = {}
        for name, peer in peers.items():
            rows[name] = row = {"peer": name}
            row |= _renamed(processes.run("first_result", peer), seconds="cold_s")
            if peer.compiles and "reason" not in row:
                row |= _renamed(processes.run("first_result", peer), seconds="warm_s")
    return {**asdict(cell), "title": cell.title, "peers": rows}


def second_size(cell: Cell, peers: Mapping[str, Peer], timeout_s: float) -> dict[str, Any]:
    """Measures seconds to a first result in a second image size, if a peer compiles any size."""
    with _Processes(cell, timeout_s) as processes:
        rows = {
            name: {"peer": name, **processes.run("second_size", peer)}
            for name, peer in peers.items()
            if peer.compiles and peer.any_size
        }
    return {**asdict(cell), "title": cell.title, "peers": rows}


def memory(cell: Cell, peers: Mapping[str, Peer], timeout_s: float) -> dict[str, Any]:
    """Measures the largest resident memory of a process that runs one peer."""
    with _Processes(cell, timeout_s) as processes:
        rows = {
            name: {"peer": name, **processes.run("memory", peer)} for name, peer in peers.items()
        }
    return {**asdict(cell), "title": cell.title, "peers": rows}


SECTIONS_IN_PROCESSES: dict[str, Callable[[Cell, Mapping[str, Peer], float], dict[str, Any]]] = {
    "first_result": first_result,
    "second_size": second_size,
    "memory": memory,
}


def _renamed(measured: dict[str, Any], **names: str) -> dict[str, Any]:
    return {names.get(name, name): value for name, value in measured.items()}


class _Processes:
    """Starts processes for one cell; the caches of each peer begin empty."""

    def __init__(self, cell: Cell, timeout_s: float) -> None:
        self.cell = cell
        self.timeout_s = timeout_s
        self._folder = tempfile.TemporaryDirectory()
        self._weights = Path(self._folder.name) / "weights.safetensors"

    def __enter__(self) -> "_Processes":
        state = random_weights(self.cell)
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, self._weights)
        return self

    def __exit__(self, *exception: object) -> None:
        self._folder.cleanup()

    def run(self, measurement: str, peer: Peer) -> dict[str, Any]:
        """Runs a process; returns its measurement, or `reason`, why there is none."""
        cache = str(Path(self._folder.name) / peer.name.replace(" ", "-"))
        # the cache of the compiler, and our cache of measurements
        caches = {"TORCHINDUCTOR_CACHE_DIR": cache, "XDG_CACHE_HOME": cache}
        cell = json.dumps(asdict(self.cell))
        arguments = [sys.executable, __file__, measurement, cell, peer.name, str(self._weights)]
        try:
            done = subprocess.run(
                arguments,
                env={**os.environ, **caches},
                capture_output=True,
                text=True,
                timeout=self.timeout_s,
            )
        except subprocess.TimeoutExpired:
            return {"reason": f"took longer than {self.timeout_s:.0f} s"}
        if done.returncode:
            errors = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            return {"reason": errors[-1][:300]}
        return json.loads(done.stdout.splitlines()[-1])


def _first_result(cell: Cell, peer: Peer, state: StateDict) -> dict[str, Any]:
    model = peer.load(cell, state)
    pixels = peer.pixels(cell.pixels())
    start = time.perf_counter()
    peer.start(model, cell).run(pixels)
    return {"seconds": time.perf_counter() - start}


def _second_size(cell: Cell, peer: Peer, state: StateDict) -> dict[str, Any]:
    size = cell.size + 32  # 256 after 224
    started = peer.start(peer.load(cell, state), cell)
    started.run(peer.pixels(cell.pixels()))
    pixels = peer.pixels(cell.pixels(size))
    start = time.perf_counter()
    with freezing():
        started.run(pixels)
    first_s = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(N_REPEATS):
        started.run(pixels)
    return {"size": size, "first_s": first_s, "next_s": (time.perf_counter() - start) / N_REPEATS}


def _memory(cell: Cell, peer: Peer, state: StateDict) -> dict[str, Any]:
    started = peer.start(peer.load(cell, state), cell)
    del state
    pixels = peer.pixels(cell.pixels())
    started.run(pixels)
    measured = {"start_mb": _peak_mb()}
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except OSError:
        return measured
    for _ in range(N_REPEATS):
        started.run(pixels)
    return {**measured, "run_mb": _peak_mb()}


def _peak_mb() -> float:
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024 / 1e6  # the kernel's kB are 1024 bytes


_MEASUREMENTS = {"first_result": _first_result, "second_size": _second_size, "memory": _memory}


def main() -> None:
    measurement, fields, peer, weights = sys.argv[1:]
    fields = json.loads(fields)
    cell = Cell(**{**fields, "stages": tuple(fields["stages"])})
    warnings.simplefilter("ignore")  # from exporters
    with torch.no_grad():
        measured = _MEASUREMENTS[measurement](cell, PEERS[peer], load_file(weights))
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
