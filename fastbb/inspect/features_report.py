"""`fastbb report`: one page about a features directory, which needs no other file.

The page is `features_report.html`, a Jinja template; here are the numbers and pictures on it.
"""

from __future__ import annotations

import base64
import contextlib
import io
import os
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..engine.explanation import printable
from ..extraction.decode import ImageError, decode, read_bytes
from ..extraction.export import check_outside
from ..extraction.features import Features, open_features, read_log
from ..extraction.layout import read_rows, write_file
from ..extraction.listing import archive_state
from ..extraction.outputs import unit_length
from ..extraction.pillow import fixed_settings
from ..extraction.sources import Source
from ..images.formats import EMBEDDED

# of the page; svg coordinates are these pixels
_PLOT_PX = (640, 300)
_THUMBNAIL_PX = 112
_N_POINTS = 2500
_N_QUERIES = 12
_N_NEIGHBOURS = 5
_N_PATHS = 5
_PAGES = (".html", ".htm")
# facts on the page; it has the others in other form
_FACTS = ("model", "pixels", "run", "outputs", "norm", "format", "history", "columns", "not read")
_ENDS = ("end", "stop")  # events of run.jsonl
# of ten classes: Tableau's palette
_COLORS = (
    *("#4e79a7", "#f28e2b", "#e15759", "#76b7b2", "#59a14f"),
    *("#edc948", "#b07aa1", "#ff9da7", "#9c755f", "#86bcb6"),
)
_OTHER = "#999999"
# carried columns that name the class of an image
_LABELS = ("label_name", "label", "class", "cls", "category")


@dataclass(frozen=True)
class _Point:
    x: float
    y: float
    color: str
    text: str


@dataclass(frozen=True)
class _Picture:
    """A thumbnail.

    Attributes:
        source: a data URL; None if the image cannot be read any more.
        id: of the row.
        note: the similarity, or why there is no picture.
    """

    source: str | None
    id: str
    note: str


@dataclass(frozen=True)
class _Run:
    """What run.jsonl says about a run.

    Attributes:
        start: local time of its start.
        device: that it ran on.
        rows: that it committed.
        seconds: that this took.
        end: "finished", or why it stopped; empty if the log does not say.
    """

    start: str
    device: str
    rows: int
    seconds: float
    end: str


def report(directory: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
    """Writes a page about a features directory: runs, speed, failures, features, neighbours.

    Thumbnails are read from the images where they still are.

    Args:
        directory: the output of an extraction, finished or not.
        out: the .html file to write.

    Returns:
        The file.

    Raises:
        FileNotFoundError: it is no features directory.
        ValueError: `out` is inside of it, or something other than a page is there.
        OutputError: the page cannot be written.
    """
    from jinja2 import Environment  # takes long to import, and comes with torch

    features, path = open_features(directory), Path(out)
    check_outside(path, features.directory)
    is_page = path.suffix.lower() in _PAGES and path.is_file() and not path.is_symlink()
    if os.path.lexists(path) and not is_page:
        raise ValueError(f"out: {path} is there, and is no .html file; give another place")
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["escaped"] = printable
    page = environment.from_string(template).render(_content(features))
    write_file(path, page.encode())
    return path


def _content(features: Features) -> dict[str, Any]:
    """Returns the values of the template."""
    events = list(read_log(features.directory))
    name = _vector_name(features)
    some = _Sample(features, name) if name and len(features) else None
    return {
        "directory": str(features.directory),
        "time": time.strftime("%Y-%m-%d %H:%M"),
        "facts": [(name, text) for name, text in features.facts() if name in _FACTS],
        "runs": _runs(events),
        "speed": _speed(events),
        "failures": _failures(features),
        "n_rows": len(features.mask),
        "n_ok": len(features),
        "complete": features.complete,
        "name": name,
        "plot_px": _PLOT_PX,
        "points": some.points() if some else [],
        "legend": some.legend if some else [],
        "n_shown": len(some.vectors) if some else 0,
        "explained": some.explained if some else (),
        "neighbours": some.neighbours() if some else [],
    }


def _runs(events: Sequence[dict[str, Any]]) -> list[_Run]:
    runs: list[_Run] = []
    starts = [i for i, event in enumerate(events) if event["event"] == "start"]
    for first, end in zip(starts, [*starts[1:], len(events)]):
        own = events[first:end]
        shards = [event for event in own if event["event"] == "shard"]
        ends = [event.get("reason", "finished") for event in own if event["event"] in _ENDS]
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(events[first]["time"]))
        device = str(events[first].get("device", ""))
        n_rows, seconds = (sum(event[name] for event in shards) for name in ("rows", "seconds"))
        runs.append(_Run(began, device, n_rows, seconds, str(ends[-1]) if ends else ""))
    return runs


