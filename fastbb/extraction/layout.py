"""The features directory, format 3: its files, and which of them are valid.

    plan.json                   what decides the values; its sha256 identifies the run
    rows/rows-*.jsonl           the frozen rows of one shard: number, id, place, columns
    rows/generation-*.json      written after its rows: the shards that one command appended
    shards/features-*.safetensors   row_id int64 [n] and the features; failed rows are absent
    shards/index-*.jsonl        every row of the shard, ok or failed
    shards/commit-*.json        written last: a shard without a valid one does not exist
    manifest.json               written when every shard is committed
    run.jsonl                   times and devices, one line per event; a process with a share of the
                                shards has run-<i>-of-<n>.jsonl
    .lock                       see `locks`

A generation is a `start`, an `update` (new rows, numbered on) or a `retry` (rows that failed, under
their own numbers; what a later attempt gives wins). Shards are numbered through all generations.
Format 2, which is read only, has one generation: its rows are listed in plan.json.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Literal

FORMAT = 3
_READ_FORMATS = (2, FORMAT)
_READ_BYTES = 2**20
_SPACE, _LOCKS = "free some space and run the same again", "give one on a file system with locks"
_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _SPACE),
    **dict.fromkeys((errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS), _LOCKS),
}
# fields that are read back from a plan
_READ_FIELDS = frozenset(
    {"shard_rows", "batch_size", "precision", "device", "mode", "runs", "versions.torch"}
    | {f"model.{name}" for name in ("name", "class", "weights_sha256")}
    | {f"preprocessing.{name}" for name in ("image_processor_type", "resize", "size", "crop_size")}
)
# fields of a row of an index, by its status
_ENTRY_FIELDS = {
    "ok": {"row", "id", "status", "pos"},
    "error": {"row", "id", "status", "kind", "message"},
}
_LOG = re.compile(r"run(-\d+-of-\d+)?\.jsonl")
_PLACES = {
    "rows": ("rows", "jsonl"),
    "generation": ("rows", "json"),
    "features": ("shards", "safetensors"),
    "index": ("shards", "jsonl"),
    "commit": ("shards", "json"),
}


class ExtractionError(RuntimeError):
    """An extraction cannot continue; committed shards stay.

    Attributes:
        exit_code: of the command line.
    """

    exit_code: ClassVar[int] = 70


class PlanMismatchError(ExtractionError):
    """The directory holds features of another plan."""

    exit_code = 3


class DamagedError(PlanMismatchError):
    """A file of the directory is damaged."""


class OutputLockedError(ExtractionError):
    """Another process writes into the directory."""

    exit_code = 5


def already_started(directory: Path) -> OutputLockedError:
    """Returns the error of a first start that another process was faster with."""
    return OutputLockedError(
        f"another process has started {directory} meanwhile; run the same again"
    )


class OutputError(ExtractionError):
    """The directory cannot be written: permissions, a full disk, a quota."""

    exit_code = 6


def canonical_json(value: object) -> bytes:
    """Returns one line of JSON that is equal for equal values: sorted keys, ASCII, no spaces."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii") + b"\n"


@dataclass(frozen=True)
class Shard:
    """A shard as its generation lists it.

    Attributes:
        shard: its number.
        rows: number of rows.
        rows_sha256: of its file of rows.
        replaces: in a retry, the failures of earlier attempts at these rows, by kind.
    """

    shard: int
    rows: int
    rows_sha256: str
    replaces: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Generation:
    """The shards that one command appended.

    Attributes:
        kind: "start", "update" or "retry".
        rows: number of rows that are new with it; 0 for a retry.
        shards: in the order of their numbers.
        inputs: absolute paths of the inputs that were listed.
        archives: size and modification time of the archives that rows are in, by absolute path.
        unreadable: directories that could not be listed, each with the reason.
    """

    kind: Literal["start", "update", "retry"]
    rows: int
    shards: tuple[Shard, ...]
    inputs: tuple[str, ...] = ()
    archives: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    unreadable: tuple[str, ...] = ()

    def to_json(self, number: int, plan_sha256: str) -> bytes:
        """Returns the content of the generation's file."""
        return canonical_json({"generation": number, "plan_sha256": plan_sha256, **asdict(self)})


def file_name(what: str, number: int) -> str:
    """Returns the path of a numbered file, relative to the features directory."""
    directory, suffix = _PLACES[what]
    return f"{directory}/{what}-{number:05d}.{suffix}"


def is_started(directory: Path) -> bool:
    """Returns whether a plan was made in the directory.

    Raises:
        OutputError: the directory cannot be entered.
    """
    path = directory / "plan.json"
    with writing(path):
        return path.exists()


