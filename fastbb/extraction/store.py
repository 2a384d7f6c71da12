"""The features directory, format 2, written shard by shard.

    plan.json                   settings that decide the values; its sha256 identifies the run
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
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

import safetensors.torch
from torch import Tensor

from .sources import Source

FORMAT = 2
# fields that the first start fills: the list of inputs and the mode; a resumed run keeps them
_FROZEN_FIELDS = ("rows", "rows_sha256", "runs")
# the same for directories that could not be read; absent where there were none
_UNREADABLE_FIELD = "unreadable_directories"
# fields that are read back from a plan, besides the frozen ones
_READ_FIELDS = frozenset(
    {"shard_rows", "batch_size", "precision", "device", "versions.torch", "versions.fastbb"}
    | {f"model.{name}" for name in ("name", "class", "weights_sha256")}
    | {f"preprocessing.{name}" for name in ("image_processor_type", "resize", "size", "crop_size")}
)
# names of files by directory; an unfinished file has an end like .tmp-123
_OUR_NAMES = {
    ".": r"\.lock|run\.jsonl|rows|shards|(plan|manifest)\.json",
    "rows": r"rows-\d+\.jsonl",
    "shards": r"features-\d+\.safetensors|index-\d+\.jsonl|commit-\d+\.json",
}
_UNFINISHED = r"\.tmp-\d+"
_READ_BYTES = 2**20


class ExtractionError(RuntimeError):
    """An extraction cannot continue; committed shards stay.

    Attributes:
        exit_code: of the command line.
    """

    exit_code: ClassVar[int] = 70


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
    """Returns one line of JSON that is equal for equal values: sorted keys, ASCII, no spaces."""
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
            self._check_that_it_is_ours()
            self._lock = open(self.directory / ".lock", "ab")
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                self._lock.close()
                if not isinstance(error, BlockingIOError):
                    raise
                raise OutputLockedError(
                    f"another process is writing to {self.directory}; wait for it, or choose "
                    "another directory"
                ) from error
        return self

    def _check_that_it_is_ours(self) -> None:
        """Raises if the directory holds files of the user, before anything is made or removed."""
        if is_started(self.directory):
            plan = read_plan(self.directory / "plan.json")
            if plan["format"] != FORMAT:
                raise PlanMismatchError(
                    f"{self.directory} holds features of another version of fastbb; format: "
                    f"{plan['format']!r:.100} there, {FORMAT} asked. Use another directory"
                )
            return
        paths = {path for name in _OUR_NAMES for path in self._entries(name)}
        foreign = paths.difference(self._our_files(rf"({_UNFINISHED})?"))
        if foreign := sorted(path.relative_to(self.directory).as_posix() for path in foreign):
            raise ValueError(
                f"{self.directory} holds no features but other files ({foreign[0]!r}, "
                f"{len(foreign)} in all); give a new or an empty directory"
            )

    def _our_files(self, end: str) -> Iterator[Path]:
        """Yields the paths whose names only this class gives, followed by the pattern `end`."""
        for name, pattern in _OUR_NAMES.items():
            for path in self._entries(name):
                if re.fullmatch(rf"({pattern}){end}", path.name):
                    yield path

    def _entries(self, name: str) -> list[Path]:
        directory = self.directory / name
        return list(directory.iterdir()) if directory.exists() else []

    def _clear(self) -> None:
        """Makes the directories, and removes files that a killed run left in them."""
        with _writing(self.directory):
            for name in _OUR_NAMES:
                (self.directory / name).mkdir(exist_ok=True)
            for leftover in self._our_files(_UNFINISHED):
                leftover.unlink()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._lock.close()

    def start(
        self,
        settings: Mapping[str, Any],
        sources: Iterable[Source],
        runs: Callable[[int], str] = lambda n_rows: "eager",
        unreadable: Sequence[str] = (),
    ) -> bool:
        """Writes the plan and the frozen list, or checks that they are the same ones.

        Args:
            settings: everything that decides the values; has an entry `shard_rows`.
            sources: the rows; only consumed where there is no plan yet.
            runs: chooses the mode that computes, for so many rows; only asked where there is no
                plan yet.
            unreadable: directories without which the list was made; looked at after the rows.

        Returns:
            Whether there was a plan already, so that the run is a resumed one.

        Raises:
            PlanMismatchError: the existing plan differs; the message names the fields.
            OutputError: the directory cannot be written.
        """
        path = self.directory / "plan.json"
        settings = json.loads(canonical_json({"format": FORMAT, **settings}))
        resumed = is_started(self.directory)
        if resumed:
            self.plan = read_plan(path)
            _check_plan(self.directory, self.plan, settings)
            self._clear()
        else:
            self._clear()
            n_rows, digests = self._freeze(sources, settings["shard_rows"])
            self.plan = {**settings, "rows": n_rows, "rows_sha256": digests, "runs": runs(n_rows)}
            if unreadable:
                self.plan[_UNREADABLE_FIELD] = list(unreadable)
            self._write(path, canonical_json(self.plan))
        self._plan_sha256 = hashlib.sha256(canonical_json(self.plan)).hexdigest()
        return resumed

    def _freeze(self, sources: Iterable[Source], shard_rows: int) -> tuple[int, list[str]]:
        with _writing(self.directory):
            for path in self.directory.glob("rows/rows-*.jsonl"):  # of a run killed while listing
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
        """Returns the frozen rows of a shard, in order.

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
        """Returns the commit of a shard, or None if the shard has no valid one and is to be done.

        The files of the shard are read and compared with the commit's sha256.
        """
        commit = read_commit(self.directory, shard, self._plan_sha256)
        if commit is not None:
            for name, file in commit["files"].items():
                if _sha256(self.directory / "shards" / name) != file["sha256"]:
                    return None
        return commit

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

    def finish(self, commits: Sequence[Mapping[str, Any] | None]) -> None:
        """Writes the manifest.

        Args:
            commits: of every shard.
        """
        path = self.directory / "manifest.json"
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
    """Returns the path of a file of a shard, relative to the features directory."""
    directory, suffix = {
        "rows": ("rows", "jsonl"),
        "features": ("shards", "safetensors"),
        "index": ("shards", "jsonl"),
        "commit": ("shards", "json"),
    }[what]
    return f"{directory}/{what}-{shard:05d}.{suffix}"