def _speed(events: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Returns a step line of images/s over the seconds of computing, in plot coordinates."""
    shards = [event for event in events if event["event"] == "shard" and event["seconds"] > 0]
    if not shards:
        return None
    ends = list(accumulate(event["seconds"] for event in shards))
    speeds = [event["rows"] / event["seconds"] for event in shards]
    width, height = _PLOT_PX
    mean = sum(event["rows"] for event in shards) / ends[-1]
    top = 1.1 * min(max(speeds), 3 * mean) or 1.0  # of what is faster, the step leaves the plot
    corners: list[str] = []
    for start, end, speed in zip([0.0, *ends], ends, speeds):
        y = max(height * (1 - speed / top), 0.0)
        corners += [f"{width * t / ends[-1]:.1f},{y:.1f}" for t in (start, end)]
    return {
        "line": " ".join(corners),
        "seconds": ends[-1],
        "highest": top,
        "mean": mean,
        "slowest": min(speeds),
        "fastest": max(speeds),
        "n": len(shards),
    }


def _failures(features: Features) -> list[tuple[str, int, list[tuple[str, str]]]]:
    """Returns kind, number, and id with message of the first failures, most frequent first."""
    counts: Counter[str] = Counter()
    first: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for error in features.errors():
        counts[error.kind] += 1
        if len(first[error.kind]) < _N_PATHS:
            first[error.kind].append((error.id, error.message))
    return [(kind, n, first[kind]) for kind, n in counts.most_common()]


def _vector_name(features: Features) -> str | None:
    """Returns the name of the features to draw: vectors if there are some, else any."""
    outputs = features.plan["outputs"]
    return next((n for n, o in outputs.items() if len(o["shape"]) == 1), next(iter(outputs), None))


def _as_vectors(tensor: Tensor) -> Tensor:
    """Returns fp32 [n, C] of features; means over the positions of maps and tokens."""
    tensor = tensor.float()
    if tensor.ndim == 4:
        return tensor.mean((2, 3))
    return tensor.flatten(1, -2).mean(1) if tensor.ndim > 2 else tensor


class _Sample:
    """Evenly spread rows of a directory: their vectors, labels and images.

    Attributes:
        vectors: fp32 [n, C].
        legend: label and colour of the classes that the points show.
        explained: share of the variance that each of the two axes has.
    """

    def __init__(self, features: Features, name: str) -> None:
        self._features, self._name = features, name
        n_rows = len(features)
        self._is_vector = len(features.plan["outputs"][name]["shape"]) == 1
        step = -(-n_rows // _N_POINTS)
        parts, self._ids = [], list(islice(features.ids, 0, None, step))
        start = 0
        for ids, tensors in features.iter_shards([name]):
            parts.append(_as_vectors(tensors[name][-start % step :: step]))
            start += len(ids)
        self.vectors = torch.cat(parts)
        self._rows = features.row_ids[::step].tolist()
        labels = self._labels(step)
        counts = Counter(labels)
        common = [label for label, _ in counts.most_common(len(_COLORS))]
        self._color_of: dict[str, str] = dict(zip(sorted(common), _COLORS))
        self._point_labels = labels
        self.legend = list(self._color_of.items()) if len(counts) > 1 else []
        if self.legend and len(counts) > len(common):
            self.legend.append((f"{len(counts) - len(common):,} others", _OTHER))
        self.explained: tuple[float, ...] = ()

    def _labels(self, step: int) -> list[str]:
        columns = self._features.columns
        for name in _LABELS:
            if name in columns:
                return [str(value) for value in columns[name][::step]]
        return [PurePosixPath(id).parent.name for id in self._ids]

    def points(self) -> list[_Point]:
        """The rows on the two first principal components."""
        x = (self.vectors - self.vectors.mean(0)).double()
        if len(x) < 3:
            return []
        left, strengths, _ = torch.linalg.svd(x, full_matrices=False)
        plane = (left * strengths)[:, :2]
        if plane.shape[1] < 2:
            plane = torch.nn.functional.pad(plane, (0, 1))
        total = float(strengths.square().sum()) or 1.0
        self.explained = tuple((strengths[:2].square() / total).tolist())
        # the sign of a component is arbitrary: its largest value points right and up
        plane = plane * plane.gather(0, plane.abs().argmax(0, keepdim=True)).sign()
        low, high = plane.min(0).values, plane.max(0).values
        scaled = ((plane - low) / (high - low).clamp_min(1e-30) * 0.94 + 0.03).tolist()
        width, height = _PLOT_PX
        return [
            _Point(
                round(x * width, 1),
                round((1 - y) * height, 1),
                self._color_of.get(label, _OTHER) if self.legend else _COLORS[0],
                f"{id} ({label})" if self.legend and label else id,
            )
            for (x, y), id, label in zip(scaled, self._ids, self._point_labels)
        ]

    def neighbours(self) -> list[list[_Picture]]:
        """A dozen images, each followed by its nearest ones by cosine similarity."""
        n = len(self.vectors)
        positions = sorted({round(i * (n - 1) / (_N_QUERIES - 1)) for i in range(_N_QUERIES)})
        queries = self.vectors[positions]
        if self._is_vector:
            found = self._features.search(queries, _N_NEIGHBOURS + 1, self._name)
            rows, scores, ids = found.rows.tolist(), found.scores.tolist(), found.ids
        else:  # among the sample, as means are not stored
            unit = unit_length(self.vectors)
            best = (unit[positions] @ unit.T).topk(min(_N_NEIGHBOURS + 1, n))
            rows = [[self._rows[i] for i in line] for line in best.indices.tolist()]
            scores = best.values.tolist()
            ids = [[self._ids[i] for i in line] for line in best.indices.tolist()]
        own = [self._rows[i] for i in positions]
        thumbnails = _Thumbnails(self._features, {*own, *(row for line in rows for row in line)})
        lines = []
        for position, row, others, values, names in zip(positions, own, rows, scores, ids):
            line = [thumbnails.picture(row, self._ids[position], "")]
            for other, value, name in zip(others, values, names):
                if other != row and len(line) <= _N_NEIGHBOURS:
                    line.append(thumbnails.picture(other, str(name), f"{value:.3f}"))
            lines.append(line)
        return lines


class _Thumbnails:
    """Small pictures of some rows, read from where the images are."""

    def __init__(self, features: Features, rows: set[int]) -> None:
        # each with whether its archive is another one now
        self._sources: dict[int, tuple[Source, bool]] = {}
        first = 0
        for generation in features.generations:
            archives = generation.archives.items()
            changed = {path for path, state in archives if _is_other(path, state)}
            for shard in generation.shards:
                last = first + (shard.rows if generation.kind != "retry" else 0)
                if generation.kind == "retry" or any(first <= row < last for row in rows):
                    for row in read_rows(features.directory, shard):
                        if (number := row.pop("row")) in rows:
                            self._sources[number] = Source(**row), row["path"] in changed
                first = last

    def picture(self, row: int, id: str, note: str) -> _Picture:
        try:
            source, changed = self._sources[row]
            if changed:
                raise ImageError("io", "the archive was changed")
            with fixed_settings():
                image = decode(read_bytes(source))
        except ImageError as error:
            return _Picture(None, id, f"{note} {error.message}".strip())
        ImageOps.exif_transpose(image, in_place=True)
        image = image.convert("RGBA")
        image.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX), Image.Resampling.LANCZOS)
        paper = Image.new("RGB", image.size, "white")
        paper.paste(image, mask=image.getchannel("A"))
        file = io.BytesIO()
        paper.save(file, EMBEDDED[0], quality=85)
        data = base64.b64encode(file.getvalue()).decode()
        return _Picture(f"data:{EMBEDDED[1]};base64,{data}", id, note)


def _is_other(path: str, state: Mapping[str, int]) -> bool:
    """Returns whether an archive is no longer the one that was listed; one that is gone is not."""
    with contextlib.suppress(OSError):
        return archive_state(path) != state
    return False
