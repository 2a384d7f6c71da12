"""Instructions that a program issues: of a listing by hand, and of compiled kernels."""
# Triton types constants as `tl.constexpr`, and launches take options; callers pass numbers
# pyright: reportArgumentType=false, reportCallIssue=false

from types import SimpleNamespace
from typing import Any

import pytest
from compiled_kernels import Arch, compiled, copy_fwd_kernel, gemm_fwd_kernel, meta

from fastbb_kernels.testing import issue
from fastbb_kernels.testing.issue import Issued, Work, issued

# two nested loops; the inner one multiplies, the outer one stores
LISTING = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0018*/                   LDGDEPBAR ;
.L_x_0:
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0030*/              @P0  BRA `(.L_x_0) ;
        /*0040*/                   MUFU.EX2 R3, R3 ;
        /*0050*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0060*/             @!P1  BRA `(.L_x_1) ;
        /*0070*/                   EXIT ;
.L_x_2:
        /*0080*/                   BRA `(.L_x_2) ;
        /*0090*/                   NOP ;
"""
WARPS = 2


def issued_by(listing: str, work: Work, monkeypatch: pytest.MonkeyPatch) -> Issued | None:
    monkeypatch.setattr(issue, "disassembly", lambda kernel: listing)
    target = SimpleNamespace(backend="cuda")
    kernel: Any = SimpleNamespace(metadata=SimpleNamespace(target=target, num_warps=WARPS))
    return issued(kernel, work)


def test_what_a_program_does_says_how_often_loops_run(monkeypatch: pytest.MonkeyPatch) -> None:
    inner, outer = 12, 3
    work = Work(WARPS * inner * 4096, WARPS * outer * 32 * 16, WARPS * outer * 32 * 16)
    found = issued_by(LISTING, work, monkeypatch)
    assert found == Issued(instructions=2 * inner + 5 * outer + 3, special=outer)
    assert found and found.cycles == 42


def test_special_functions_may_take_longer_than_the_issue(monkeypatch: pytest.MonkeyPatch) -> None:
    listing = LISTING.replace("MUFU.EX2 R3, R3 ;", "MUFU.EX2 R3, R3 ;\n /*0048*/ MUFU.RCP R3, R3 ;")
    found = issued_by(listing, Work(0, WARPS * 100 * 32 * 16, 0), monkeypatch)
    assert found == Issued(instructions=6 * 100 + 3, special=200)
    assert found and found.cycles == 1600


def test_a_loop_that_only_loads_runs_as_often_as_its_bytes_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listing = LISTING.replace("STG.E.128", "IADD3").replace("HMMA.16816.F32.BF16", "FADD")
    found = issued_by(listing, Work(0, 0, WARPS * 7 * 32 * 16), monkeypatch)
    assert found == Issued(instructions=5 * 7 + 2 + 3, special=7)  # the inner loop counts once


@pytest.mark.parametrize("arch", [80, 90])
def test_each_step_of_a_gemm_issues_the_same(arch: int) -> None:
    m, n, k = 128, 64, 32

    def instructions(features: int) -> float:
        x, weight, y = meta(m, features), meta(n, features), meta(m, n)
        kernel = compiled(
            arch,
            lambda: gemm_fwd_kernel[(1,)](x, weight, y, features, "ieee", m, n, k, num_warps=4),
        )
        work = Work(2 * m * n * features, 2 * m * n, 2 * (m + n) * features)
        found = issued(kernel, work)
        assert found is not None and found.special == 0
        return found.instructions

    step = (instructions(512) - instructions(256)) / (256 / k)
    matrix = {80: (m // 16) * (n // 8) * (k // 16) // 4, 90: k // 16}[arch]
    assert step == round(step) and step > 2 * matrix
    assert instructions(256) > 256 / k * step


def test_code_without_loops_counts_once() -> None:
    kernel = compiled(90, lambda: copy_fwd_kernel[(1,)](meta(1024), meta(1024), 1, 1024))
    found = issued(kernel, Work(0, 2048, 2048))
    assert found is not None
    code = issue._Code.read(issue.disassembly(kernel))
    assert found.instructions == len(code.instructions) > 5


@pytest.mark.parametrize("arch", [100, "gfx942"])
def test_what_cannot_be_counted_is_said(arch: Arch) -> None:
    x, weight, y = meta(128, 256), meta(64, 256), meta(128, 64)
    kernel = compiled(
        arch, lambda: gemm_fwd_kernel[(1,)](x, weight, y, 256, "ieee", 128, 64, 32, num_warps=4)
    )
    assert issued(kernel, Work(1, 1, 1)) is None
