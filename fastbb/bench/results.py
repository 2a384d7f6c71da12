"""Results of a bench: plain data, as the JSON file has it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 1


@dataclass
class Way:
    """One way to run the model of a cell.

    Attributes:
        name: "transformers eager", "timm compiled", "OpenVINO", "fastbb auto" ...
        ours: whether fastbb runs.
        reason: why there are no times, or None.
        dropped: whether that is because time was up.
        failed: whether that is an error, and not a choice.
        wrong: why its result is beyond the accuracy rule, or None.
        note: what a reader of its numbers should know.
        error: largest difference from upstream in float64, relative to the largest magnitude of the
            same map (of a host: output); None where it was not compared.
        allowed: largest error that passes, of the map with the largest share of it.
        errors: error by map.
        cold_start_s: seconds from the start of a process to its first result, with empty caches of
            compilers: imports, building the model, preparing, the first call.
        compile_s: seconds of these that prepare, convert or compile; 0 where nothing does.
        memory_bytes: peak memory while it runs: on a CPU resident memory above that after imports,
            on a GPU that of PyTorch's allocator.
        rounds_s: seconds of each call, by round; all ways of a cell have the same rounds.
        inside_s: of a host, seconds of each call inside the modules that fastbb replaces, by round.
    """

    name: str
    ours: bool = False
    reason: str | None = None
    dropped: bool = False
    failed: bool = False
    wrong: str | None = None
    note: str = ""
    error: float | None = None
    allowed: float | None = None
    errors: dict[str, float] = field(default_factory=dict)
    cold_start_s: float | None = None
    compile_s: float | None = None
    memory_bytes: int | None = None
    rounds_s: list[list[float]] = field(default_factory=list)
    inside_s: list[list[float]] | None = None


@dataclass
class Cell:
    """All ways of one model at one precision and batch.

    Attributes:
        model: as it was asked for.
        kind: "backbone", or "host" for `--accelerate`.
        precision: "fp32", "tf32", "bf16" or "fp16".
        batch: images per call.
        asked_batch: images per call that were asked for; more than `batch` where memory ran out.
        size: (height, width) of the images, pixels.
        upstream: name of the way that the others are held to.
        ways: upstream first.
        stages: maps that are returned; of a host empty.
        params: number of parameters of upstream's model.
        macs: multiply-adds of one image by upstream's matrix products and convolutions, or None.
        activations: elements that these write, for one image, or None.
        rates: of the machine right after the cell, see `rates.Rates`; empty where not measured.
        traffic: bytes and launches of one forward pass on a GPU by way, counted; empty where it was
            not asked for. Keys of a value: "bytes", "launches", "reason".
        notes: sentences about the cell.
        clocks: of the GPU between rounds, see `environment.gpu_state`.
    """

    model: str
    kind: str
    precision: str
    batch: int
    asked_batch: int
    size: tuple[int, int]
    upstream: str
    ways: list[Way] = field(default_factory=list)
    stages: tuple[str, ...] = ()
    params: int | None = None
    macs: int | None = None
    activations: int | None = None
    rates: dict[str, float] = field(default_factory=dict)
    traffic: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    clocks: list[dict[str, Any]] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, str, str, int, tuple[int, int]]:
        """What makes two cells of two files the same."""
        return self.kind, self.model, self.precision, self.asked_batch, self.size

    def way(self, name: str) -> Way | None:
        return next((way for way in self.ways if way.name == name), None)


@dataclass
class Results:
    """Everything that a bench measured.

    Attributes:
        command: that made it, a line.
        environment: hardware, versions and date, see `environment.describe`.
        options: of the command, for a repetition.
        cells: in the order of measurement.
        end_to_end: of `--end-to-end`, see `end_to_end.EndToEnd`.
        notes: sentences about the whole bench.
        interrupted: whether it was ended before it was through.
    """

    command: str
    environment: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)
    end_to_end: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, value: Any) -> Results:
        """The inverse of `to_dict`, also after JSON.

        Raises:
            ValueError: the value is something else.
        """
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            got = value.get("format") if isinstance(value, dict) else type(value).__name__
            raise ValueError(f"wanted results of fastbb bench of format {FORMAT}, got {got!r}")
        fields = {name: one for name, one in value.items() if name != "format"}
        for name in ("environment", "options"):
            if not isinstance(fields.get(name, {}), dict):
                raise ValueError(f"results of fastbb bench are damaged: {name}")
        try:
            cells = [
                Cell(
                    **{
                        **cell,
                        "size": tuple(cell["size"]),
                        "stages": tuple(cell["stages"]),
                        "ways": [_way(way) for way in cell["ways"]],
                    }
                )
                for cell in fields.pop("cells")
            ]
            return cls(**fields, cells=cells)
        except (TypeError, KeyError) as error:
            raise ValueError(f"results of fastbb bench are damaged: {error}") from error

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Results:
        """Reads a file that `fastbb bench --json` wrote.

        Raises:
            ValueError: it is no such file.
            OSError: it cannot be read.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except OSError as error:
            raise OSError(f"{path} cannot be read: {error.strerror or error}") from error
        except ValueError as error:  # of JSON, of UTF-8, or ours
            raise ValueError(
                f"{path}: not a file of `fastbb bench --json`: {str(error).splitlines()[0]}"
            ) from error


def _way(value: dict[str, Any]) -> Way:
    """Reads a way from JSON.

    Raises:
        TypeError: its times are something else.
    """
    way = Way(**value)
    for rounds in (way.rounds_s, [] if way.inside_s is None else way.inside_s):
        if not all(isinstance(seconds, float | int) for calls in rounds for seconds in calls):
            raise TypeError(f"times of {way.name} are no numbers")
    return way
