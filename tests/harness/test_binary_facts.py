"""`binary_facts`: small kernels whose resources and instructions are known."""
# Triton types constants as `tl.constexpr`, and callers pass numbers
# pyright: reportArgumentType=false

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from compiled_kernels import Arch, compiled, copy_fwd_kernel, gemm_fwd_kernel, meta
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from fastbb_kernels.architectures import ARCHITECTURES
from fastbb_kernels.testing import binary
from fastbb_kernels.testing.binary import BinaryFacts, binary_facts, ctas_per_sm


@triton.jit
def _copy_descriptor_fwd_kernel(x, y, BLOCK: tl.constexpr):
    y.store([0, 0], x.load([0, 0]))


def gemm_facts(
    arch: Arch,
    dtype: torch.dtype = torch.bfloat16,
    block_m: int = 128,
    block_n: int = 64,
    **options: int,
) -> BinaryFacts:
    def launch() -> None:
        x, weight = meta(block_m, 256, dtype=dtype), meta(block_n, 256, dtype=dtype)
        y = meta(block_m, block_n, dtype=dtype)
        gemm_fwd_kernel[(1,)](
            x, weight, y, 256, "ieee", block_m, block_n, 32, **{"num_warps": 4, **options}
        )

    return binary_facts(compiled(arch, launch))


def copy_facts(arch: Arch, stride: int, block: int = 1024) -> BinaryFacts:
    def launch() -> None:
        x = meta(block * stride, dtype=torch.float32)
        copy_fwd_kernel[(1,)](x, meta(block, dtype=torch.float32), stride, block)

    return binary_facts(compiled(arch, launch))


def test_tritons_wheel_contains_the_disassemblers() -> None:
    for tool in (knobs.nvidia.cuobjdump, knobs.nvidia.nvdisasm):
        assert Path(tool.path).is_file()


