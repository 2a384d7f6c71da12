"""Budgets: the file format, and one sentence for each kind of violation."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastbb_kernels.architectures import ARCHITECTURES
from fastbb_kernels.recorder import Launch, Recording, TensorArgument
from fastbb_kernels.testing import budget as budget_module
from fastbb_kernels.testing.binary import BinaryFacts
from fastbb_kernels.testing.budget import (
    Allowance,
    BinaryCost,
    Budget,
    CaseCost,
    read_budget,
    source_hash,
    unenforced,
    violations,
    write_budget,
)

OP = "linear_residual"
CASE = "swin_t-224-b8-stage1-proj-bf16"

COST = BinaryCost(
    registers=128,
    spills=0,
    stack=0,
    shared=49152,
    mma_class="HGMMA",
    occupancy=0.25,
    wide_share=0.8333,
)
FLOORS = {"dram": 10.0, "l2": 40.0, "mma": 5.0, "issue": 20.0}
AMD_COST = replace(COST, mma_class="v_mfma", shared=32768)
CASE_COST = CaseCost(1, 1000, 1500, {90: replace(COST, floors=FLOORS), "gfx942": AMD_COST})

FACTS = BinaryFacts(
    kernel="_gemm_fwd_kernel",
    arch=90,
    num_warps=4,
    registers=100,
    spills=1,
    stack=8,
    shared=4096,
    mma={"HGMMA.64x64x16.F32.BF16": 2},
    mma_class="HGMMA",
    wide_accesses=2,
    medium_accesses=1,
    narrow_accesses=0,
    async_copies=0,
    tma=0,
    ctas_per_sm=2,
    occupancy=0.125,
    occupancy_limit="registers",
)


def budget(case: CaseCost, allowances: tuple[Allowance, ...] = ()) -> Budget:
    return Budget(OP, "abc", {CASE: case}, allowances)


def with_binary(arch: int | str, **changes) -> Budget:
    """The budget with other costs of one architecture."""
    binaries = {**CASE_COST.binaries}
    binaries[arch] = replace(binaries[arch], **changes)
    return budget(replace(CASE_COST, binaries=binaries))


def allow(what: str, arch: int | str, reason: str = "ptxas 13.2 keeps both operands") -> Allowance:
    return Allowance("swin_t-*", arch, what, reason)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_budget(OP, {CASE: CASE_COST}, tmp_path)
    return tmp_path


def test_a_written_budget_is_read_back(folder: Path) -> None:
    committed = read_budget(OP, folder)
    assert committed == Budget(OP, source_hash(OP), {CASE: CASE_COST})
    assert violations(committed, committed) == []


def test_file_has_a_line_per_case_and_architecture_in_fixed_order(tmp_path: Path) -> None:
    archs = ["gfx942", 120, 80, 90]
    names = ["swin_t-224-b64-bf16", "swin_t-224-b8-bf16", "swin_t-1088-b8-bf16"]
    case = CaseCost(1, 1000, None, dict.fromkeys(archs, COST))
    path = write_budget(OP, dict.fromkeys(names, case), tmp_path)
    lines = path.read_text().splitlines()
    assert lines[0] == "{"
    assert lines[1].startswith('  "source": "')
    assert [line.strip()[1:-4] for line in lines if line.endswith('-bf16": {')] == [
        "swin_t-224-b8-bf16",
        "swin_t-224-b64-bf16",
        "swin_t-1088-b8-bf16",
    ]
    first = lines.index('    "swin_t-224-b8-bf16": {')
    assert [line.split(":")[0].strip() for line in lines[first + 1 : first + 7]] == [
        '"launches"',
        '"bytes"',
        '"80"',
        '"90"',
        '"120"',
        '"gfx942"',
    ]
    text = path.read_text()
    write_budget(OP, dict.fromkeys(reversed(names), case), tmp_path)
    assert path.read_text() == text
    assert text.endswith("}\n")


def test_rewriting_keeps_allowances(folder: Path) -> None:
    path = folder / f"{OP}.json"
    content = json.loads(path.read_text())
    content["allowances"] = [vars(allow("spills", 90))]
    path.write_text(json.dumps(content))
    write_budget(OP, {}, folder)
    assert read_budget(OP, folder).allowances == (allow("spills", 90),)
    assert read_budget(OP, folder).cases == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("", "JSONDecodeError", id="empty"),
        pytest.param("{}", "KeyError: 'source'", id="no fields"),
        pytest.param(
            '{"source": "", "allowances": [], "budgets": '
            '{"c": {"launches": 1, "bytes": {"minimal": 1, "requested": 1}, "75": {}}}}',
            "'75' is none of the architectures",
            id="architecture",
        ),
    ],
)
def test_invalid_budget_file_raises_an_error_that_names_it(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / f"{OP}.json").write_text(text)
    with pytest.raises(ValueError, match=rf"{OP}\.json is no budget: .*{message}"):
        read_budget(OP, tmp_path)
    with pytest.raises(FileNotFoundError):
        read_budget("window_attention", tmp_path)


WASTE = {
    "spills": (with_binary(90, spills=3, stack=16), "wanted 0 spills, came 3 and 16 B of stack"),
    "scratch": (with_binary("gfx942", stack=8), "wanted 0 spills, came 0 and 8 B of stack"),
    "stack": (with_binary(90, stack=8), "wanted at most 0 bytes of stack, came 8"),
    "shared memory": (
        with_binary(90, shared=65536),
        "wanted at most 49152 bytes of shared memory, came 65536",
    ),
    "lost MMA": (
        with_binary("gfx942", mma_class="none"),
        "wanted matrix instructions v_mfma, came none",
    ),
    "lesser MMA": (
        with_binary(90, mma_class="HMMA"),
        "wanted matrix instructions HGMMA, came HMMA",
    ),
    "one kernel of two lost its MMA": (
        with_binary(90, mma_class="HGMMA+none"),
        "wanted matrix instructions HGMMA, came HGMMA+none",
    ),
    "occupancy": (with_binary(90, occupancy=0.125), "wanted occupancy >= 0.25, came 0.12"),
    "narrow accesses": (
        with_binary(90, wide_share=0.5),
        "wanted share of 128-bit accesses >= 0.83, came 0.50",
    ),
    "floor": (
        with_binary(90, floors={**FLOORS, "issue": 40.5}),
        "wanted no floor above 40.0 µs (predicted), came 40.5 µs of issue",
    ),
    "bytes": (
        budget(replace(CASE_COST, requested_bytes=1501)),
        "wanted at most 1500 bytes requested, came 1501",
    ),
    "launches": (
        budget(replace(CASE_COST, launches=2)),
        "wanted at most 1 kernel launches, came 2",
    ),
    "unknown case": (Budget(OP, "abc", {"new-bf16": CASE_COST}), "no budget for this case"),
    "unknown architecture": (
        budget(CaseCost(1, 1000, 1500, {80: replace(COST, mma_class="HMMA")})),
        "no budget for this architecture",
    ),
    "changed source": (replace(budget(CASE_COST), source="def"), "its source or Triton changed"),
}


@pytest.mark.parametrize(("measured", "message"), WASTE.values(), ids=WASTE)
def test_each_kind_of_waste_is_reported_as_a_violation(measured: Budget, message: str) -> None:
    found = violations(measured, budget(CASE_COST))
    (sentence,) = [sentence for sentence in found if message in sentence]
    (case,) = measured.cases
    assert sentence.startswith(f"{OP}, {case}" if "source" not in message else OP)
    assert "make budgets" in sentence or "add an allowance" in sentence


def test_a_violation_names_the_architecture() -> None:
    (sentence,) = violations(with_binary(90, occupancy=0.1), budget(CASE_COST))
    assert sentence.startswith(f"{OP}, {CASE}, sm_90: wanted occupancy")
    (sentence,) = violations(with_binary("gfx942", occupancy=0.1), budget(CASE_COST))
    assert sentence.startswith(f"{OP}, {CASE}, gfx942: ")


@pytest.mark.parametrize(
    "measured",
    [
        pytest.param(with_binary(90, registers=200), id="registers alone"),
        pytest.param(with_binary(90, occupancy=0.5, wide_share=1.0, shared=0), id="better"),
        pytest.param(with_binary(90, wide_share=0.8300), id="within the tolerance"),
        pytest.param(with_binary(90, floors={**FLOORS, "dram": 39.0}), id="not the largest floor"),
        pytest.param(with_binary(90, floors={}), id="no floors"),
        pytest.param(budget(replace(CASE_COST, requested_bytes=None)), id="not traced"),
        pytest.param(budget(replace(CASE_COST, requested_bytes=900)), id="fewer bytes"),
        pytest.param(budget(replace(CASE_COST, binaries={90: COST})), id="one architecture"),
        pytest.param(Budget(OP, "abc", {}), id="no case"),
    ],
)
def test_harmless_differences_are_no_violation(measured: Budget) -> None:
    assert violations(measured, budget(CASE_COST)) == []


@pytest.mark.parametrize(
    ("what", "changes"),
    [("spills", {"spills": 4, "stack": 32}), ("mma_class", {"mma_class": "HMMA"})],
    ids=["spills", "mma_class"],
)
def test_an_allowance_needs_a_reason_and_holds_for_one_value(
    what: str, changes: dict[str, int | str]
) -> None:
    measured = with_binary(90, **changes)

    def found(*allowances: Allowance) -> list[str]:
        return violations(measured, replace(measured, allowances=allowances))

    assert found(allow(what, 90)) == []
    (sentence,) = found()
    assert "add an allowance with its reason" in sentence
    assert found(allow(what, 100)) == [sentence], "another architecture"
    assert found(replace(allow(what, 90), case="swin_b-*")) == [sentence], "another case"
    without_reason = found(allow(what, 90, reason=" "))
    assert len(without_reason) == 2
    assert f"the allowance of {what} for swin_t-* on sm_90 gives no reason" in without_reason[0]


def test_allowed_spills_may_not_grow() -> None:
    committed = replace(with_binary(90, spills=4), allowances=(allow("spills", 90),))
    assert violations(with_binary(90, spills=4), committed) == []
    (sentence,) = violations(with_binary(90, spills=5), committed)
    assert "wanted at most 4 spills, came 5" in sentence


BY_COMPILER = (
    *("stack", "shared memory", "occupancy", "narrow accesses", "floor", "changed source"),
)


@pytest.mark.parametrize(("waste", "measured", "message"), [(k, *v) for k, v in WASTE.items()])
def test_limits_of_another_triton_are_reported_and_not_enforced(
    waste: str, measured: Budget, message: str
) -> None:
    committed = replace(budget(CASE_COST), triton="0.0")
    enforced, said = violations(measured, committed), unenforced(measured, committed)
    if waste in BY_COMPILER or waste.startswith("unknown"):
        assert enforced == []
        assert [message in sentence for sentence in said] == [True] * (waste != "changed source")
    else:
        assert [message in sentence for sentence in enforced] == [True]
    assert "make budgets" not in "".join(said)
    assert unenforced(measured, budget(CASE_COST)) == [], "the same Triton"


def test_costs_of_several_kernels_are_those_of_the_worst() -> None:
    norm = replace(
        FACTS,
        registers=32,
        spills=2,
        stack=0,
        shared=0,
        mma={},
        mma_class=None,
        wide_accesses=8,
        occupancy=1.0,
    )
    assert BinaryCost.of([norm, FACTS]) == BinaryCost(
        registers=100,
        spills=3,
        stack=8,
        shared=4096,
        mma_class="HGMMA+none",
        occupancy=0.125,
        wide_share=0.6667,
    )


def package(folder: Path) -> dict[str, Path]:
    """A package of two ops, one of which shares a module through another one."""
    files = {
        "ops/gemm.py": "",
        "ops/norm.py": "",
        "triton_kernels/gemm.py": "from .tiles import tile\nfrom ..norm import norm\n",
        "triton_kernels/tiles.py": "from . import rows, columns\n",
        "triton_kernels/rows.py": "",
        "triton_kernels/norm.py": "import triton\n",
        "_dispatch.py": "",
    }
    paths = {name: folder / name for name in files}
    for name, path in paths.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(files[name])
    return paths


@pytest.mark.parametrize(
    ("changed", "ops"),
    [
        ("ops/gemm.py", {"gemm"}),
        ("triton_kernels/gemm.py", {"gemm"}),
        ("triton_kernels/tiles.py", {"gemm"}),
        ("triton_kernels/rows.py", {"gemm"}),
        ("triton_kernels/norm.py", {"norm"}),
        ("_dispatch.py", set()),
    ],
)
def test_the_source_hash_follows_the_files_of_its_op(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str, ops: set[str]
) -> None:
    monkeypatch.setattr(budget_module, "_PACKAGE", tmp_path)
    paths = package(tmp_path)
    before = {op: source_hash(op) for op in ("gemm", "norm")}
    paths[changed].write_text(paths[changed].read_text() + "# changed\n")
    assert {op for op in before if source_hash(op) != before[op]} == ops


def test_the_source_hash_follows_the_configurations_of_its_op(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A configuration measured for one op leaves the budgets of other ops valid."""
    monkeypatch.setattr(budget_module, "_PACKAGE", tmp_path)
    paths = package(tmp_path)
    for op in ("gemm", "norm"):
        path = paths[f"triton_kernels/{op}.py"]
        path.write_text(path.read_text() + f'config = chosen_config(\n    "{op}", launch_config)\n')
    configs = tmp_path / "configs"
    configs.mkdir()
    before = {op: source_hash(op) for op in ("gemm", "norm")}
    for gpu in ("nvidia-h100", "nvidia-h200"):
        entries = [{"sizes": {"n_rows": 8}, "config": [64]}]
        (configs / f"{gpu}.json").write_text(json.dumps({"configs": {"gemm": entries}}))
        after = {op: source_hash(op) for op in ("gemm", "norm")}
        assert after["gemm"] != before["gemm"] and after["norm"] == before["norm"]
        before = after


def test_the_source_hash_follows_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    before = source_hash(OP)
    monkeypatch.setattr("triton.__version__", "0.0")
    assert source_hash(OP) != before


def test_a_case_is_measured_from_its_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(binary: str, n_elements: int) -> Launch:
        tensor = TensorArgument((n_elements,), (1,), torch.bfloat16, 0, 0)
        kernel: Any = SimpleNamespace(hash=binary)
        return Launch("_k", (1, 1, 1), {}, {}, {"x_ptr": tensor}, "", 4, 3, kernel)

    read = []
    monkeypatch.setattr(budget_module, "binary_facts", lambda k: read.append(k.hash) or FACTS)
    recordings: dict[int | str, Recording] = {
        80: Recording(ARCHITECTURES[80], [launch("a", 10), launch("b", 20), launch("a", 30)]),
        90: Recording(ARCHITECTURES[90], [launch("c", 70)]),
    }
    case = CaseCost.of(recordings, requested_bytes=500)
    assert (case.launches, case.minimal_bytes, case.requested_bytes) == (3, 140, 500)
    assert read == ["a", "b", "c"], "each binary once"
    assert case.binaries == {80: BinaryCost.of([FACTS, FACTS]), 90: BinaryCost.of([FACTS])}