def is_started(directory: Path) -> bool:
    """Returns whether a plan was made in the directory.

    Raises:
        OutputError: the directory cannot be entered.
    """
    path = directory / "plan.json"
    with _writing(path):
        return path.exists()


def read_plan(path: Path) -> dict[str, Any]:
    """Reads plan.json; of another format, only its number is sure to be there.

    Raises:
        PlanMismatchError: it is damaged, or no plan of ours.
    """
    try:
        plan = json.loads(path.read_bytes())
        if not isinstance(plan, dict) or "format" not in plan:
            raise ValueError("the field format is missing")
        if plan["format"] != FORMAT:
            return plan
        missing = {*_FROZEN_FIELDS, *_READ_FIELDS} - _flatten(plan).keys()
        if missing or not all({"shape", "dtype"} <= set(o) for o in plan["outputs"].values()):
            raise ValueError(f"the field {min(missing, default='outputs')} is missing")
        if not (isinstance(plan["rows"], int) and isinstance(plan["rows_sha256"], list)):
            raise ValueError("rows and rows_sha256 are no number and no list")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PlanMismatchError(f"{path} is damaged: {error}; use another directory") from error
    return plan


def read_commit(directory: Path, shard: int, plan_sha256: str) -> dict[str, Any] | None:
    """Reads the commit of a shard; None if there is none, or it is damaged or of another plan.

    Of the files it names only the sizes are compared.
    """
    path = directory / file_name("commit", shard)
    try:
        commit = json.loads(path.read_bytes())
        names = {Path(file_name(what, shard)).name for what in ("features", "index")}
        whole = commit["files"].keys() == names and all(
            (path.parent / name).stat().st_size == file["bytes"]
            for name, file in commit["files"].items()
        )
        whole &= commit["ok"] + sum(commit["errors"].values()) == commit["rows"]
        ours = (commit["plan_sha256"], commit["shard"]) == (plan_sha256, shard)
        return commit if whole and ours else None
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(_READ_BYTES):
            digest.update(data)
    return digest.hexdigest()


def _check_plan(directory: Path, plan: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    frozen = {*_FROZEN_FIELDS, _UNREADABLE_FIELD}
    was = _flatten({name: plan[name] for name in plan if name not in frozen})
    now = _flatten(settings)
    differing = [
        f"{name}: {_compared(was.get(name, 'nothing'), now.get(name, 'nothing'))}"
        # another precision changes the weights too, so it is named first
        for name in sorted(was.keys() | now.keys(), key=lambda name: (name != "precision", name))
        if name not in was or name not in now or was[name] != now[name]
    ]
    if differing:
        raise PlanMismatchError(
            f"{directory} holds features of another plan; {'; '.join(differing)}. Use the "
            "settings it was started with, or another directory"
        )


def _compared(was: Any, now: Any) -> str:
    """Describes two different values; for long lists, the first entry that differs."""
    if isinstance(was, list) and isinstance(now, list) and len(repr(was + now)) > 100:
        n_same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(was, now)))
        first = _compared(*((x[n_same] if n_same < len(x) else "nothing") for x in (was, now)))
        return f"{len(was)} entries there, {len(now)} asked; entry {n_same + 1}: {first}"
    return f"{was!r:.100} there, {now!r:.100} asked"


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
