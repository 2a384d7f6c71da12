"""Writing of a features directory, see `layout`.

Every file but the lock and the log appears by rename after an fsync, and is a function of the plan,
the frozen rows and the images alone, so that a sequence of commands gives the same bytes whether or
not they were interrupted.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import safetensors.torch
from torch import Tensor

from .decode import RowError
from .layout import (
    FORMAT,
    Generation,
    OutputLockedError,
    PlanMismatchError,
    Shard,
    canonical_json,
    check_complete,
    file_name,
    file_sha256,
    is_started,
    log_name,
    numbered,
    plan_sha256,
    read_commit,
    read_generations,
    read_plan,
    read_rows,
    write_file,
    writing,
)
from .locks import DirectoryLock
from .reading import Reader
from .sources import Source

# names of files by directory; an unfinished file has an end like .tmp-123
_OUR_NAMES = {
    ".": r"\.lock|run(-\d+-of-\d+)?\.jsonl|rows|shards|(plan|manifest)\.json",
    "rows": r"rows-\d+\.jsonl|generation-\d+\.json",
    "shards": r"features-\d+\.safetensors|index-\d+\.jsonl|commit-\d+\.json",
}
_UNFINISHED = r"\.tmp-\d+"


class FeatureWriter:
    """A features directory held for writing; a context manager that holds the lock.

    Args:
        directory: created with its parents where it does not exist.
        share: (i, n) of a process that does every n-th shard, from the i-th on, while others do the
            rest; it holds its shards, and the plan only inside `planning`. None: it holds all.

    Attributes:
        plan: the plan of the directory; empty until `start` has run, unless there was one.
        generations: those of the directory, in order.
    """

    def __init__(
        self, directory: str | os.PathLike[str], share: tuple[int, int] | None = None
    ) -> None:
        self.directory = Path(directory)
        self.share = share
        self.plan: dict[str, Any] = {}
        self.generations: list[Generation] = []
        self._plan_sha256 = ""

    def __enter__(self) -> FeatureWriter:
        with writing(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            self._check_that_it_is_ours()
            self._lock = DirectoryLock(self.directory)
        try:
            with writing(self.directory):
                if self.share is None and not self._lock.take_all():
                    raise self._locked()
            self.read()
        except BaseException:
            self._lock.close()
            raise
        return self

    def _locked(self) -> OutputLockedError:
        return OutputLockedError(
            f"another process is writing to {self.directory}; wait for it, or choose another "
            "directory"
        )

    def read(self) -> None:
        """Reads the plan, if there is one, and the generations that there are now.

        Raises:
            PlanMismatchError: one of them is damaged.
        """
        if is_started(self.directory):
            self._use(read_plan(self.directory / "plan.json"))
            self.generations = read_generations(self.directory, self.plan)
        # also where plan.json is missing, or the last generation
        check_complete(self.directory, len(self.generations), self.n_finished)

    @contextmanager
    def planning(self, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Keeps plan, generations and manifest from other processes, and reads them again.

        Args:
            on_wait: called once before it waits for another process.

        Raises:
            OutputLockedError: another process holds the whole directory.
        """
        if self.share is None:
            yield
            return
        with writing(self.directory):
            if not self._lock.take_plan(on_wait):
                raise self._locked()
        try:
            self.read()
            yield
        finally:
            self._lock.free_plan()

    def hold(self, shards: Iterable[Shard]) -> None:
        """Holds the shards of this process's share, until the directory is closed.

        Raises:
            OutputLockedError: another process holds one of them.
        """
        if self.share is None:
            return
        with writing(self.directory):
            if taken := next((s for s in shards if not self._lock.take_shard(s.shard)), None):
                i, n = self.share
                raise OutputLockedError(
                    f"another process is writing shard {taken.shard} of {self.directory}, which is "
                    f"of the share {i}/{n}; give each process another --shard-index i/n of one n"
                )

    def is_mine(self, shard: Shard) -> bool:
        """Whether a shard is of this process's share."""
        return self.share is None or shard.shard % self.share[1] == self.share[0]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._lock.close()

    def _check_that_it_is_ours(self) -> None:
        """Raises if the directory holds files of the user, before anything is made or removed."""
        if is_started(self.directory):
            _check_writable(self.directory, read_plan(self.directory / "plan.json"))
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

    def _use(self, plan: dict[str, Any]) -> None:
        self.plan, self._plan_sha256 = plan, plan_sha256(plan)

    def start(self, plan: Mapping[str, Any]) -> None:
        """Writes the plan of a first start.

        Args:
            plan: everything that decides the values, in JSON types.

        Raises:
            OutputError: the directory cannot be written.
        """
        self.clean()
        self._use(json.loads(canonical_json({"format": FORMAT, **plan})))
        write_file(self.directory / "plan.json", canonical_json(self.plan))

    def clean(self) -> None:
        """Makes the folders, and removes files that a killed run left in them.

        Raises:
            OutputError: the directory cannot be written.
        """
        with writing(self.directory):
            for name in _OUR_NAMES:
                (self.directory / name).mkdir(exist_ok=True)
            # those of another process may be files that it is writing now
            for leftover in self._our_files(_UNFINISHED) if self.share is None else ():
                leftover.unlink()

    def remove_unfinished(self, shard: Shard) -> None:
        """Removes files that a worker that has ended left of a shard."""
        with writing(self.directory):
            for path in self._entries("shards"):
                if re.search(rf"-{shard.shard:05d}\.\w+{_UNFINISHED}$", path.name):
                    path.unlink()

    def append(
        self,
        kind: Literal["start", "update", "retry"],
        rows: Iterable[tuple[int, Source]],
        failures: Mapping[int, str] | None = None,
        **listing: Any,
    ) -> Generation:
        """Freezes a generation of rows.

        Args:
            kind: of the generation.
            rows: number and source, in ascending order of the numbers.
            failures: of a retry, the kind of the failure of each row.
            listing: `inputs`, `archives` and `unreadable` of `Generation`.

        Returns:
            The generation, which is the last of `generations`.

        Raises:
            OutputError: the directory cannot be written.
        """
        failures = failures or {}
        shards: list[Shard] = []
        iterator = iter(rows)
        with writing(self.directory):
            for number, path in numbered(self.directory, "rows"):  # of a run killed while listing
                if number >= self.n_shards:
                    path.unlink()
        while part := list(itertools.islice(iterator, self.plan["shard_rows"])):
            number = self.n_shards + len(shards)
            data = b"".join(
                canonical_json(
                    {"row": row}
                    | {name: value for name, value in asdict(source).items() if value is not None}
                )
                for row, source in part
            )
            write_file(self.directory / file_name("rows", number), data)
            kinds = Counter(failures[row] for row, _ in part if row in failures)
            digest = hashlib.sha256(data).hexdigest()
            shards.append(Shard(number, len(part), digest, dict(sorted(kinds.items()))))
        n_new = sum(shard.rows for shard in shards) if kind != "retry" else 0
        generation = Generation(kind, n_new, tuple(shards), **listing)
        number = len(self.generations)
        path = self.directory / file_name("generation", number)
        write_file(path, generation.to_json(number, self._plan_sha256))
        self.generations.append(generation)
        return generation

    @property
    def shards(self) -> list[Shard]:
        """The shards of all generations; each is at the position of its number."""
        return [shard for generation in self.generations for shard in generation.shards]

    @property
    def n_shards(self) -> int:
        """Number of shards of all generations."""
        return sum(len(generation.shards) for generation in self.generations)

    @property
    def n_rows(self) -> int:
        """Number of rows of all generations; a retried row counts once."""
        return sum(generation.rows for generation in self.generations)

    def rows(self, shard: Shard) -> list[tuple[int, Source]]:
        """Returns number and source of the frozen rows of a shard, in order.

        Raises:
            PlanMismatchError: the list is not the one that the generation names.
        """
        rows = read_rows(self.directory, shard)
        return [(row.pop("row"), Source(**row)) for row in rows]

    def frozen(self) -> Iterator[tuple[int, Source]]:
        """Yields number and source of every row, a retried one as it was listed first."""
        new = (generation for generation in self.generations if generation.kind != "retry")
        shards = (shard for generation in new for shard in generation.shards)
        return (row for shard in shards for row in self.rows(shard))

    def reader(self, commits: Sequence[Mapping[str, Any] | None]) -> Reader:
        """Returns a reader of the directory.

        Args:
            commits: those that count, of the first shards or all.
        """
        return Reader(self.directory, {c["shard"]: dict(c) for c in commits if c is not None})

    def failures(self, commits: Sequence[Mapping[str, Any] | None]) -> dict[int, RowError]:
        """Returns the committed rows that have no features, by their numbers, in order."""
        reader = self.reader(commits)
        return {e.row: e for block in reader.computed_blocks for e in reader.errors(block)}

    def totals(self, commits: Sequence[Mapping[str, Any] | None]) -> dict[str, Any]:
        """Sums up commits: rows, ok, errors by kind, shards. A retried row counts once."""
        reader = self.reader(commits)
        n_ok, kinds = reader.counts()
        return {
            "rows": n_ok + kinds.total(),
            "ok": n_ok,
            "errors": dict(sorted(kinds.items())),
            "shards": len(reader.commits),
        }

    def committed(self, shard: Shard, hashed: bool | None = None) -> dict[str, Any] | None:
        """Returns the commit of a shard, or None if the shard has no valid one and is to be done.

        Args:
            shard: of one of the generations.
            hashed: read the files of the shard and compare them with the commit's sha256; default:
                those of this process's share.
        """
        commit = read_commit(self.directory, shard, self.plan, self._plan_sha256)
        if commit is not None and (self.is_mine(shard) if hashed is None else hashed):
            for name, file in commit["files"].items():
                if file_sha256(self.directory / "shards" / name) != file["sha256"]:
                    return None
        return commit

    def commit(
        self, shard: Shard, tensors: Mapping[str, Tensor], index: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Stores a finished shard: features, then index, then the commit that makes them valid.

        Args:
            shard: of one of the generations.
            tensors: row_id int64 [n] and the features [n, ...] of the rows that are ok.
            index: one object per row of the shard.

        Returns:
            The commit.

        Raises:
            OutputError: the directory cannot be written; the shard stays undone.
        """
        number = shard.shard
        identity = canonical_json({"plan_sha256": self._plan_sha256, "shard": number})
        files = {
            # a single metadata key: safetensors writes several in random order
            file_name("features", number): safetensors.torch.save(
                dict(tensors), {"fastbb": identity.decode().rstrip()}
            ),
            file_name("index", number): b"".join(map(canonical_json, index)),
        }
        for name, data in files.items():
            write_file(self.directory / name, data)
        kinds = Counter(row["kind"] for row in index if row["status"] == "error")
        commit = {
            "shard": number,
            "plan_sha256": self._plan_sha256,
            "rows_sha256": shard.rows_sha256,
            "rows": len(index),
            "ok": len(index) - kinds.total(),
            "errors": dict(kinds),
            "replaces": shard.replaces,
            "files": {
                Path(name).name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                for name, data in files.items()
            },
        }
        write_file(self.directory / file_name("commit", number), canonical_json(commit))
        return commit

    @property
    def n_finished(self) -> int:
        """Number of the first generations that the manifest says are finished."""
        try:
            manifest = json.loads((self.directory / "manifest.json").read_bytes())
            ours = manifest["plan_sha256"] == self._plan_sha256
            return manifest["generations"] if ours else 0
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def finish(self, totals: Mapping[str, Any]) -> None:
        """Writes the manifest.

        Args:
            totals: of the commits of every shard.
        """
        path = self.directory / "manifest.json"
        manifest = canonical_json(
            {"format": FORMAT, "plan_sha256": self._plan_sha256}
            | {"generations": len(self.generations), **totals}
        )
        if not (path.exists() and path.read_bytes() == manifest):
            write_file(path, manifest)

    def log(self, event: Mapping[str, Any]) -> None:
        """Appends a line to the log of this process."""
        path = self.directory / log_name(self.share)
        with writing(path), open(path, "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":  # a crash has cut the last line off
                    file.write(b"\n")
            file.write(canonical_json(event))


def _check_writable(directory: Path, plan: Mapping[str, Any]) -> None:
    """Raises PlanMismatchError if the features of a directory are of a format that is only read."""
    if plan["format"] != FORMAT:
        raise PlanMismatchError(
            f"{directory} holds features of format {plan['format']}, of an earlier fastbb; "
            f"they are read, and only format {FORMAT} is extended. Use another directory"
        )
