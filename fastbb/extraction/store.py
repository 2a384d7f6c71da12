"""The features directory, format 1, written shard by shard.

    plan.json                   what decides the values; its sha256 is the identity of the run
    rows/rows-*.jsonl           the frozen input list, one file per shard
    shards/features-*.safetensors   row_id int64 [n] and the features; failed rows are absent
    shards/index-*.jsonl        every row of the shard, ok or failed
    shards/commit-*.json        written last: a shard without a valid one does not exist
    manifest.json               written when every shard is committed
    run.jsonl                   timings and environment, one line per event; .lock: held by flock

Every file but the last two appears by rename after an fsync, and is a function of the plan and the
images alone, so that an interrupted and resumed run is byte-identical to an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

import safetensors.torch
from torch import Tensor

from .sources import Source

FORMAT = 1
# facts about the frozen list: they follow from the inputs, so a resumed run takes them as they are
_FROZEN_FIELDS = ("rows", "rows_sha256")
_OUR_NAMES = frozenset({".lock", "plan.json", "rows", "shards", "manifest.json", "run.jsonl"})


class ExtractionError(RuntimeError):
    """An extraction cannot go on; what is committed stays.

    Attributes:
        exit_code: what the command line exits with.
    """

    exit_code: ClassVar[int] = 1


class PlanMismatchError(ExtractionError):
    """The directory holds features of another plan."""

    exit_code = 3


class OutputLockedError(ExtractionError):
    """Another process writes into the directory."""

    exit_code = 5


class OutputError(ExtractionError):
    """The directory cannot be written: permissions, a full disk, a quota."""

    exit_code = 6


def canonical_json(value: object) -> bytes:
    """One line of JSON that is the same for equal values: sorted keys, ASCII, no spaces."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii") + b"\n"


class FeatureWriter:
    """A features directory held for writing; a context manager that holds the lock.

    Args:
        directory: created with its parents where it does not exist.

    Attributes:
        plan: the plan of the directory; empty until `start` has run.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self.plan: dict[str, Any] = {}
        self._plan_sha256 = ""

    def __enter__(self) -> FeatureWriter:
        with _writing(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            names = {path.name for path in self.directory.iterdir() if ".tmp-" not in path.name}
            if (foreign := sorted(names - _OUR_NAMES)) and "plan.json" not in names:
                raise ValueError(
                    f"{self.directory} holds no features but other files ({foreign[0]!r}, "
                    f"{len(foreign)} in all); give a new or an empty directory"
                )
            self._lock = open(self.directory / ".lock", "ab")
        try:
            self._take_over()
        except BaseException:
            self._lock.close()
            raise
        return self

    def _take_over(self) -> None:
        with _writing(self.directory):
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise OutputLockedError(
                    f"another process is writing to {self.directory}; wait for it, or choose "
                    "another directory"
                ) from error
            for name in ("rows", "shards"):
                (self.directory / name).mkdir(exist_ok=True)
            for leftover in self.directory.glob("**/*.tmp-*"):
                leftover.unlink()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._lock.close()

    def start(self, settings: Mapping[str, Any], sources: Iterable[Source]) -> bool:
        """Writes the plan and the frozen list, or checks that they are the same ones.

        Args:
            settings: everything that decides the values; has an entry `shard_rows`.
            sources: the rows; only consumed where there is no plan yet.

        Returns:
            Whether there was a plan already, so that the run is a resumed one.

        Raises:
            PlanMismatchError: the existing plan differs; the message names the fields.
            OutputError: the directory cannot be written.
        """
        path = self.directory / "plan.json"
        settings = json.loads(canonical_json({"format": FORMAT, **settings}))
        resumed = path.exists()
        if resumed:
            self.plan = read_plan(path)
            _check_plan(self.directory, self.plan, settings)
        else:
            frozen = self._freeze(sources, settings["shard_rows"])
            self.plan = {**settings, **dict(zip(_FROZEN_FIELDS, frozen))}
            self._write(path, canonical_json(self.plan))
        self._plan_sha256 = hashlib.sha256(canonical_json(self.plan)).hexdigest()
        return resumed

    def _freeze(self, sources: Iterable[Source], shard_rows: int) -> tuple[int, list[str]]:
        for path in (self.directory / "rows").iterdir():  # of a run that died while listing
            path.unlink()
        n_rows, digests, lines = 0, [], []

        def flush() -> None:
            data = b"".join(lines)
            self._write(self.directory / file_name("rows", len(digests)), data)
            digests.append(hashlib.sha256(data).hexdigest())
            lines.clear()

        for source in sources:
            given = {name: value for name, value in asdict(source).items() if value is not None}
            lines.append(canonical_json({"row": n_rows, **given}))
            n_rows += 1
            if len(lines) == shard_rows:
                flush()
        if lines:
            flush()
        return n_rows, digests

    @property
    def n_shards(self) -> int:
        """Number of shards of the plan."""
        return len(self.plan["rows_sha256"])

    def rows(self, shard: int) -> list[Source]:
        """The frozen rows of a shard, in order.

        Raises:
            PlanMismatchError: the list is not the one that the plan was made for.
        """
        path = self.directory / file_name("rows", shard)
        data = path.read_bytes() if path.exists() else b""
        if hashlib.sha256(data).hexdigest() != self.plan["rows_sha256"][shard]:
            raise PlanMismatchError(
                f"{path} is missing or was changed (rows_sha256 of the plan differs); start again "
                "in another directory"
            )
        rows = [json.loads(line) for line in data.splitlines()]
        return [Source(**{k: v for k, v in row.items() if k != "row"}) for row in rows]

    def committed(self, shard: int) -> dict[str, Any] | None:
        """The commit of a shard, or None if it has no valid one and is to be done."""
        return read_commit(self.directory, shard, self._plan_sha256)

    def commit(
        self, shard: int, tensors: Mapping[str, Tensor], index: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Stores a finished shard: features, then index, then the commit that makes them valid.

        Args:
            shard: number of the shard.
            tensors: row_id int64 [n] and the features [n, ...] of the rows that are ok.
            index: one object per row of the shard.

        Returns:
            The commit.

        Raises:
            OutputError: the directory cannot be written; the shard stays undone.
        """
        identity = canonical_json({"plan_sha256": self._plan_sha256, "shard": shard})
        files = {
            # a single metadata key: safetensors writes several in random order
            file_name("features", shard): safetensors.torch.save(
                dict(tensors), {"fastbb": identity.decode().rstrip()}
            ),
            file_name("index", shard): b"".join(map(canonical_json, index)),
        }
        for name, data in files.items():
            self._write(self.directory / name, data)
        kinds = Counter(row["kind"] for row in index if row["status"] == "error")
        commit = {
            "shard": shard,
            "plan_sha256": self._plan_sha256,
            "rows": len(index),
            "ok": len(index) - kinds.total(),
            "errors": dict(kinds),
            "files": {
                Path(name).name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                for name, data in files.items()
            },
        }
        self._write(self.directory / file_name("commit", shard), canonical_json(commit))
        return commit

    def finish(self) -> None:
        """Writes the manifest; every shard must be committed."""
        path = self.directory / "manifest.json"
        commits = [self.committed(shard) for shard in range(self.n_shards)]
        manifest = {"format": FORMAT, "plan_sha256": self._plan_sha256, **totals(commits)}
        if not (path.exists() and path.read_bytes() == canonical_json(manifest)):
            self._write(path, canonical_json(manifest))

    def log(self, event: Mapping[str, Any]) -> None:
        """Appends a line to run.jsonl."""
        path = self.directory / "run.jsonl"
        with _writing(path), open(path, "ab") as file:
            file.write(canonical_json(event))

    def _write(self, path: Path, data: bytes) -> None:
        temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        with _writing(path):
            try:
                with open(temporary, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    temporary.unlink()
                raise
            directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)


