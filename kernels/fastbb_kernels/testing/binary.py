"""Costs and resources of a compiled kernel, read from its binary; no GPU is needed.

NVIDIA: the resource table of the cubin and its disassembly, by the tools that Triton ships.
AMD: the assembly that Triton keeps, and the metadata at its end.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.cache import get_cache_manager

from .._dispatch import Architecture as ArchitectureName
from ..architectures import Architecture, find_architecture

SCHEDULERS = 4  # of a multiprocessor, each with its own quarter of the registers
_REGISTER_UNIT = 8  # registers per thread are allocated in multiples of this number
_SHARED_UNIT = 128  # bytes; the same for shared memory

NVIDIA_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
LOADS, STORES = ("LDG", "LDGSTS"), ("STG",)  # NVIDIA's, of global memory
_AMD_INSTRUCTION = re.compile(r"^\s+([a-z]+_\w+)", re.MULTILINE)
_AMD_SPILL = re.compile(r"^.*Folded (?:Spill|Reload)$\n", re.MULTILINE)
_AMD_TO_SHARED = re.compile(r"^\s+(?:global|buffer)_load_.*\blds\b", re.MULTILINE)


@dataclass(frozen=True)
class BinaryFacts:
    """Resources that a binary needs. Counts are numbers of instructions in its code.

    Attributes:
        kernel: its name.
        arch: its target.
        num_warps: warps of a CTA.
        registers: vector registers per thread.
        spills: accesses to local memory (NVIDIA), spilled vector registers (AMD); should be 0.
        stack: bytes of memory per thread. On NVIDIA a small stack without spills is harmless; it
            may hold descriptors. On AMD any stack is scratch memory.
        shared: bytes of shared memory per CTA.
        mma: matrix instructions, by full name.
        mma_class: name of the most frequent one, no suffixes: HMMA, HGMMA, UTCHMMA, v_mfma;
            None: no matrix instruction.
        wide_accesses: loads and stores of global memory of 128 bits per thread or more.
        medium_accesses: those of 64 bits.
        narrow_accesses: the others.
        async_copies: those that bypass registers (cp.async), among the three above.
        tma: bulk tensor copies, not among them.
        ctas_per_sm: CTAs that a multiprocessor holds at a time.
        occupancy: their share of the warps that it could hold.
        occupancy_limit: what bounds them: "registers", "threads", "ctas", "shared memory" or
            "tensor memory".
    """

    kernel: str
    arch: ArchitectureName
    num_warps: int
    registers: int
    spills: int
    stack: int
    shared: int
    mma: Mapping[str, int]
    mma_class: str | None
    wide_accesses: int
    medium_accesses: int
    narrow_accesses: int
    async_copies: int
    tma: int
    ctas_per_sm: int
    occupancy: float
    occupancy_limit: str

    @property
    def wide_share(self) -> float:
        """Share of 128-bit accesses among those of global memory; 1.0 if all are by TMA."""
        total = self.wide_accesses + self.medium_accesses + self.narrow_accesses
        return self.wide_accesses / total if total else 1.0


def binary_facts(kernel: CompiledKernel, arch: ArchitectureName | None = None) -> BinaryFacts:
    """Reads a binary; of an NVIDIA binary this takes about 0.5 s, and is then in Triton's cache.

    Args:
        kernel: from `Launch.kernel`, `Recording.kernels` or a launch on a device.
        arch: architecture whose limits give the occupancy; default: the kernel's target.

    Raises:
        ValueError: the architecture is not in the table.
    """
    limits = find_architecture(kernel.metadata.target.arch if arch is None else arch)
    key = kernel.hash, limits.name
    if key not in _known:
        read = _read_nvidia if kernel.metadata.target.backend == "cuda" else _read_amd
        _known[key] = _facts(kernel, limits, read(kernel))
    return _known[key]


_known: dict[tuple[str, ArchitectureName], BinaryFacts] = {}


@dataclass(frozen=True)
class _Reading:
    """Facts that binaries of both vendors have; fields as in `BinaryFacts`."""

    registers: int
    spills: int
    stack: int
    mma: Mapping[str, int]
    access_bits: Mapping[int, int]  # width of a global access per thread -> how many
    async_copies: int
    tma: int


def _facts(kernel: CompiledKernel, limits: Architecture, reading: _Reading) -> BinaryFacts:
    metadata = kernel.metadata
    classes = Counter()
    for name, count in reading.mma.items():
        classes["v_mfma" if name.startswith("v_") else name.split(".")[0]] += count
    bits = reading.access_bits.items()
    tensor_columns = getattr(metadata, "tmem_size", 0) or 0
    ctas, limit = ctas_per_sm(
        reading.registers, metadata.shared, metadata.num_warps, limits, tensor_columns
    )
    return BinaryFacts(
        kernel=kernel.name,
        arch=limits.name,
        num_warps=metadata.num_warps,
        registers=reading.registers,
        spills=reading.spills,
        stack=reading.stack,
        shared=metadata.shared,
        mma=reading.mma,
        mma_class=classes.most_common(1)[0][0] if classes else None,
        wide_accesses=sum(count for width, count in bits if width >= 128),
        medium_accesses=sum(count for width, count in bits if 64 <= width < 128),
        narrow_accesses=sum(count for width, count in bits if width < 64),
        async_copies=reading.async_copies,
        tma=reading.tma,
        ctas_per_sm=ctas,
        occupancy=ctas * metadata.num_warps * limits.warp_size / limits.threads,
        occupancy_limit=limit,
    )


def ctas_per_sm(
    registers: int, shared: int, num_warps: int, limits: Architecture, tensor_columns: int = 0
) -> tuple[int, str]:
    """Returns the number of CTAs that fit on a multiprocessor, and the resource that limits it.

    Args:
        registers: per thread.
        shared: bytes per CTA.
        num_warps: of a CTA.
        limits: of the hardware.
        tensor_columns: of tensor memory per CTA.
    """
    registers_per_warp = _round_up(max(registers, 1), _REGISTER_UNIT) * limits.warp_size
    # schedulers do not share their registers
    warps = SCHEDULERS * (limits.registers // SCHEDULERS // registers_per_warp)
    shared_per_cta = _round_up(shared + limits.shared_reserved, _SHARED_UNIT)
    bounds = {
        "registers": warps // num_warps,
        "threads": limits.threads // (num_warps * limits.warp_size),
        "ctas": limits.ctas,
    }
    if shared_per_cta:
        bounds["shared memory"] = limits.shared // shared_per_cta
    if tensor_columns:
        bounds["tensor memory"] = limits.tensor_columns // tensor_columns
    limit = min(bounds, key=lambda name: bounds[name])
    return bounds[limit], limit


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def _read_nvidia(kernel: CompiledKernel) -> _Reading:
    resources = _tool("cuobjdump", "-res-usage", cubin=kernel.asm["cubin"])
    usage = {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", resources)}
    counts = Counter(NVIDIA_INSTRUCTION.findall(disassembly(kernel)))

    access_bits = Counter()
    for name, count in counts.items():
        if name.split(".")[0] in (*LOADS, *STORES):
            access_bits[nvidia_access_bits(name)] += count
    return _Reading(
        registers=usage["REG"],
        spills=_count(counts, r"LDL|STL"),
        stack=usage["STACK"] + usage["LOCAL"],
        mma={name: n for name, n in counts.items() if re.match(r"[A-Z]*MMA\b", name)},
        access_bits=access_bits,
        async_copies=_count(counts, r"LDGSTS"),
        tma=_count(counts, r"UTMALDG|UTMASTG|UTMAREDG|UBLKCP"),
    )


def nvidia_access_bits(name: str) -> int:
    """Bits per thread of an instruction that loads or stores global memory."""
    # a modifier by itself: LTC128B is a cache hint
    widths = {"256": 256, "128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
    return next((widths[part] for part in name.split(".") if part in widths), 32)


def disassembly(kernel: CompiledKernel) -> str:
    """Returns the SASS listing of an NVIDIA binary, cached beside it: nvdisasm starts slowly."""
    cache = get_cache_manager(kernel.hash)
    name = f"{kernel.name[:150]}.nvdisasm"
    path = cache.get_file(name)
    if path is None:
        listing = _tool("nvdisasm", "-c", "-ndf", cubin=kernel.asm["cubin"])
        path = cache.put(listing, name, binary=False)
    return Path(path).read_text()


def _tool(name: str, *options: str, cubin: bytes) -> str:
    """Returns the standard output of a binary tool in Triton's wheel."""
    program = getattr(knobs.nvidia, name).path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [program, *options, file.name]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{program} {' '.join(options)} failed: {done.stderr.strip()}")
    return done.stdout


