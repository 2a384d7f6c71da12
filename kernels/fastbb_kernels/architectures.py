"""Properties of the eight GPU architectures that every kernel is compiled for.

Limits decide whether a kernel fits and how many of its programs a multiprocessor holds; peaks
serve reports. Nothing here is measured by us. A number that no vendor publishes is None.
"""

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget

from ._dispatch import Architecture as ArchitectureName


@dataclass(frozen=True)
class Architecture:
    """An architecture, and the GPU that represents it.

    In AMD's words a multiprocessor is a compute unit, a CTA a workgroup, a warp a wavefront and
    shared memory LDS.

    Attributes:
        name: compute capability times ten, or the name of AMD's instruction set.
        gpu: the product whose multiprocessors and peaks are given.
        warp_size: threads of a warp.
        registers: 32-bit vector registers of a multiprocessor; each of 4 schedulers has a quarter.
        threads: most resident threads of a multiprocessor.
        ctas: most resident CTAs of a multiprocessor.
        shared: bytes of shared memory of a multiprocessor.
        shared_per_cta: most bytes that one CTA may ask for.
        shared_reserved: bytes of each CTA that the driver reserves.
        mma_class: prefix of the matrix instructions that 16-bit GEMMs must use.
        multiprocessors: of `gpu`; on AMD those that one device shows (one die of an MI250X).
        clock_hz: highest clock; at any other, floors from it stay lower bounds.
        dram_bytes_per_s: peak.
        l2_bytes_per_s: a ROUGH ASSUMPTION from published microbenchmarks, not a vendor's figure.
        bf16_flops: dense peak with fp32 accumulation, per second.
        fp16_flops: as `bf16_flops`.
        fp32_flops: peak without matrix instructions, per second.
        tensor_columns: of 128 x 32 bits in a multiprocessor's tensor memory; 0: it has none.
    """

    name: ArchitectureName
    gpu: str
    warp_size: int
    registers: int
    threads: int
    ctas: int
    shared: int
    shared_per_cta: int
    shared_reserved: int
    mma_class: str
    multiprocessors: int
    clock_hz: float | None
    dram_bytes_per_s: float
    l2_bytes_per_s: float | None
    bf16_flops: float
    fp16_flops: float
    fp32_flops: float
    tensor_columns: int = 0

    @property
    def target(self) -> GPUTarget:
        """The target as Triton's compiler takes it."""
        return GPUTarget("cuda" if self.is_nvidia else "hip", self.name, self.warp_size)

    @property
    def is_nvidia(self) -> bool:
        return isinstance(self.name, int)

    @property
    def label(self) -> str:
        """The name in messages: sm_90 or gfx942."""
        return f"sm_{self.name}" if self.is_nvidia else str(self.name)


def _nvidia(name: int, gpu: str, **facts) -> Architecture:
    # CUDA C++ Programming Guide, "Technical Specifications per Compute Capability": 64 K
    # registers per multiprocessor, and 1 KiB of each CTA's shared memory for the system
    return Architecture(name, gpu, warp_size=32, registers=65536, shared_reserved=1024, **facts)


def _amd(name: str, gpu: str, **facts) -> Architecture:
    # AMD, CDNA2 and CDNA3 ISA guides: 4 SIMDs of 512 registers x 64 lanes with at most 8 waves
    # each, and 64 KiB of LDS. LLVM, AMDGPUBaseInfo.cpp: a workgroup per wave at most.
    return Architecture(
        name,
        gpu,
        warp_size=64,
        registers=4 * 512 * 64,
        threads=4 * 8 * 64,
        ctas=4 * 8,
        shared=64 << 10,
        shared_per_cta=64 << 10,
        shared_reserved=0,
        mma_class="v_mfma",
        **facts,
    )