def totals(commits: Sequence[Mapping[str, Any] | None]) -> dict[str, Any]:
    """Sums up commits: rows, ok, errors by kind, shards."""
    present = [commit for commit in commits if commit is not None]
    kinds = sum((Counter(commit["errors"]) for commit in present), Counter())
    return {
        "rows": sum(commit["rows"] for commit in present),
        "ok": sum(commit["ok"] for commit in present),
        "errors": dict(kinds),
        "shards": len(present),
    }


def file_name(what: str, shard: int) -> str:
    """Path of a file of a shard, relative to the features directory."""
    directory, suffix = {
        "rows": ("rows", "jsonl"),
        "features": ("shards", "safetensors"),
        "index": ("shards", "jsonl"),
        "commit": ("shards", "json"),
    }[what]
    return f"{directory}/{what}-{shard:05d}.{suffix}"


def read_plan(path: Path) -> dict[str, Any]:
    """Reads plan.json.

    Raises:
        PlanMismatchError: it is damaged.
    """
    try:
        plan = json.loads(path.read_bytes())
        if not isinstance(plan, dict) or not {"format", *_FROZEN_FIELDS} <= plan.keys():
            raise ValueError("fields are missing")
    except ValueError as error:
        raise PlanMismatchError(f"{path} is damaged: {error}; use another directory") from error
    return plan


def read_commit(directory: Path, shard: int, plan_sha256: str) -> dict[str, Any] | None:
    """The commit of a shard; None if there is none, or none of this plan, or files are missing."""
    path = directory / file_name("commit", shard)
    try:
        commit = json.loads(path.read_bytes())
        whole = all(
            (path.parent / name).stat().st_size == file["bytes"]
            for name, file in commit["files"].items()
        )
        return commit if whole and commit["plan_sha256"] == plan_sha256 else None
    except (FileNotFoundError, ValueError, KeyError):
        return None


def _check_plan(directory: Path, plan: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    was = _flatten({name: plan[name] for name in plan if name not in _FROZEN_FIELDS})
    now = _flatten(settings)
    differing = [
        f"{name}: {was.get(name, 'nothing')!r:.100} there, {now.get(name, 'nothing')!r:.100} asked"
        for name in sorted(was.keys() | now.keys())
        if name not in was or name not in now or was[name] != now[name]
    ]
    if differing:
        raise PlanMismatchError(
            f"{directory} holds features of another plan; {'; '.join(differing)}. Use the "
            "settings it was started with, or another directory"
        )


def _flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, Mapping):
            flat.update(_flatten(item, f"{prefix}{name}."))
        else:
            flat[prefix + name] = item
    return flat


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = (
            "free some space and run the same again, finished shards are kept"
            if full
            else "give a directory that can be written"
        )
        raise OutputError(f"cannot write {path}: {error.strerror}; {advice}") from error