def _read_amd(kernel: CompiledKernel) -> _Reading:
    assembly = kernel.asm["amdgcn"]

    def metadata(name: str) -> int:
        return int(re.findall(rf"^\s+\.{name}:\s+(\d+)$", assembly, re.MULTILINE)[0])

    # on gfx90a spills are normal buffer accesses, marked only by the compiler's remark
    code = _AMD_SPILL.sub("", assembly)
    counts = Counter(_AMD_INSTRUCTION.findall(code))
    access_bits = Counter()
    for name, count in counts.items():
        access = re.fullmatch(r"(?:global|buffer|flat)_(?:load|store)_(?:lds_)?(\w+)", name)
        if access:
            widths = {"dwordx4": 128, "b128": 128, "dwordx3": 96, "dwordx2": 64, "b64": 64}
            access_bits[widths.get(access[1], 32)] += count
    return _Reading(
        registers=metadata("vgpr_count"),
        spills=metadata("vgpr_spill_count"),
        stack=metadata("private_segment_fixed_size"),
        mma={name: n for name, n in counts.items() if re.match(r"v_(mfma|smfmac)_", name)},
        access_bits=access_bits,
        async_copies=len(_AMD_TO_SHARED.findall(code)),
        tma=0,
    )


def _count(counts: Mapping[str, int], mnemonics: str) -> int:
    return sum(n for name, n in counts.items() if re.match(rf"(?:{mnemonics})\b", name))