@pytest.mark.parametrize("arch", ARCHITECTURES, ids=str)
def test_bf16_gemm_uses_matrix_instructions_and_does_not_spill(arch: Arch) -> None:
    facts = gemm_facts(arch)
    assert (facts.kernel, facts.arch, facts.num_warps) == ("gemm_fwd_kernel", arch, 4)
    assert facts.mma_class == ARCHITECTURES[arch].mma_class
    assert all(name.startswith(facts.mma_class) for name in facts.mma)
    # in the loop: 128 x 64 x 32 by all warps; HMMA multiplies 16 x 8 x 16, v_mfma 32 x 32 x 8
    per_loop = {"HMMA": 64 // 4 * 2, "HGMMA": 2, "UTCHMMA": 2, "v_mfma": 8 // 4 * 4}
    assert sum(facts.mma.values()) % per_loop[facts.mma_class] == 0
    assert (facts.spills, facts.stack) == (0, 0)
    assert 0 < facts.registers < 256
    assert 0 < facts.shared <= ARCHITECTURES[arch].shared_per_cta
    assert 0 < facts.occupancy <= 1
    assert (facts.wide_share > 0.5, facts.narrow_accesses) == (True, 0)
    if isinstance(arch, int):
        assert 0 < facts.async_copies < facts.wide_accesses, "the pipeline's copies, and stores"


def test_fp32_without_tf32_has_no_matrix_instruction() -> None:
    facts = gemm_facts(90, torch.float32, 32, 32)
    assert facts.mma == {}
    assert facts.mma_class is None


@pytest.mark.parametrize("arch", [100, "gfx942"], ids=str)
def test_dense_accesses_count_as_wide_and_strided_ones_as_narrow(arch: Arch) -> None:
    n_threads = 4 * ARCHITECTURES[arch].warp_size
    dense, strided = copy_facts(arch, 1), copy_facts(arch, 3)
    per_thread = 1024 // n_threads
    # loads and stores of 4 x fp32
    assert (dense.wide_accesses, dense.narrow_accesses) == (2 * per_thread // 4, 0)
    assert dense.wide_share == 1.0
    assert strided.narrow_accesses >= per_thread, "each element is loaded alone"
    assert strided.wide_share < 0.5
    in_pairs = copy_facts(arch, 1, 2 * n_threads)
    assert (in_pairs.wide_accesses, in_pairs.medium_accesses) == (0, 2)
    assert (dense.async_copies, dense.tma, dense.mma_class) == (0, 0, None)


def test_bulk_copies_count_as_wide() -> None:
    def launch() -> None:
        x, y = (TensorDescriptor.from_tensor(meta(64, 64), [64, 64]) for _ in range(2))
        _copy_descriptor_fwd_kernel[(1,)](x, y, 64)

    facts = binary_facts(compiled(90, launch))
    assert facts.tma == 2
    assert (facts.wide_accesses, facts.narrow_accesses, facts.wide_share) == (0, 0, 1.0)


@pytest.mark.parametrize(
    ("arch", "options"),
    # far too large: how few registers suffice is for each compiler to find out
    [(80, {"maxnreg": 32}), ("gfx90a", {"block_n": 128, "waves_per_eu": 8})],
    ids=["80", "gfx90a"],
)
def test_a_tile_that_is_too_large_for_its_registers_spills(
    arch: Arch, options: dict[str, int]
) -> None:
    facts = gemm_facts(arch, **options)
    assert facts.spills > 0
    assert facts.stack > 0
    assert facts.narrow_accesses == 0, "spills are not accesses of global memory"
    assert facts.mma_class == ARCHITECTURES[arch].mma_class


def test_occupancy_is_bounded_by_tensor_memory_on_blackwell(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blackwell = ARCHITECTURES[100]
    assert ctas_per_sm(32, 0, 4, blackwell, tensor_columns=128) == (4, "tensor memory")
    monkeypatch.setattr(binary, "_known", {})
    monkeypatch.setitem(ARCHITECTURES, 100, replace(blackwell, tensor_columns=64))
    facts = gemm_facts(100)  # 128 x 64 accumulators: 64 columns
    assert (facts.ctas_per_sm, facts.occupancy_limit) == (1, "tensor memory")


def test_binary_facts_are_read_once_and_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = copy_facts(80, 1)
    run_tool = binary._tool

    def only_resources(name: str, *options: str, cubin: bytes) -> str:
        assert name == "cuobjdump", "disassembled again"
        return run_tool(name, *options, cubin=cubin)

    monkeypatch.setattr(binary, "_tool", only_resources)
    assert copy_facts(80, 1) is facts
    monkeypatch.setattr(binary, "_known", {})  # as in another process
    assert copy_facts(80, 1) == facts


def test_the_occupancy_is_that_of_the_architecture_asked_for() -> None:
    kernel = compiled(80, lambda: copy_fwd_kernel[(1,)](meta(1024), meta(1024), 1, 1024))
    assert binary_facts(kernel).occupancy == 1.0
    with pytest.raises(ValueError, match="arch must be one of"):
        binary_facts(kernel, 75)
    on_86 = binary_facts(kernel, 86)
    assert (on_86.arch, on_86.ctas_per_sm, on_86.occupancy_limit) == (86, 12, "threads")


def test_peak_flops_agree_with_clock_rates() -> None:
    for gpu in ARCHITECTURES.values():
        if gpu.clock_hz is not None:
            lanes = 64 if gpu.name in (80, "gfx90a") else 128
            flops = 2 * lanes * gpu.multiprocessors * gpu.clock_hz
            assert gpu.fp32_flops == pytest.approx(flops, rel=0.01), gpu.gpu


# expected values from NVIDIA's occupancy calculator and AMD's ISA guide
@pytest.mark.parametrize(
    ("arch", "registers", "shared", "num_warps", "expected"),
    [
        pytest.param(80, 32, 0, 8, (8, "registers"), id="full"),
        pytest.param(80, 33, 0, 8, (6, "registers"), id="registers come in eights"),
        pytest.param(80, 104, 0, 1, (16, "registers"), id="each scheduler has its own registers"),
        pytest.param(80, 255, 0, 8, (1, "registers"), id="all registers"),
        pytest.param(80, 16, 0, 1, (32, "ctas"), id="small CTAs"),
        pytest.param(86, 16, 0, 1, (16, "ctas"), id="fewer CTAs on sm_86"),
        pytest.param(89, 16, 0, 16, (3, "threads"), id="1536 threads"),
        pytest.param(90, 64, 48 << 10, 4, (4, "shared memory"), id="shared memory"),
        pytest.param(90, 64, 113 << 10, 4, (2, "shared memory"), id="half and the reserved KiB"),
        pytest.param(90, 64, (113 << 10) + 1, 4, (1, "shared memory"), id="one byte more"),
        pytest.param("gfx942", 128, 0, 4, (4, "registers"), id="4 waves per SIMD"),
        pytest.param("gfx942", 512, 32 << 10, 4, (1, "registers"), id="1 wave per SIMD"),
        pytest.param("gfx942", 64, 32 << 10, 4, (2, "shared memory"), id="LDS"),
    ],
)
def test_occupancy_is_bounded_by_the_scarcest_resource(
    arch: Arch, registers: int, shared: int, num_warps: int, expected: tuple[int, str]
) -> None:
    assert ctas_per_sm(registers, shared, num_warps, ARCHITECTURES[arch]) == expected
