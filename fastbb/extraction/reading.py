"""The rows of a features directory in order, each by the attempt that counts."""

from __future__ import annotations

import functools
import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .decode import RowError
from .layout import (
    Shard,
    check_entry,
    damaged,
    file_name,
    plan_sha256,
    read_commit,
    read_generations,
    read_index,
    read_plan,
    read_rows,
)

_FAILED = b'"status":"error"'  # quotes inside a string are escaped, so only the field matches

_SURROGATE = re.compile("[\ud800-\udfff]")
_OWN_COLUMNS = ("id", "row", "error")


@dataclass(frozen=True)
class Block:
    """A shard of new rows, with the later attempts at them.

    Attributes:
        shard: the shard.
        first: number of its first row.
        commit: of the shard; None until it is computed.
        retried: the attempts that count in place of the shard's failures: index entries, each with
            the `shard` that holds it, by row. The first attempt that is ok counts, else the latest.
    """

    shard: Shard
    first: int
    commit: dict[str, Any] | None
    retried: dict[int, dict[str, Any]]

    @property
    def computed(self) -> bool:
        """Whether any row was computed."""
        return self.commit is not None or bool(self.retried)


class Reader:
    """A features directory, read block by block.

    Args:
        directory: of format 2 or 3.
        commits: those that count, by the number of the shard; default: all that are valid.

    Attributes:
        plan: of the directory.
        plan_sha256: its hash.
        generations: in order.
        shards: of all generations.
        commits: of the shards that have a valid one, by number; files are compared by size.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        commits: Mapping[int, dict[str, Any]] | None = None,
    ) -> None:
        self.directory = Path(directory)
        path = self.directory / "plan.json"
        if not path.exists():
            raise FileNotFoundError(f"{self.directory} is no features directory: no plan.json")
        self.plan = read_plan(path)
        self.plan_sha256 = plan_sha256(self.plan)
        self.generations = read_generations(self.directory, self.plan)
        self.shards = [shard for g in self.generations for shard in g.shards]
        if commits is None:
            found = (
                (shard.shard, read_commit(self.directory, shard, self.plan, self.plan_sha256))
                for shard in self.shards
            )
            commits = {number: commit for number, commit in found if commit is not None}
        self.commits = commits

    @property
    def n_rows(self) -> int:
        """Number of rows of all generations, computed or not; a retried row counts once."""
        return sum(generation.rows for generation in self.generations)

    @property
    def missing(self) -> list[Shard]:
        """Shards without a valid commit."""
        return [shard for shard in self.shards if shard.shard not in self.commits]

    @functools.cached_property
    def blocks(self) -> list[Block]:
        """The shards of new rows, in the order of the rows."""
        retried: dict[int, dict[str, Any]] = {}
        computed = (s.shard for s in self._shards_of("retry") if s.shard in self.commits)
        for shard in computed:
            for entry in read_index(self.directory, shard):
                earlier = retried.get(entry["row"])
                if earlier is None or earlier["status"] != "ok":  # an ok is final
                    retried[entry["row"]] = {**entry, "shard": shard}
        blocks, first = [], 0
        for shard in self._shards_of("start", "update"):
            rows = range(first, first + shard.rows)
            found = {row: retried[row] for row in rows if row in retried} if retried else {}
            commit = self.commits.get(shard.shard)
            if found and commit is not None:
                # a damaged shard that was computed again may have features of retried rows
                ok = set(self._stored(shard.shard, [])[0].tolist())
                found = {row: entry for row, entry in found.items() if row not in ok}
            blocks.append(Block(shard, first, commit, found))
            first += shard.rows
        return blocks

    def _shards_of(self, *kinds: str) -> Iterator[Shard]:
        return (shard for g in self.generations if g.kind in kinds for shard in g.shards)

    @property
    def computed_blocks(self) -> Iterator[Block]:
        """The blocks of which any row was computed."""
        return (block for block in self.blocks if block.computed)

    def n_ok(self, block: Block) -> int:
        """Returns the number of rows that have features."""
        n_retried = sum(entry["status"] == "ok" for entry in block.retried.values())
        return n_retried + (0 if block.commit is None else block.commit["ok"])

    def tensors(self, block: Block, names: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Reads features of a block.

        Args:
            block: one of `blocks`.
            names: of the features.

        Returns:
            Numbers of the rows that have features, int64 [n] in ascending order, and the features
            [n, ...] by name, which are mapped from the file where there was no retry.
        """
        pieces = list(self.pieces(block, names))
        if len(pieces) == 1:
            return pieces[0]
        rows = torch.cat([torch.empty(0, dtype=torch.int64), *(piece for piece, _ in pieces)])
        rows = rows.sort().values
        merged = {
            name: empty.new_empty(len(rows), *empty.shape[1:])
            for name, empty in self.empty(names).items()
        }
        for piece, tensors in pieces:
            places = torch.searchsorted(rows, piece)
            for name, tensor in tensors.items():
                merged[name][places] = tensor
        return rows, merged

    def pieces(
        self, block: Block, names: Sequence[str]
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Yields numbers and features of the rows of a block, by the shard that they are read from.

        Tensors are mapped from the files; retried rows are not at their place.
        """
        if block.commit is not None:
            yield self._stored(block.shard.shard, names)
        ok = [entry for entry in block.retried.values() if entry["status"] == "ok"]
        for shard, entries in groupby(sorted(ok, key=_place), lambda entry: entry["shard"]):
            positions = [entry["pos"] for entry in entries]
            place: Any = torch.tensor(positions)
            if positions[-1] - positions[0] < len(positions):  # as a rule; nothing is copied
                place = slice(positions[0], positions[-1] + 1)
            rows, tensors = self._stored(shard, names)
            yield rows[place], {name: tensor[place] for name, tensor in tensors.items()}

    def _stored(self, shard: int, names: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        path = self.directory / file_name("features", shard)
        try:
            with safe_open(path, framework="pt") as file:
                # a mapped tensor keeps its whole file mapped
                rows = file.get_tensor("row_id").clone()
                return rows, {name: file.get_tensor(name) for name in names}
        except SafetensorError as error:
            raise damaged(path, error) from error

    def empty(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Returns features [0, ...] by name."""
        outputs = {name: self.plan["outputs"][name] for name in names}
        return {
            name: torch.empty(0, *output["shape"], dtype=getattr(torch, output["dtype"]))
            for name, output in outputs.items()
        }

    def row(self, row: int, names: Sequence[str]) -> dict[str, Tensor]:
        """Returns the features of a row that is ok."""
        block = self.block_of(row)
        if row in block.retried:
            shard, position = block.retried[row]["shard"], block.retried[row]["pos"]
        else:
            shard = block.shard.shard
            position = int(torch.searchsorted(self._stored(shard, [])[0], row))
        _, tensors = self._stored(shard, names)
        return {name: tensor[position].clone() for name, tensor in tensors.items()}

    def ids_of(self, rows: Sequence[int]) -> dict[int, str]:
        """Returns the ids of some rows."""
        found: dict[int, str] = {}
        for block, wanted in groupby(sorted(set(rows)), self.block_of):
            entries = self.entries(block)
            found |= {row: entries[row - block.first]["id"] for row in wanted}
        return found

    def block_of(self, row: int) -> Block:
        """Returns the block of a row."""
        number = torch.searchsorted(self._firsts, row, right=True)
        return self.blocks[int(number) - 1]

    @functools.cached_property
    def _firsts(self) -> Tensor:
        return torch.tensor([block.first for block in self.blocks])

    def entries(self, block: Block) -> list[dict[str, Any]]:
        """Returns the index entry of every row of a block.

        Rows that were not computed have a `row`, an `id` and the `status` "missing".
        """
        if block.commit is None:
            entries = [
                {"row": row["row"], "id": row["id"], "status": "missing"}
                for row in read_rows(self.directory, block.shard)
            ]
        else:
            entries = self._parsed(block, self._index_lines(block))
        if block.retried:
            entries = [block.retried.get(entry["row"], entry) for entry in entries]
        return entries

    def row_of_id(self, id: str) -> int | None:
        """Returns the number of the first row with this id, or None."""
        text = b'"id":' + json.dumps(id).encode()
        for block in self.blocks:
            if block.commit is None or text in self._index_bytes(block):
                for entry in self.entries(block):
                    if entry["id"] == id:
                        return entry["row"]
        return None

    def errors(self, block: Block) -> list[RowError]:
        """Returns the rows of a block that failed, in order."""
        entries = list(block.retried.values())
        if block.commit is not None and block.commit["errors"]:
            failed = [line for line in self._index_lines(block) if _FAILED in line]
            found = self._parsed(block, failed)
            entries += [entry for entry in found if entry["row"] not in block.retried]
        return [
            RowError(entry["row"], entry["id"], entry["kind"], entry["message"])
            for entry in sorted(entries, key=lambda entry: entry["row"])
            if entry["status"] == "error"
        ]

    def columns(self, block: Block) -> list[dict[str, Any]]:
        """Returns the carried columns of every row of a block."""
        return [row.get("columns") or {} for row in read_rows(self.directory, block.shard)]

    def counts(self) -> tuple[int, Counter[str]]:
        """Returns the number of rows that have features, and of failed rows by kind."""
        n_ok, kinds = 0, Counter[str]()
        for block in self.computed_blocks:
            n_ok += self.n_ok(block)
            if block.retried or block.commit is None:
                kinds.update(error.kind for error in self.errors(block))
            else:
                kinds.update(block.commit["errors"])
        return n_ok, kinds

    def _index_bytes(self, block: Block) -> bytes:
        return (self.directory / file_name("index", block.shard.shard)).read_bytes()

    def _index_lines(self, block: Block) -> list[bytes]:
        return self._index_bytes(block).splitlines()

    def _parsed(self, block: Block, lines: list[bytes]) -> list[dict[str, Any]]:
        try:
            entries = json.loads(b"[" + b",".join(lines) + b"]")  # one call is faster than many
            return list(map(check_entry, entries))
        except ValueError as error:
            raise damaged(self.directory / file_name("index", block.shard.shard), error) from error


def reason(entry: dict[str, Any]) -> str | None:
    """Returns in one line why a row has no features, or None if it has."""
    if entry["status"] == "ok":
        return None
    return f"{entry['kind']}: {entry['message']}" if "kind" in entry else "not computed yet"


def numpy_array(tensor: Tensor) -> np.ndarray:
    """Returns an array of the same values; of bf16, which NumPy lacks, in float32."""
    return (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()


def utf8(value: Any) -> Any:
    """Returns a JSON value whose texts and names can be encoded.

    Bytes of file names that are no UTF-8 become `\\xff`, other lone surrogates `\\ud83d`.
    """
    if isinstance(value, str):
        return value if value.isascii() else _SURROGATE.sub(_escape, value)
    if isinstance(value, dict):
        return {utf8(name): utf8(item) for name, item in value.items()}
    return list(map(utf8, value)) if isinstance(value, list) else value


def _escape(surrogate: re.Match[str]) -> str:
    code = ord(surrogate[0])
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"


def _place(entry: dict[str, Any]) -> tuple[int, int]:
    return entry["shard"], entry["pos"]


def table_name(column: str, features: Collection[str]) -> str:
    """Returns the name of a carried column in a row or table, which none of our columns has.

    A column called `id`, `row`, `error` or as one of the features gets the prefix `column_`, and so
    does one that has this prefix before such a name: no two columns get the same name.
    """
    taken = column in features or re.sub("^(column_)+", "", column) in {*_OWN_COLUMNS, *features}
    return f"column_{column}" if taken else column
