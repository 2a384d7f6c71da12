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
    already_started,
    canonical_json,
    check_complete,
    file_name,
    file_sha256,
    is_started,
    log_name,
    n_generations,
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
            rest; it holds its share, and the plan only inside `planning`. None: it holds all.

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
                    raise OutputLockedError(
                        f"another process is writing to {self.directory}; wait for it, or choose "
                        "another directory"
                    )
                if self.share is not None and not self._lock.take_share(*self.share):
                    i, n = self.share
                    raise OutputLockedError(
                        f"another process is writing to {self.directory}, all of it, the share "
                        f"{i}/{n} or shares of another n; give each process another --shard-index "
                        "i/n of one n"
                    )
            self.read()
        except BaseException:
            self._lock.close()
            raise
        return self

    def read(self) -> None:
        """Reads the plan, if there is one, and the generations that there are now.

        Raises:
            PlanMismatchError: one of them is damaged.
        """
        # before the generations are read: another process may append and finish one meanwhile
        n_there = n_generations(self.directory)
        if is_started(self.directory):
            self._use(read_plan(self.directory / "plan.json"))
        n_finished = self.n_finished
        if self.plan:
            self.generations = read_generations(self.directory, self.plan)
        # also where plan.json is missing, or the last generation
        check_complete(self.directory, len(self.generations), n_there, n_finished)

    @contextmanager
    def planning(self, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Keeps plan, generations and manifest from other processes, and reads them again.

        Args:
            on_wait: called once before it waits for another process.

        Raises:
            PlanMismatchError: one of them is damaged.
            OutputError: the directory cannot be written.
        """
        if self.share is None:
            yield
            return
        self._lock.take_plan(on_wait)
        try:
            with writing(self.directory):
                # NFS shows what another machine made in a folder once the folder is opened anew
                self._entries("shards")
                self._remove_unfinished(".", "rows")
            self.read()
            yield
        finally:
            self._lock.free_plan()

    def is_mine(self, shard: Shard) -> bool:
        """Whether a shard is of this process's share."""
        return self._is_in_share(shard.shard)

    def _is_in_share(self, number: int) -> bool:
        return self.share is None or number % self.share[1] == self.share[0]

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
        foreign = sorted(
            path.relative_to(self.directory).as_posix()
            for name, ours in _OUR_NAMES.items()
            for path in self._entries(name)
            if not re.fullmatch(rf"({ours})({_UNFINISHED})?", path.name)
        )
        if foreign:
            raise ValueError(
                f"{self.directory} holds no features but other files ({foreign[0]!r}, "
                f"{len(foreign)} in all); give a new or an empty directory"
            )

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
            OutputLockedError: there is a plan, although this process holds it.
        """
        self.clean()
        path, data = self.directory / "plan.json", canonical_json({"format": FORMAT, **plan})
        if not write_file(path, data, is_new=True):
            raise already_started(self.directory)
        self._use(json.loads(data))

    def clean(self) -> None:
        """Makes the folders, and removes files that a killed run left in them.

        Raises:
            OutputError: the directory cannot be written.
        """
        with writing(self.directory):
            for name in _OUR_NAMES:
                (self.directory / name).mkdir(exist_ok=True)
            if self.share is None:
                self._remove_unfinished(*_OUR_NAMES)
            else:  # other processes may be writing shards of other shares now
                self._remove_unfinished("shards", numbers=self._is_in_share)

    def remove_unfinished(self, shard: Shard) -> None:
        """Removes files that a worker that has ended left of a shard."""
        with writing(self.directory):
            self._remove_unfinished("shards", numbers=lambda number: number == shard.shard)

    def _remove_unfinished(
        self, *folders: str, numbers: Callable[[int], bool] = lambda number: True
    ) -> None:
        for folder in folders:
            for path in self._entries(folder):
                if re.fullmatch(f"({_OUR_NAMES[folder]}){_UNFINISHED}", path.name):
                    number = re.search(r"-(\d+)\.", path.name)
                    if number is None or numbers(int(number[1])):
                        path.unlink(missing_ok=True)  # of a worker that still ends

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
