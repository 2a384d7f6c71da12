"""A table of the ops and dtypes that work on a GPU."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ._dispatch import KernelWarning, launches_on
from .machine import find_device
from .op import DTYPE_NAMES, op_names
from .self_check import current

_WITHOUT_A_GPU = (
    "no GPU here, so there is nothing to check: on {device} every op runs as PyTorch's own.\n"
    "`python -m fastbb_kernels.check` (needs fastbb[testing]) runs the kernels in an interpreter "
    "and compiles them for every GPU."
)


@dataclass(frozen=True)
class DeviceReport:
    """Results of the check of a device.

    Attributes:
        device: its name, "" without a GPU.
        outcomes: by op and dtype, a sentence that describes the problem, or None.
        notes: on the file in which the results are kept.
        text: the table and the problems.
    """

    device: str
    outcomes: dict[tuple[str, torch.dtype], str | None]
    notes: tuple[str, ...]
    text: str

    @property
    def problems(self) -> list[str]:
        return [problem for problem in self.outcomes.values() if problem]

    def __repr__(self) -> str:
        return self.text


def check_ops(
    device: str | None = None,
    ops: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    again: bool = False,
    progress: Callable[[str], None] = lambda op: None,
) -> DeviceReport:
    """Runs the small cases of ops, and keeps the results.

    Args:
        device: such as "cuda:1"; default: the GPU if there is one.
        ops: their names; default: all.
        dtypes: "fp32", "fp16", "bf16"; default: all.
        again: runs also the ops that are known to be off.
        progress: called with the name of each op before it is checked.

    Raises:
        ValueError: there is no such device, op or dtype.
    """
    names = {name: dtype for dtype, name in DTYPE_NAMES.items()}
    for kind, wanted, known in (("op", ops, op_names()), ("dtype", dtypes, names)):
        for name in wanted:
            if name not in known:
                raise ValueError(f"{kind}: wanted one of {', '.join(known)}, got {name!r}")
    found = find_device(device)
    check = current()
    if check is None or not launches_on(found):
        return DeviceReport("", {}, (), _WITHOUT_A_GPU.format(device=found))
    outcomes = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KernelWarning)  # the report says it
        for op in ops or op_names():
            progress(op)
            for dtype in (names[name] for name in dtypes or names):
                known = None if again else check.known_problem(op, found, dtype)
                outcomes[op, dtype] = known or check.check(op, found, dtype)
    cache = check.cache(found)
    notes = (*cache.notes, f"remembered in {cache.path}")
    text = "\n".join([cache.machine.device, *_table(outcomes), *notes])
    return DeviceReport(cache.machine.device, outcomes, notes, text)


def _table(outcomes: dict[tuple[str, torch.dtype], str | None]) -> list[str]:
    """Makes a line per op, a blank line, and a line per problem."""
    ops = list(dict.fromkeys(op for op, _ in outcomes))
    dtypes = list(dict.fromkeys(dtype for _, dtype in outcomes))
    width = max(map(len, ops))
    lines = ["  ".join(["op".ljust(width), *(DTYPE_NAMES[dtype] for dtype in dtypes)])]
    for op in ops:
        cells = ("off " if outcomes[op, dtype] else "ok  " for dtype in dtypes)
        lines.append("  ".join([op.ljust(width), *cells]).rstrip())
    problems = [problem for problem in outcomes.values() if problem]
    return [*lines, "", *problems, ""] if problems else [*lines, ""]