# threads, CTAs and shared memory: the same table of the CUDA C++ Programming Guide
ARCHITECTURES: dict[ArchitectureName, Architecture] = {
    architecture.name: architecture
    for architecture in (
        _nvidia(
            80,
            "A100-SXM4-80GB",  # NVIDIA A100 data sheet and Ampere GA100 whitepaper
            threads=2048,
            ctas=32,
            shared=164 << 10,
            shared_per_cta=163 << 10,
            mma_class="HMMA",
            multiprocessors=108,
            clock_hz=1.41e9,
            dram_bytes_per_s=2.039e12,
            l2_bytes_per_s=4.5e12,
            bf16_flops=312e12,
            fp16_flops=312e12,
            fp32_flops=19.5e12,
        ),
        _nvidia(
            86,
            "A10",  # NVIDIA A10 data sheet; 72 multiprocessors: 9216 CUDA cores / 128
            threads=1536,
            ctas=16,
            shared=100 << 10,
            shared_per_cta=99 << 10,
            mma_class="HMMA",
            multiprocessors=72,
            clock_hz=1.695e9,
            dram_bytes_per_s=600e9,
            l2_bytes_per_s=None,
            bf16_flops=125e12,
            fp16_flops=125e12,
            fp32_flops=31.2e12,
        ),
        _nvidia(
            89,
            "L4",  # NVIDIA L4 data sheet (its 242 TFLOPS are with sparsity)
            threads=1536,
            ctas=24,
            shared=100 << 10,
            shared_per_cta=99 << 10,
            mma_class="HMMA",
            multiprocessors=58,
            clock_hz=2.04e9,
            dram_bytes_per_s=300e9,
            l2_bytes_per_s=None,
            bf16_flops=121e12,
            fp16_flops=121e12,
            fp32_flops=30.3e12,
        ),
        _nvidia(
            90,
            "H100-SXM5-80GB",  # NVIDIA H100 data sheet and Hopper whitepaper
            threads=2048,
            ctas=32,
            shared=228 << 10,
            shared_per_cta=227 << 10,
            mma_class="HGMMA",
            multiprocessors=132,
            clock_hz=1.98e9,
            dram_bytes_per_s=3.35e12,
            l2_bytes_per_s=5.5e12,
            bf16_flops=989.4e12,
            fp16_flops=989.4e12,
            fp32_flops=66.9e12,
        ),
        _nvidia(
            100,
            "B200",  # NVIDIA Blackwell architecture technical brief, HGX B200
            threads=2048,
            ctas=32,
            shared=228 << 10,
            shared_per_cta=227 << 10,
            mma_class="UTCHMMA",
            tensor_columns=512,  # PTX ISA, "Tensor Memory"
            multiprocessors=148,
            clock_hz=None,
            dram_bytes_per_s=8e12,
            l2_bytes_per_s=None,
            bf16_flops=2.25e15,
            fp16_flops=2.25e15,
            fp32_flops=80e12,
        ),
        _nvidia(
            120,
            "RTX 5090",  # NVIDIA RTX Blackwell GPU architecture whitepaper, appendix
            threads=1536,
            ctas=24,
            shared=100 << 10,
            shared_per_cta=99 << 10,
            mma_class="HMMA",
            multiprocessors=170,
            clock_hz=2.407e9,
            dram_bytes_per_s=1.792e12,
            l2_bytes_per_s=None,
            bf16_flops=209.5e12,
            fp16_flops=209.5e12,
            fp32_flops=104.8e12,
        ),
        _amd(
            "gfx90a",
            "MI250X, one of its two dies",  # AMD Instinct MI250X data sheet / 2
            multiprocessors=110,
            clock_hz=1.7e9,
            dram_bytes_per_s=1.638e12,
            l2_bytes_per_s=None,
            bf16_flops=191.5e12,
            fp16_flops=191.5e12,
            fp32_flops=23.95e12,
        ),
        _amd(
            "gfx942",
            "MI300X",  # AMD Instinct MI300X data sheet
            multiprocessors=304,
            clock_hz=2.1e9,
            dram_bytes_per_s=5.3e12,
            l2_bytes_per_s=None,
            bf16_flops=1307.4e12,
            fp16_flops=1307.4e12,
            fp32_flops=163.4e12,
        ),
    )
}


def find_architecture(name: ArchitectureName) -> Architecture:
    """Returns the properties of one architecture.

    Raises:
        ValueError: it is not in the table.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"arch must be one of {list(ARCHITECTURES)}, got {name!r}")
    return ARCHITECTURES[name]
