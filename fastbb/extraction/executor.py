"""What computes the shards of a run: this process, or (`pool`) others."""

from __future__ import annotations

import platform
from collections.abc import Generator, Mapping, Sequence
from importlib.metadata import version
from typing import Any, Protocol

import torch

from fastbb_kernels.machine import cpu_name

from ..engine.interruption import check_interrupted
from ..engine.openvino import OPENVINO
from .layout import PlanMismatchError, Shard
from .pipeline import FeatureExtractor
from .plan import check_plan, make_plan
from .shards import ShardEvent, compute_shards
from .store import FeatureWriter

# other versions than those of the plan, for the log
_LOGGED_PACKAGES = ("fastbb", "numpy", "safetensors")
# at least, unless a number of rows is asked for: processes do not begin at the same time
_SHARDS_PER_PART = 4


class Executor(Protocol):
    """Computes the shards of a features directory, with a model that it has loaded."""

    @property
    def environment(self) -> Mapping[str, Any]:
        """Device, threads and versions, in JSON types."""
        ...

    def make_plan(
        self, mode: str, shard_rows: int | None, n_rows: int, n_parts: int
    ) -> dict[str, Any]:
        """Chooses how the model runs, and returns the plan of a first start.

        Args:
            mode: as asked.
            shard_rows: rows per shard, or None.
            n_rows: images to come.
            n_parts: processes that do the shards.
        """
        ...

    def check_plan(self, writer: FeatureWriter) -> None:
        """Raises PlanMismatchError if the model or its settings are not those of the plan."""
        ...

    def compute(
        self, writer: FeatureWriter, shards: Sequence[Shard]
    ) -> Generator[ShardEvent, None, None]:
        """Computes and commits shards, in any order.

        Raises:
            PlanMismatchError: OpenVINO computed the features, and cannot run here.
        """
        ...


class InProcess:
    """An `Executor` in this process."""

    def __init__(self, extractor: FeatureExtractor) -> None:
        self.extractor = extractor
        self._is_prepared = False

    @property
    def environment(self) -> dict[str, Any]:
        extractor = self.extractor
        on_gpu = extractor.device.type == "cuda"
        return {
            "platform": platform.platform(),
            "python": platform.python_version(),
            "device": torch.cuda.get_device_name(extractor.device) if on_gpu else cpu_name(),
            "device_type": extractor.device.type,
            "torch_threads": torch.get_num_threads(),
            "decode_threads": extractor.decode_threads,
            "versions": {name: version(name) for name in _LOGGED_PACKAGES},
        }

    def make_plan(
        self, mode: str, shard_rows: int | None, n_rows: int, n_parts: int
    ) -> dict[str, Any]:
        runs = self.extractor.choose_mode(mode, n_rows)
        self._is_prepared = True
        check_interrupted()  # before the plan records a choice of an interrupted trial
        enough = None if n_parts == 1 else -(-n_rows // (n_parts * _SHARDS_PER_PART))
        return make_plan(self.extractor, mode, runs, shard_rows, enough)

    def check_plan(self, writer: FeatureWriter) -> None:
        check_plan(writer.directory, writer.plan, self.extractor.settings())

    def compute(
        self, writer: FeatureWriter, shards: Sequence[Shard]
    ) -> Generator[ShardEvent, None, None]:
        if not self._is_prepared:
            self._prepare(writer)
            self._is_prepared = True
        return compute_shards(self.extractor, writer, shards)

    def _prepare(self, writer: FeatureWriter) -> None:
        """Prepares the mode of the plan; eager would compute other values than OpenVINO."""
        runs = writer.plan["runs"]
        if runs != OPENVINO:
            self.extractor.prepare(runs, writer.n_rows)
        elif self.extractor.choose_mode(runs, writer.n_rows) != runs:
            rows = self.extractor.explain().rows
            why = "; ".join(row.others or row.why for row in rows if row.what != "cache")
            raise PlanMismatchError(
                f"{writer.directory} holds features that OpenVINO computed, it cannot run here:\n"
                f"{why}; mend that, or use another directory"
            )
