"""Features directories without a model: rows whose features follow from their number."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fastbb.extraction.layout import Shard, canonical_json, file_name, read_rows
from fastbb.extraction.store import FeatureWriter

OUTPUTS = {"pooled": {"shape": [16], "dtype": "float32"}}


@dataclass
class Row:
    """What a directory stores of the source of a row."""

    id: str
    path: str = "/images/0.png"
    columns: dict[str, Any] | None = None


def row(number: int, columns: dict[str, Any] | None = None) -> Row:
    return Row(f"{number:05d}.png", columns=columns)


def value(number: int, output: Mapping[str, Any]) -> Tensor:
    """Returns the features of a row."""
    generator = torch.Generator().manual_seed(number)
    return torch.randn(output["shape"], generator=generator).to(getattr(torch, output["dtype"]))


def make_plan(outputs: Mapping[str, Any] = OUTPUTS, shard_rows: int = 4) -> dict[str, Any]:
    """Returns a plan with the fields that are read."""
    names = ("image_processor_type", "resize", "size", "crop_size")
    return {
        "model": {"name": "tiny", "class": "ResNetBackbone", "weights_sha256": "0" * 64},
        "preprocessing": dict.fromkeys(names, "any"),
        "versions": {"torch": torch.__version__},
        "outputs": dict(outputs),
        "shard_rows": shard_rows,
        "batch_size": 2,
        "precision": "fp32",
        "device": "cpu",
        "mode": "eager",
        "runs": "eager",
    }


def content(
    numbers: Iterable[int], ids: Iterable[str], failed: Iterable[int], outputs: Mapping[str, Any]
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Returns tensors and index of a shard."""
    index: list[dict[str, Any]] = []
    ok: list[int] = []
    for number, id in zip(numbers, ids):
        entry = {"row": number, "id": id}
        if number in set(failed):
            index.append({**entry, "status": "error", "kind": "corrupt", "message": "no image"})
        else:
            index.append({**entry, "status": "ok", "pos": len(ok)})
            ok.append(number)
    tensors = {"row_id": torch.tensor(ok, dtype=torch.int64)}
    for name, output in outputs.items():
        empty = torch.empty(0, *output["shape"], dtype=getattr(torch, output["dtype"]))
        tensors[name] = torch.stack([value(n, output) for n in ok]) if ok else empty
    return tensors, index


@dataclass
class Directory:
    """A features directory that grows as commands would make it grow.

    Attributes:
        path: of the directory.
        outputs: of its plan.
        rows: of all generations.
        failed: numbers of the rows without features.
    """

    path: Path
    outputs: Mapping[str, Any] = field(default_factory=lambda: OUTPUTS)
    shard_rows: int = 4
    rows: list[Row] = field(default_factory=list)
    failed: set[int] = field(default_factory=set)

    def start(self, rows: Iterable[Row], failed: Iterable[int] = ()) -> "Directory":
        self._append("start", rows, failed)
        return self

    def update(self, rows: Iterable[Row], failed: Iterable[int] = ()) -> None:
        self._append("update", rows, failed)

    def retry(self, failed: Iterable[int] = ()) -> None:
        """Tries all failed rows again; `failed` fail again."""
        with self.open() as writer:
            failures = dict.fromkeys(sorted(self.failed), "corrupt")
            rows: Any = [(number, self.rows[number]) for number in failures]
            writer.append("retry", rows, failures)
            self.failed = set(failed)
            self._commit_all(writer)

    def _append(self, kind: Any, rows: Iterable[Row], failed: Iterable[int]) -> None:
        given: Any = list(enumerate(rows, len(self.rows)))
        self.rows += [row for _, row in given]
        self.failed |= set(failed)
        with self.open() as writer:
            writer.append(kind, given, inputs=("/images",))
            self._commit_all(writer)

    @contextmanager
    def open(self) -> Iterator[FeatureWriter]:
        with FeatureWriter(self.path) as writer:
            if not writer.plan:
                writer.start(make_plan(self.outputs, self.shard_rows))
            yield writer

    def commit(self, writer: FeatureWriter, shard: Shard) -> dict[str, Any]:
        """Computes a shard; again, if it was computed before."""
        rows = read_rows(self.path, shard)
        numbers, ids = [row["row"] for row in rows], [row["id"] for row in rows]
        return writer.commit(shard, *content(numbers, ids, self.failed, self.outputs))

    def _commit_all(self, writer: FeatureWriter) -> None:
        commits = [writer.committed(s) or self.commit(writer, s) for s in writer.shards]
        writer.finish(writer.totals(commits))

    def expected(self, name: str) -> Tensor:
        """Returns the features of the rows that are ok, in order."""
        ok = [number for number in range(len(self.rows)) if number not in self.failed]
        return torch.stack([value(number, self.outputs[name]) for number in ok])


def write_format_2(
    path: Path, n_rows: int = 10, failed: Iterable[int] = (3,), shard_rows: int = 4
) -> None:
    """Writes the files that fastbb 0.1 wrote."""
    for name in ("rows", "shards"):
        (path / name).mkdir(parents=True)
    shards, digests = [], []
    for first in range(0, n_rows, shard_rows):
        numbers = range(first, min(first + shard_rows, n_rows))
        ids = [row(number).id for number in numbers]
        data = b"".join(
            canonical_json({"row": n, "id": id, "path": f"/images/{id}"})
            for n, id in zip(numbers, ids)
        )
        (path / file_name("rows", len(digests))).write_bytes(data)
        digests.append(hashlib.sha256(data).hexdigest())
        shards.append(content(numbers, ids, failed, OUTPUTS))
    plan = {**make_plan(shard_rows=shard_rows), "format": 2, "inputs": ["/images"], "archives": {}}
    plan |= {"rows": n_rows, "rows_sha256": digests}
    plan["versions"] = {**plan["versions"], "fastbb": "0.1.0"}
    (path / "plan.json").write_bytes(canonical_json(plan))
    identity = hashlib.sha256(canonical_json(plan)).hexdigest()
    n_failed = len(set(failed))
    for shard, (tensors, index) in enumerate(shards):
        about = canonical_json({"plan_sha256": identity, "shard": shard}).decode().rstrip()
        files = {
            file_name("features", shard): safetensors.torch.save(tensors, {"fastbb": about}),
            file_name("index", shard): b"".join(map(canonical_json, index)),
        }
        for name, data in files.items():
            (path / name).write_bytes(data)
        n_errors = sum(entry["status"] == "error" for entry in index)
        commit = {
            "shard": shard,
            "plan_sha256": identity,
            "rows": len(index),
            "ok": len(index) - n_errors,
            "errors": {"corrupt": n_errors} if n_errors else {},
            "files": {
                Path(name).name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                for name, data in files.items()
            },
        }
        (path / file_name("commit", shard)).write_bytes(canonical_json(commit))
    manifest = {"format": 2, "plan_sha256": identity, "rows": n_rows, "shards": len(digests)}
    manifest |= {"ok": n_rows - n_failed, "errors": {"corrupt": n_failed} if n_failed else {}}
    (path / "manifest.json").write_bytes(canonical_json(manifest))
