"""Instructions that a program of an NVIDIA binary issues, counted without a GPU.

The code says how many instructions a loop has, and what a traced program multiplies, stores and
loads says how often each loop runs.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from triton.compiler import CompiledKernel

from .binary import LOADS, NVIDIA_INSTRUCTION, STORES, disassembly, nvidia_access_bits

_LABEL = re.compile(r"^(\.L\w+):")
_TARGET = re.compile(r"\((\.L\w+)\)")
_LANES = 32
# scheduler cycles of an instruction of the special function unit: 4 lanes a cycle
_SPECIAL_CYCLES = 8


@dataclass(frozen=True)
class Work:
    """What one program does, as `trace` counts it.

    Attributes:
        flops: multiplications and additions of `tl.dot`.
        stored_bytes: to global memory.
        loaded_bytes: from global memory.
    """

    flops: float
    stored_bytes: float
    loaded_bytes: float


@dataclass(frozen=True)
class Issued:
    """Instructions that a warp issues, each for all of its lanes.

    Attributes:
        instructions: all of them.
        special: those of the special function unit (exp2, reciprocal, square root).
    """

    instructions: float
    special: float

    @property
    def cycles(self) -> float:
        """Cycles that a scheduler needs at least: to issue them, or for the special functions."""
        return max(self.instructions, _SPECIAL_CYCLES * self.special)


def issued(kernel: CompiledKernel, work: Work) -> Issued | None:
    """Counts the instructions of a warp of a program; both sides of a branch count.

    Loops that multiply are taken to run equally often, as are those that store and do not
    multiply, and those that only load. A loop that does nothing of these counts once.

    Args:
        kernel: compiled for an NVIDIA GPU.
        work: of one of its programs.

    Returns:
        None: the binary is not NVIDIA's, or its products do not tell what they multiply (sm_100).
    """
    if kernel.metadata.target.backend != "cuda":
        return None
    code = _Code.read(disassembly(kernel))
    if any(name.startswith("UTC") and "MMA" in name for name, _ in code.instructions):
        return None
    runs = _runs(code, work, kernel.metadata.num_warps)
    special = [name.startswith("MUFU") for name, _ in code.instructions]
    return Issued(sum(runs), sum(n for n, is_special in zip(runs, special) if is_special))


@dataclass(frozen=True)
class _Code:
    """Disassembled code.

    Attributes:
        instructions: name and operands, in order.
        labels: positions in `instructions` by name.
    """

    instructions: Sequence[tuple[str, str]]
    labels: dict[str, int]

    @classmethod
    def read(cls, listing: str) -> "_Code":
        instructions: list[tuple[str, str]] = []
        labels: dict[str, int] = {}
        for line in listing.splitlines():
            if label := _LABEL.match(line.strip()):
                labels[label[1]] = len(instructions)
            elif (found := NVIDIA_INSTRUCTION.search(line)) and found[1] != "NOP":
                instructions.append((found[1], line[found.end() :]))
        return cls(instructions, labels)

    @cached_property
    def loops(self) -> list[range]:
        """Positions of each loop, without the endless one that fills the end of the code."""
        found: dict[int, int] = {}
        for position, (name, operands) in enumerate(self.instructions):
            target = _TARGET.search(operands)
            start = self.labels.get(target[1]) if target and name.startswith("BRA") else None
            if start is not None and start < position:
                found[start] = max(position, found.get(start, 0))
        return [range(start, end + 1) for start, end in sorted(found.items())]

    def innermost(self, position: int) -> range | None:
        """The smallest loop around an instruction."""
        around = [loop for loop in self.loops if position in loop]
        return min(around, key=len, default=None)


def _runs(code: _Code, work: Work, num_warps: int) -> list[float]:
    """How often a warp runs each instruction."""
    loops = [code.innermost(position) for position in range(len(code.instructions))]
    runs: dict[range | None, float] = {None: 1.0}
    measures: list[tuple[Callable[[str], float], float]] = [
        (_flops, work.flops),
        (lambda name: _global_bytes(name, STORES), work.stored_bytes),
        (lambda name: _global_bytes(name, LOADS), work.loaded_bytes),
    ]
    for measure, total in measures:
        amounts: defaultdict[range | None, float] = defaultdict(float)
        for (name, _), loop in zip(code.instructions, loops):
            amounts[loop] += measure(name)
        known = sum(amounts.get(loop, 0.0) * n for loop, n in runs.items())
        unknown = {loop for loop, amount in amounts.items() if amount and loop not in runs}
        if unknown:
            left = max(0.0, total / num_warps - known)
            times = left / sum(amounts[loop] for loop in unknown)
            runs.update(dict.fromkeys(unknown, times))
    return [runs.get(loop, 1.0) for loop in loops]


def _flops(name: str) -> float:
    """Multiplications and additions of a matrix instruction, by a warp."""
    kind, *parts = name.split(".")
    if kind == "HGMMA":  # of the four warps of a group
        m, n, k = map(int, parts[0].split("x"))
        return 2 * m * n * k / 4
    if kind == "HMMA":  # 16816: 16 x 8 x 16
        return 2 * 16 * 8 * int(parts[0].removeprefix("168"))
    return 0.0


def _global_bytes(name: str, mnemonics: Sequence[str]) -> float:
    """Bytes that a warp moves by an instruction, if it is one of these."""
    is_one = name.split(".")[0] in mnemonics
    return _LANES * nvidia_access_bits(name) / 8 if is_one else 0.0
