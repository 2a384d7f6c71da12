"""The plan of a features directory: what decides its values, and how a resume compares it.

What a resume does not say comes from the plan. Batch size, mode, rows per shard and the number of
threads always do: they are fixed at the first start.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..backbone.base import Backbone
from ..engine.openvino import OPENVINO, openvino_version
from ..images.processor import ImageProcessor
from ..images.spec import ImageProcessorSpec
from .layout import PlanMismatchError, flatten
from .outputs import Wanted
from .pipeline import FeatureExtractor

DEFAULT_BATCH_SIZE = 32
_DEFAULT_SHARD_ROWS = 4096
_MAX_DEFAULT_SHARD_BYTES = 256 * 2**20
# arguments of FeatureExtractor that a plan holds under the same name
_SAID = ("features", "norm", "normalize", "feature_dtype", "precision", "device")
# recorded, and not compared; the stored dtypes are those of `outputs`
_FIXED = frozenset(
    {"format", "model.name", "feature_dtype"}
    | {"batch_size", "shard_rows", "mode", "runs", "threads"}
    | {"versions.openvino"}  # `check_openvino` compares it
)
# the first of these that differs explains the others
_ORDER = ("precision", "features", "norm", "normalize", "stages")
_MAX_DIFFERENCES = 3
_NOTHING = "nothing"
_MAX_VALUE_CHARS = 60


def make_plan(
    extractor: FeatureExtractor,
    mode: str,
    runs: str,
    shard_rows: int | None,
    enough_rows: int | None = None,
) -> dict[str, Any]:
    """Returns the plan of a first start.

    Args:
        extractor: what computes the features.
        mode: as asked.
        runs: the mode that was chosen.
        shard_rows: rows per shard; default: 4096, or fewer where features would pass 256 MiB.
        enough_rows: rows per shard that give every process some, in whole batches.
    """
    plan = {**extractor.settings(), "mode": mode, "runs": runs}
    if runs == OPENVINO:
        plan["versions"][OPENVINO] = openvino_version()
    plan |= {"batch_size": extractor.batch_size, "feature_dtype": extractor.feature_dtype}
    most = min(enough_rows or _DEFAULT_SHARD_ROWS, _DEFAULT_SHARD_ROWS)
    default = _default_shard_rows(plan["outputs"], plan["batch_size"], most)
    plan["shard_rows"] = shard_rows or default
    if extractor.device.type == "cpu":
        plan["threads"] = torch.get_num_threads()
    return plan


def extractor_arguments(
    directory: Path, plan: Mapping[str, Any], said: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the arguments of the extractor of a resume: what is said, else what the plan holds.

    Args:
        directory: of the plan, for messages.
        plan: of the directory.
        said: arguments of the command; None is not said.

    Raises:
        PlanMismatchError: they differ, as far as that is known without the model.
    """
    arguments = {name: value for name, value in said.items() if value is not None}
    asked = {name: arguments[name] for name in ("precision", "normalize") if name in arguments}
    if "features" in arguments:
        asked["features"] = list(Wanted.parse(arguments["features"], None).names)
    check_plan(directory, {name: plan[name] for name in asked}, asked)
    for name in _SAID:
        if name not in arguments and plan.get(name) is not None:
            arguments[name] = plan[name]
    if "stages" in plan:
        arguments.setdefault("out_indices", plan["stages"])
    if not arguments.keys() & {"size", "processor"}:
        spec = ImageProcessorSpec.from_dict(plan["preprocessing"])
        arguments["processor"] = ImageProcessor(spec)
    arguments["batch_size"] = plan["batch_size"]
    return arguments


