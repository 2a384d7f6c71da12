"""Verification of a features directory: every file is read and held to the others."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .layout import (
    FORMAT,
    ExtractionError,
    PlanMismatchError,
    Shard,
    canonical_json,
    file_name,
    file_sha256,
    logs,
    read_index,
    read_rows,
)
from .reading import Reader

_AGAIN = "extract again: the shard is computed again"
_ELSEWHERE = "extract again into another directory"
_N_SHOWN = 20
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_DTYPES |= {
    f"{sign}{bits}": f"{name}{bits}"
    for sign, name in (("I", "int"), ("U", "uint"))
    for bits in (8, 16, 32, 64)
}


@dataclass(frozen=True)
class VerifyReport:
    """The outcome of a verification; shown as lines of text.

    Attributes:
        directory: of the features.
        problems: files that are damaged, missing or at odds with others, each with what to do.
        notes: files that do no harm and belong to nothing.
        rows: number of rows of the directory.
        ok: rows that have features.
        errors: number of failed rows by kind.
        shards: number of shards.
        n_bytes: that were read.
    """

    directory: Path
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    rows: int
    ok: int
    errors: dict[str, int]
    shards: int
    n_bytes: int

    @property
    def passed(self) -> bool:
        """Whether the directory is complete and nothing in it is damaged."""
        return not self.problems

    def __repr__(self) -> str:
        n = len(self.problems)
        failed = sum(self.errors.values())
        counts = f"{self.ok:,} rows with features, {failed:,} failed, {self.shards:,} shards"
        verdict = "good" if self.passed else f"{n:,} problem{'s' * (n != 1)}"
        lines = [f"{self.directory}: {verdict}; {counts}, {self.n_bytes / 1e6:,.1f} MB read"]
        lines += [f"  {problem}" for problem in self.problems[:_N_SHOWN]]
        lines += [f"  ... and {n - _N_SHOWN:,} more"] if n > _N_SHOWN else []
        lines += [f"  {note}" for note in self.notes[:_N_SHOWN]]
        more = len(self.notes) - _N_SHOWN
        return "\n".join([*lines, *([f"  ... and {more:,} more"] if more > 0 else [])])


def verify_features(directory: str | os.PathLike[str]) -> VerifyReport:
    """Reads a features directory whole, and compares its files with each other.

    Hashes of rows, features and index are compared with those of generations and commits; rows are
    counted and numbered without gaps; index, tensors and commit agree; shapes and types are those
    of the plan; the manifest has the totals. One shard is held at a time.

    Args:
        directory: of the features, of format 2 or 3.

    Raises:
        FileNotFoundError: it is no features directory.
    """
    try:
        return _Verification(Reader(directory)).report()
    except PlanMismatchError as error:
        return VerifyReport(Path(directory), (str(error),), (), 0, 0, {}, 0, 0)


class _Verification:
    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._directory = reader.directory
        self._problems: list[str] = []
        self._n_bytes = self._n_missing = 0
        # a directory of format 2 is never written again
        self._again = _AGAIN if reader.plan["format"] == FORMAT else _ELSEWHERE

    def report(self) -> VerifyReport:
        reader = self._reader
        self._check_generations()
        n_rows = 0
        for generation in reader.generations:
            previous = n_rows - 1 if generation.kind != "retry" else -1
            for shard in generation.shards:
                rows = self._check_rows(shard)
                self._check_numbers(shard, rows, previous, generation.kind == "retry", n_rows)
                previous = rows[-1]["row"] if rows else previous + shard.rows
                self._check_shard(shard, rows)
            n_rows += generation.rows
        if self._n_missing:
            what = f"{self._n_missing:,} of {len(reader.shards):,} are not computed"
            self._problem("shards", what, self._again)
        try:
            n_ok, kinds = reader.counts()
        except (
            ExtractionError,
            SafetensorError,
            OSError,
            ValueError,
            KeyError,
            RuntimeError,
        ):
            if not self._problems:
                raise
            n_ok, kinds = 0, Counter[str]()  # of files that are damaged
        if not self._problems:
            self._check_manifest(n_ok, kinds)
        return VerifyReport(
            self._directory,
            tuple(self._problems),
            tuple(self._notes()),
            reader.n_rows,
            n_ok,
            dict(sorted(kinds.items())),
            len(reader.shards),
            self._n_bytes,
        )

    def _problem(self, name: str, what: str, advice: str) -> None:
        self._problems.append(f"{name}: {what}; {advice}")

    def _check_generations(self) -> None:
        reader = self._reader
        n = len(reader.generations)
        if not n:
            self._problem("rows", "no list of images is finished", "extract again")
        if [shard.shard for shard in reader.shards] != list(range(len(reader.shards))):
            self._problem("rows", "shards are not numbered one by one", _ELSEWHERE)
        for number, generation in enumerate(reader.generations):
            n_rows = sum(shard.rows for shard in generation.shards)
            if generation.rows != (0 if generation.kind == "retry" else n_rows):
                name = file_name("generation", number)
                self._problem(name, f"{generation.rows} rows, its shards have {n_rows}", _ELSEWHERE)

    def _check_rows(self, shard: Shard) -> list[dict[str, Any]]:
        """Returns the rows of a shard, none if they are damaged."""
        name = file_name("rows", shard.shard)
        try:
            rows = read_rows(self._directory, shard)
        except PlanMismatchError:
            self._problem(name, "missing or changed (sha256 of its generation differs)", _ELSEWHERE)
            return []
        self._n_bytes += (self._directory / name).stat().st_size
        if len(rows) != shard.rows:
            self._problem(name, f"{len(rows)} rows, its generation has {shard.rows}", _ELSEWHERE)
        return rows

    def _check_numbers(
        self, shard: Shard, rows: list[dict[str, Any]], previous: int, retry: bool, n_rows: int
    ) -> None:
        for row in (row["row"] for row in rows):
            if not (previous < row < n_rows if retry else row == previous + 1):
                name = file_name("rows", shard.shard)
                self._problem(name, f"row {row} follows row {previous}", _ELSEWHERE)
                return
            previous = row

    def _check_shard(self, shard: Shard, rows: list[dict[str, Any]]) -> None:
        number, commit = shard.shard, self._reader.commits.get(shard.shard)
        name = file_name("commit", number)
        if commit is None:
            if (self._directory / name).exists():
                what = "it or a file that it names is missing, cut or damaged"
                self._problem(name, what, self._again)
            else:
                self._n_missing += 1
            return
        for file, stored in commit["files"].items():
            path = self._directory / "shards" / file
            self._n_bytes += stored["bytes"]
            if file_sha256(path) != stored["sha256"]:
                self._problem(
                    f"shards/{file}", "damaged (sha256 of its commit differs)", self._again
                )
                return
        index = list(read_index(self._directory, number))
        ok = [entry for entry in index if entry["status"] == "ok"]
        kinds = Counter(entry["kind"] for entry in index if entry["status"] != "ok")
        name = file_name("index", number)
        if rows and [(e["row"], e["id"]) for e in index] != [(r["row"], r["id"]) for r in rows]:
            self._problem(name, "its rows are not those of the list", self._again)
        if (len(index), len(ok), kinds) != (commit["rows"], commit["ok"], commit["errors"]):
            self._problem(name, "its counts are not those of the commit", self._again)
        if [entry["pos"] for entry in ok] != list(range(len(ok))):
            self._problem(name, "positions do not count up", self._again)
        for what in self._tensor_problems(number, [entry["row"] for entry in ok]):
            self._problem(file_name("features", number), what, self._again)

    def _tensor_problems(self, shard: int, rows: list[int]) -> Iterator[str]:
        outputs = self._reader.plan["outputs"]
        identity = {"plan_sha256": self._reader.plan_sha256, "shard": shard}
        try:
            with safe_open(self._directory / file_name("features", shard), framework="pt") as file:
                if (file.metadata() or {}).get("fastbb") != canonical_json(
                    identity
                ).decode().rstrip():
                    yield "it is of another plan or shard"
                if set(file.keys()) != {"row_id", *outputs}:
                    yield f"features {sorted(file.keys())}, wanted row_id and {sorted(outputs)}"
                    return
                if file.get_tensor("row_id").tolist() != rows:
                    yield "row_id differs from the index"
                for name, output in outputs.items():
                    part = file.get_slice(name)
                    found = part.get_shape(), _DTYPES.get(part.get_dtype())
                    if found != ([len(rows), *output["shape"]], output["dtype"]):
                        yield f"{name} is {found[1]} {found[0]}, not as planned"
        except SafetensorError as error:
            yield f"no safetensors file ({error})"

    def _check_manifest(self, n_ok: int, kinds: Mapping[str, int]) -> None:
        reader = self._reader
        totals = {"format": reader.plan["format"], "plan_sha256": reader.plan_sha256}
        totals |= {"rows": reader.n_rows, "ok": n_ok, "errors": dict(kinds)}
        totals["shards"] = len(reader.shards)
        if reader.plan["format"] == FORMAT:
            totals["generations"] = len(reader.generations)
        try:
            found = json.loads((self._directory / "manifest.json").read_bytes())
        except (OSError, ValueError):
            found = None
        if found != totals:
            what = (
                "missing or damaged" if found is None else "its totals are not those of the shards"
            )
            advice = "extract again" if self._again is _AGAIN else _ELSEWHERE
            self._problem("manifest.json", what, advice)

    def _notes(self) -> Iterator[str]:
        """Yields the files that belong to nothing."""
        reader = self._reader
        known = {"plan.json", "manifest.json", ".lock"}
        known |= {path.name for path in logs(self._directory)}
        known |= {file_name("generation", n) for n in range(len(reader.generations))}
        for shard in reader.shards:
            kinds = ("rows", "features", "index", "commit")
            known |= {file_name(what, shard.shard) for what in kinds}
        for path in sorted(self._directory.rglob("*")):
            name = path.relative_to(self._directory).as_posix()
            if path.is_dir() or name in known:
                continue
            if re.search(r"\.tmp-\d+$", name):
                yield f"{name}: of a killed run; the next one removes it"
            else:
                yield f"{name}: belongs to nothing here"