def read_plan(path: Path) -> dict[str, Any]:
    """Reads plan.json of format 2 or 3.

    Raises:
        PlanMismatchError: it is damaged, of another format, or no plan of ours.
    """
    try:
        plan = json.loads(path.read_bytes())
        if not isinstance(plan, dict) or "format" not in plan:
            raise ValueError("the field format is missing")
        if plan["format"] not in _READ_FORMATS:
            raise PlanMismatchError(
                f"{path}: formats {' and '.join(map(str, _READ_FORMATS))} are read, got "
                f"{plan['format']!r:.100}; it is of another version of fastbb"
            )
        missing = _READ_FIELDS - flatten(plan).keys()
        if missing or not all({"shape", "dtype"} <= set(o) for o in plan["outputs"].values()):
            raise ValueError(f"the field {min(missing, default='outputs')} is missing")
        if plan["format"] == 2 and not (
            isinstance(plan["rows"], int) and isinstance(plan["rows_sha256"], list)
        ):
            raise ValueError("rows and rows_sha256 are no number and no list")
    except (IsADirectoryError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PlanMismatchError(f"{path} is damaged: {error}; use another directory") from error
    return plan


def file_sha256(path: Path) -> str:
    """Returns the sha256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(_READ_BYTES):
            digest.update(data)
    return digest.hexdigest()


def plan_sha256(plan: Mapping[str, Any]) -> str:
    """Returns the hash that identifies a plan."""
    return hashlib.sha256(canonical_json(plan)).hexdigest()


def read_generations(directory: Path, plan: Mapping[str, Any]) -> list[Generation]:
    """Reads the generations of a directory, up to the first that is missing.

    Raises:
        PlanMismatchError: a generation is damaged, missing, or of another plan.
    """
    if plan["format"] == 2:
        n_rows, per_shard = plan["rows"], plan["shard_rows"]
        shards = tuple(
            Shard(i, min(per_shard, n_rows - i * per_shard), digest)
            for i, digest in enumerate(plan["rows_sha256"])
        )
        unreadable = tuple(plan.get("unreadable_directories", ()))
        return [Generation("start", n_rows, shards, tuple(plan["inputs"]), {}, unreadable)]
    generations, identity = [], plan_sha256(plan)
    # before they are read: another process may append one meanwhile
    n_there = n_generations(directory)
    while (path := directory / file_name("generation", len(generations))).exists():
        try:
            values = json.loads(path.read_bytes())
            ours = len(generations), identity
            if (values.pop("generation"), values.pop("plan_sha256")) != ours:
                raise ValueError("it belongs to another plan.json")
            values["shards"] = tuple(Shard(**shard) for shard in values["shards"])
            values |= {name: tuple(values[name]) for name in ("inputs", "unreadable")}
            generation = Generation(**values)
            numbers = [(s.shard, s.rows, *s.replaces.values()) for s in generation.shards]
            for number in itertools.chain([generation.rows], *numbers):
                if type(number) is not int or number < 0:
                    raise ValueError(f"wanted a whole number, got {number!r:.80}")
            generations.append(generation)
        except (
            IsADirectoryError,
            RecursionError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
        ) as error:
            raise PlanMismatchError(f"{path} is damaged: {error}; use another directory") from error
    check_complete(directory, len(generations), n_there)
    return generations


def n_generations(directory: Path) -> int:
    """Number of generations by the names of their files."""
    return max((number for number, _ in numbered(directory, "generation")), default=-1) + 1


def check_complete(directory: Path, n_read: int, n_there: int, n_finished: int = 0) -> None:
    """Raises PlanMismatchError if a generation is lost.

    Args:
        directory: of the features.
        n_read: number of the first generations that could be read.
        n_there: `n_generations` before they were read.
        n_finished: number of those that the manifest names.
    """
    if max(n_there, n_finished) > n_read:
        lost = file_name("generation", n_read) if n_read else "plan.json"
        raise PlanMismatchError(
            f"{directory / lost} is missing, and what came after it is there; restore it, or use "
            "another directory"
        )


def numbered(directory: Path, what: str) -> list[tuple[int, Path]]:
    """Returns the numbered files of a kind that are there, with their numbers, in order."""
    folder, suffix = _PLACES[what]
    pattern = re.compile(rf"{what}-(\d+)\.{suffix}")
    paths = (directory / folder).glob(f"{what}-*.{suffix}")
    found = ((pattern.fullmatch(path.name), path) for path in paths)
    return sorted((int(match[1]), path) for match, path in found if match)


def read_commit(
    directory: Path, shard: Shard, plan: Mapping[str, Any], identity: str
) -> dict[str, Any] | None:
    """Reads the commit of a shard; None if there is none, or it is damaged or of another plan.

    Of the files it names only the sizes are compared.

    Args:
        directory: of the features.
        shard: as its generation lists it.
        plan: of the directory.
        identity: the hash of the plan.
    """
    path = directory / file_name("commit", shard.shard)
    try:
        commit = json.loads(path.read_bytes())
        names = {Path(file_name(what, shard.shard)).name for what in ("features", "index")}
        whole = commit["files"].keys() == names and all(
            (path.parent / name).stat().st_size == file["bytes"] and isinstance(file["sha256"], str)
            for name, file in commit["files"].items()
        )
        whole &= commit["ok"] + sum(commit["errors"].values()) == commit["rows"] == shard.rows
        ours = commit["plan_sha256"] == identity and commit["shard"] == shard.shard
        if plan["format"] == FORMAT:
            ours &= commit["rows_sha256"] == shard.rows_sha256
            ours &= commit["replaces"] == shard.replaces
        return commit if whole and ours else None
    except (OSError, RecursionError, ValueError, KeyError, TypeError, AttributeError):
        return None


def read_index(directory: Path, shard: int) -> Iterator[dict[str, Any]]:
    """Yields the rows of a committed shard: `row`, `id`, `status`, and `pos` or the error."""
    path = directory / file_name("index", shard)
    try:
        with open(path, "rb") as file:
            yield from map(check_entry, map(json.loads, file))
    except ValueError as error:
        raise damaged(path, error) from error


def check_entry(entry: Any) -> Any:
    """Returns a row of an index; raises ValueError if a field is missing."""
    try:
        if _ENTRY_FIELDS[entry["status"]] <= entry.keys():
            return entry
    except (KeyError, TypeError, AttributeError):
        pass
    raise ValueError("a field of a row is missing")


def damaged(path: Path, error: Exception) -> DamagedError:
    """Returns the error of a damaged file of a shard."""
    return DamagedError(f"{path} is damaged ({error}); extract again: its shard is computed again")


def read_rows(directory: Path, shard: Shard) -> list[dict[str, Any]]:
    """Returns the frozen rows of a shard: `row`, `id`, the place and, if any, `columns`.

    Raises:
        PlanMismatchError: the file is not the one that the generation lists.
    """
    path = directory / file_name("rows", shard.shard)
    try:
        data = path.read_bytes()
    except OSError:
        data = b""
    if hashlib.sha256(data).hexdigest() != shard.rows_sha256:
        raise PlanMismatchError(
            f"{path} is missing or was changed (rows_sha256 of its generation differs); start "
            "again in another directory"
        )
    return [json.loads(line) for line in data.splitlines()]


def log_name(share: tuple[int, int] | None) -> str:
    """Returns the name of the log of a process with this share of the shards, or with all."""
    return "run.jsonl" if share is None else f"run-{share[0]}-of-{share[1]}.jsonl"


def logs(directory: Path) -> list[Path]:
    """Returns the logs of all processes."""
    paths = [*directory.glob("run.jsonl"), *directory.glob("run-*-of-*.jsonl")]
    return sorted(path for path in paths if _LOG.fullmatch(path.name))


def read_events(directory: Path) -> Iterator[dict[str, Any]]:
    """Yields the events of every log; lines that a crash cut off are passed over."""
    for path in logs(directory):
        for line in path.read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                if isinstance(event := json.loads(line), dict):
                    yield event


def write_file(path: Path, data: bytes, is_new: bool = False) -> bool:
    """Writes a file that is complete on the disk before it has its name.

    Args:
        path: of the file.
        data: its content.
        is_new: leave a file that is there, as far as the file system has links.

    Returns:
        Whether it was written.

    Raises:
        OutputError: it cannot be written.
    """
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    with writing(path):
        try:
            with synced(temporary) as file:
                file.write(data)
            if not (is_new and _link(temporary, path)):
                os.replace(temporary, path)
        except FileExistsError:
            temporary.unlink()
            return False
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        sync_directory(path.parent)
    return True


def _link(temporary: Path, path: Path) -> bool:
    """Gives a file its name, unless there is one; returns False where no links are."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:
        return False
    temporary.unlink()
    return True


@contextlib.contextmanager
def synced(path: Path) -> Iterator[BinaryIO]:
    """Opens a file to write; its content is on the disk at the end."""
    with open(path, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Writes the names in a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the values of nested mappings by their dotted names."""
    flat: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, Mapping):
            flat.update(flatten(item, f"{prefix}{name}."))
        else:
            flat[prefix + name] = item
    return flat


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError inside into an `OutputError` that names the path and what to do."""
    try:
        yield
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "give a directory that can be written")
        raise OutputError(f"cannot write {path}: {error.strerror}; {advice}") from error