def make_extractor(
    model: str | os.PathLike[str] | Backbone | None,
    directory: Path | None,
    plan: Mapping[str, Any] | None,
    said: Mapping[str, Any],
    batch_size: int | None,
) -> FeatureExtractor:
    """Loads the model of a run.

    Args:
        model: name, directory or backbone; None: that of the plan.
        directory: of the plan, for messages.
        plan: of a resume.
        said: arguments of the command; None is not said.
        batch_size: as the command said; a plan's goes before.

    Raises:
        OSError: the model cannot be had.
        PlanMismatchError: the plan has others, as far as that is known without the model, or
            OpenVINO computed the features and is not here.
        ValueError: the model does not do what is wanted.
    """
    if plan is None or directory is None:
        arguments = {name: value for name, value in said.items() if value is not None}
        arguments["batch_size"] = batch_size or DEFAULT_BATCH_SIZE
    else:
        check_openvino(directory, plan)
        arguments = extractor_arguments(directory, plan, said)
        if model is None:
            return _as_at_first(plan["model"]["name"], arguments)
    assert model is not None, "a first start without a model was refused"
    return FeatureExtractor(model, mode="eager", **arguments)


def _as_at_first(name: str, arguments: dict[str, Any]) -> FeatureExtractor:
    try:
        return FeatureExtractor(name, mode="eager", **arguments)
    except OSError as error:
        raise OSError(
            f"the model of the first start, {name}, cannot be had: give where it is now (--model). "
            f"{error}"
        ) from error


def check_openvino(directory: Path, plan: Mapping[str, Any]) -> None:
    """Compares the version of OpenVINO with a plan's, if its features are OpenVINO's.

    Raises:
        PlanMismatchError: it is not installed, or another version is.
    """
    if plan["runs"] != OPENVINO:
        return
    was, now = plan["versions"].get(OPENVINO), openvino_version()
    if was != now:
        is_there = f"here is {now}" if now else "which is not installed here"
        raise PlanMismatchError(
            f"{directory} holds features that OpenVINO {was} computed, {is_there}:\n"
            f"pip install openvino=={was} (the extra fastbb[openvino]), or use another directory"
        )


def check_plan(directory: Path, plan: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Compares a plan with the settings of a command.

    Args:
        directory: of the plan, for the message.
        plan: of the directory.
        settings: of the extractor, see `FeatureExtractor.settings`.

    Raises:
        PlanMismatchError: they differ; at most five lines name how.
    """
    was, now = flatten(plan), flatten(settings)
    names = [
        name
        for name in (was.keys() | now.keys()) - _FIXED
        if name not in was or name not in now or was[name] != now[name]
    ]
    if not names:
        return

    def place(name: str) -> tuple[int, int, str]:
        first = _ORDER.index(name) if name in _ORDER else len(_ORDER)
        return first, name.startswith("outputs."), name

    names.sort(key=place)
    n_shown = len(names) if len(names) <= _MAX_DIFFERENCES else _MAX_DIFFERENCES - 1
    lines = [f"  {name}: {_compared(was, now, name)}" for name in names[:n_shown]]
    if len(names) > n_shown:
        lines.append(f"  and {len(names) - n_shown} more")
    first = f"{directory} holds features of another plan:"
    raise PlanMismatchError("\n".join([first, *lines, _advice(names[0])]))


def _advice(name: str) -> str:
    if name.startswith(("versions.", "limits.")):
        return "Install the version that wrote it, or use another directory"
    if name.startswith("model."):
        return "Give the model of the first start (--model), or use another directory"
    return "Leave out what differs, and it comes from the plan; or use another directory"


def _compared(was: Mapping[str, Any], now: Mapping[str, Any], name: str) -> str:
    values: list[Any] = [values.get(name, _NOTHING) for values in (was, now)]
    if all(isinstance(value, list) for value in values):  # what only one of them has
        values = [[x for x in a if x not in b] or a for a, b in (values, values[::-1])]
    there, here = (
        text if len(text) <= _MAX_VALUE_CHARS else f"{text[:_MAX_VALUE_CHARS]}..."
        for text in (value if value is _NOTHING else repr(value) for value in values)
    )
    return f"{there} there, {here} now"


def _default_shard_rows(
    outputs: Mapping[str, Mapping[str, Any]], batch_size: int, most: int
) -> int:
    row_bytes = sum(
        math.prod(output["shape"]) * getattr(torch, output["dtype"]).itemsize
        for output in outputs.values()
    )
    rows = min(most, _MAX_DEFAULT_SHARD_BYTES // row_bytes)
    return max(rows // batch_size, 1) * batch_size
