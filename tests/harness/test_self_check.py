"""Self-check of kernels: a kernel that fails on a device is replaced by its reference there."""

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import broken_kernels as broken
import pytest
import torch
from broken_kernels import (
    CPU,
    MACHINE,
    PretendedHardware,
    correct,
    launch_of,
    launching,
    self_check,
)
from torch import Tensor
from torch.testing import assert_close

from fastbb_kernels import KernelWarning, linear_residual, patch_merging
from fastbb_kernels.case import Case
from fastbb_kernels.cases import small_cases
from fastbb_kernels.comparison import case_problem
from fastbb_kernels.fp32_precision import fp32_products
from fastbb_kernels.op import find_op
from fastbb_kernels.ops.patch_merging import PatchMerging
from fastbb_kernels.self_check import SECTION, SelfCheck, use

OP = "patch_merging"
CASES = [case for case in small_cases() if case.op == OP]
KEY = f"{OP}/torch.float32"


def arguments(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    shapes = (2, 5, 4, 8), (32,), (32,), (16, 32)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def reference() -> Tensor:
    return patch_merging(*arguments(), impl="eager")


def remembered(folder: Path) -> dict[str, Any]:
    path = folder / f"{MACHINE.key}.json"
    return json.loads(path.read_text())["results"][SECTION] if path.exists() else {}


FAULTS = {
    "wrong": (broken.wrong, r"error \S+, allowed"),
    "nan": (broken.nan, "NaN where eager PyTorch has numbers"),
    "flaky": (broken.flaky, "two runs with the same inputs differ"),
    "other_shape": (broken.other_shape, r"shape \(.*\), eager \(.*\)"),
    "other_dtype": (broken.other_dtype, "torch.float16, eager torch.float32"),
    "nothing": (broken.nothing, "wanted a tensor, got NoneType"),
    "crashing": (broken.crashing, "ZeroDivisionError: at line 3"),
    "out_of_resources": (broken.out_of_resources, "OutOfResources: out of resource: shared memory"),
    "out_of_memory": (broken.out_of_memory, "asks for more memory than such a call may take"),
}


@pytest.mark.parametrize("launcher, reason", FAULTS.values(), ids=FAULTS)
def test_a_broken_kernel_is_not_used(launcher: Any, reason: str, tmp_path: Path) -> None:
    check = self_check(tmp_path)
    wanted = (
        rf"kernel of {OP} is off on Pretended GPU for fp32, and eager PyTorch runs instead: "
        rf"{OP}, 2x5x4x8, fp32: .*{reason}"
    )
    with launching(patch_merging=launcher(OP)) as launches, use(check):
        with pytest.warns(KernelWarning, match=wanted) as warned:
            y = patch_merging(*arguments())
        assert torch.equal(y, reference()) and len(warned) == 1
        n_launches = launches[OP].call_count
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(patch_merging(*arguments()), reference())
    assert launches[OP].call_count == n_launches <= 3
    assert list(remembered(tmp_path)) == [KEY]
    assert check.results(CPU) == {(OP, torch.float32): check.known_problem(OP, CPU, torch.float32)}

    # the next process does not try it again, and says why
    with launching(patch_merging=launcher(OP)) as launches, use(self_check(tmp_path)):
        with pytest.warns(KernelWarning, match=r"fastbb check --again") as warned:
            y = patch_merging(*arguments())
        assert torch.equal(y, reference()) and len(warned) == 1
    launches[OP].assert_not_called()


def test_a_right_kernel_is_used(tmp_path: Path) -> None:
    for launches_of_check in (2, 0):  # then it is remembered
        with launching(patch_merging=correct(OP)) as launches, use(self_check(tmp_path)):
            patch_merging(*arguments())
            assert launches[OP].call_count == launches_of_check + 1
            patch_merging(*arguments())
            assert launches[OP].call_count == launches_of_check + 2
    assert remembered(tmp_path) == {KEY: {"problem": None}}


def test_dtypes_are_checked_separately(tmp_path: Path) -> None:
    def launch(x: Tensor, *args: Any) -> Tensor:
        return broken.wrong(OP)(x, *args) if x.dtype == torch.float16 else correct(OP)(x, *args)

    check = self_check(tmp_path)
    with launching(patch_merging=launch) as launches, use(check):
        for dtype in (torch.float32, torch.bfloat16):
            patch_merging(*arguments(dtype))
        with pytest.warns(KernelWarning, match="for fp16"):
            patch_merging(*arguments(torch.float16))
        n_launches = launches[OP].call_count
        patch_merging(*arguments(torch.float16))
        assert launches[OP].call_count == n_launches
    assert [problem is None for problem in check.results(CPU).values()] == [True, False, True]


@pytest.mark.parametrize(
    "launcher", [broken.out_of_memory, broken.driver_out_of_memory], ids=["torch", "driver"]
)
def test_out_of_memory_does_not_count_as_a_failed_check(launcher: Any, tmp_path: Path) -> None:
    hardware = PretendedHardware()
    hardware.full = True
    check = self_check(tmp_path, hardware)
    with launching(patch_merging=launcher(OP)), use(check):
        for _ in range(2):  # the caller gets the error, as from eager PyTorch
            with pytest.raises(RuntimeError, match="out of memory"):
                patch_merging(*arguments())
    assert remembered(tmp_path) == {} and check.results(CPU) == {}
    hardware.full = False
    with launching(patch_merging=correct(OP)), use(check):
        patch_merging(*arguments())
    assert remembered(tmp_path) == {KEY: {"problem": None}}


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("no 80 GiB"), RuntimeError("a synchronizing operation")],
    ids=str,
)
def test_failed_comparison_is_not_remembered(error: Exception, tmp_path: Path) -> None:
    """The comparison may fail by itself: it needs more memory than the launch, and synchronizes."""
    check = self_check(tmp_path)
    with launching(patch_merging=correct(OP)) as launches, use(check):
        with (
            mock.patch("fastbb_kernels.comparison.max_magnitude", side_effect=error),
            pytest.warns(KernelWarning, match=f"is off.*not checked: .*{error}") as warned,
        ):
            for _ in range(2):
                assert torch.equal(patch_merging(*arguments()), reference())
        assert (launches[OP].call_count, len(warned)) == (2, 1)
    assert remembered(tmp_path) == {} and check.results(CPU) == {}


def test_batch_too_large_for_memory_does_not_turn_the_kernel_off(tmp_path: Path) -> None:
    """A few images pass the check, and the caller gets the error that eager PyTorch would raise."""

    def launch(x: Tensor, *args: Any) -> Tensor:
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")
        return correct(OP)(x, *args)

    x, *others = arguments()
    with launching(patch_merging=launch), use(self_check(tmp_path)):
        with pytest.raises(torch.OutOfMemoryError):
            patch_merging(x.repeat(2, 1, 1, 1), *others)
        assert_close(patch_merging(x, *others), reference())
    assert remembered(tmp_path) == {KEY: {"problem": None}}


def test_a_lost_device_is_remembered_by_the_next_process(tmp_path: Path) -> None:
    hardware = PretendedHardware()

    def launch(*args: Any) -> Tensor:
        hardware.lost = True  # every later call fails, whatever it does
        return correct(OP)(*args)

    check = self_check(tmp_path, hardware)
    other = "linear_residual"
    x = torch.ones(2, 8)
    with launching(patch_merging=launch, linear_residual=correct(other)) as launches:
        with use(check):
            with pytest.warns(KernelWarning, match="lost to this process, which.*illegal memory"):
                patch_merging(*arguments())
            assert launches[OP].call_count == 1
            # an op that comes after it is not blamed
            with pytest.raises(RuntimeError, match="illegal memory access"):
                linear_residual(x, x.new_ones(8, 8), None, x)
        launches[other].assert_not_called()
        problem = check.known_problem(OP, CPU, torch.float32)
        assert remembered(tmp_path) == {KEY: {"problem": problem}}
        hardware.lost = False
        following = self_check(tmp_path, hardware)
        with use(following), pytest.warns(KernelWarning, match="remembered in"):
            assert torch.equal(patch_merging(*arguments()), reference())
        assert launches[OP].call_count == 1
        assert following.problem(other, CPU, torch.float32) is None


def test_failed_reference_is_not_remembered_as_a_broken_kernel(tmp_path: Path) -> None:
    absent = RuntimeError("cuBLAS is not there")
    with launching(patch_merging=correct(OP)) as launches:
        with (
            mock.patch.object(Case, "arguments", side_effect=absent),
            pytest.warns(KernelWarning, match="not checked: PyTorch's own ops fail.*cuBLAS"),
        ):
            self_check(tmp_path).check(OP, CPU, torch.float32)
        launches[OP].assert_not_called()
        check = self_check(tmp_path)
        with (
            use(check),
            mock.patch.object(launch_of(OP), "eager", side_effect=absent),
            pytest.warns(KernelWarning, match="not checked: PyTorch's own ops fail.*cuBLAS"),
            pytest.raises(RuntimeError, match="cuBLAS"),
        ):
            patch_merging(*arguments())
        assert check.results(CPU) == {}
    assert remembered(tmp_path) == {}


def test_case_problem_with_impl_triton_runs_a_kernel_that_is_off(tmp_path: Path) -> None:
    """impl="triton" runs the kernel itself, not the reference that replaced it."""
    check = self_check(tmp_path)
    with launching(patch_merging=broken.nan(OP)), use(check):
        with pytest.warns(KernelWarning):
            assert case_problem(CASES[0], torch.float32, CPU) is None
        problem = case_problem(CASES[0], torch.float32, CPU, impl="triton")
        assert problem == "NaN where eager PyTorch has numbers"


@pytest.mark.parametrize("op", ["bottleneck_tail", "conv3x3_bn_act"])
def test_small_cases_run_kernels_that_auto_does_not_choose(op: str, tmp_path: Path) -> None:
    with launching(**{op: broken.wrong(op)}) as launches, pytest.warns(KernelWarning):
        assert self_check(tmp_path).check(op, CPU, torch.bfloat16) is not None
    assert launches[op].called


def test_an_earlier_cuda_error_is_not_blamed_on_an_op(tmp_path: Path) -> None:
    """CUDA reports an earlier error at the next call, whichever op makes it."""
    hardware = PretendedHardware()
    check = self_check(tmp_path, hardware)
    with launching(patch_merging=correct(OP)) as launches, use(check):
        patch_merging(*arguments())
        launches[OP].side_effect = RuntimeError("CUDA error: device-side assert triggered")
        hardware.lost = True
        with pytest.warns(KernelWarning, match="not checked: cpu is lost"):
            assert torch.equal(patch_merging(*arguments()), reference())
    assert remembered(tmp_path) == {KEY: {"problem": None}}


def test_tf32_is_checked_separately_with_the_error_of_eager(tmp_path: Path) -> None:
    """A kernel may lose twice what eager PyTorch loses, which may itself multiply in TF32."""

    def off_by(error: float, y: Tensor) -> Tensor:
        return y + error * y.abs().max() if y.dtype == torch.float32 else y

    exact = PatchMerging.eager

    def problem(eager_error: float, error: float) -> str | None:
        with mock.patch.object(
            PatchMerging, "eager", lambda call: off_by(eager_error, exact(call))
        ):
            return case_problem(
                CASES[0],
                torch.float32,
                CPU,
                run_case=lambda case, arguments, impl: off_by(error, exact(bind(**arguments))),
            )

    bind: Any = find_op(OP).bind
    with launching(patch_merging=correct(OP)):
        assert problem(0, 5e-6) is None and problem(0, 2e-5) is not None
        assert problem(1e-3, 1.9e-3) is None and problem(1e-3, 2.1e-3) is not None

        with fp32_products("tf32"):
            check = self_check(tmp_path)
            assert check.check(OP, CPU, torch.float32) is None
            assert check.results(CPU) == {(OP, torch.float32): None}
    assert list(remembered(tmp_path)) == [f"{KEY}/tf32"] and check.results(CPU) == {}


UNUSABLE = {
    "torn": '{"format": 1, "mach',
    "foreign": json.dumps({"format": 1, "machine": {}, "results": {}}),
    "odd": json.dumps([1, 2]),
}


@pytest.mark.parametrize("written", UNUSABLE.values(), ids=UNUSABLE)
def test_invalid_cache_file_is_ignored_and_replaced(
    written: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / f"{MACHINE.key}.json").write_text(written)
    check = self_check(tmp_path)
    with (
        caplog.at_level("INFO"),
        launching(patch_merging=broken.wrong(OP)),
        use(check),
        pytest.warns(KernelWarning),
    ):
        for _ in range(2):
            assert torch.equal(patch_merging(*arguments()), reference())
    assert [record.message[:7] for record in caplog.records] == ["ignored"]
    assert list(remembered(tmp_path)) == [KEY]


@pytest.mark.parametrize("value", [None, "ok", 1, [], {}, {"problem": 3}], ids=str)
def test_invalid_cached_value_is_checked_again(value: Any, tmp_path: Path) -> None:
    check = self_check(tmp_path)
    check.cache(CPU).put(SECTION, KEY, value)
    assert check.results(CPU) == {}
    with launching(patch_merging=broken.nan(OP)), use(check), pytest.warns(KernelWarning):
        assert torch.equal(patch_merging(*arguments()), reference())


@pytest.mark.parametrize("field", ["driver", "triton", "kernels", "device"])
def test_another_driver_triton_or_device_is_checked_again(field: str, tmp_path: Path) -> None:
    with launching(patch_merging=correct(OP)):
        self_check(tmp_path).check(OP, CPU, torch.float32)
    updated = self_check(tmp_path, machine=replace(MACHINE, **{field: "new"}))
    with launching(patch_merging=broken.wrong(OP)), use(updated), pytest.warns(KernelWarning):
        assert torch.equal(patch_merging(*arguments()), reference())


def test_unwritable_cache_checks_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    check = self_check(tmp_path / "file")
    with (
        caplog.at_level("INFO"),
        launching(patch_merging=broken.wrong(OP)) as launches,
        use(check),
        pytest.warns(KernelWarning) as warned,
    ):
        for _ in range(2):
            assert torch.equal(patch_merging(*arguments()), reference())
        patch_merging(*arguments(torch.bfloat16))
        assert check.problem(OP, CPU, torch.bfloat16) is not None
    assert (launches[OP].call_count, len(warned)) == (4, 2)  # per dtype a call and its check
    assert len(caplog.records) == len({record.message for record in caplog.records}) == 2


def test_explicit_check_runs_the_kernel_again(tmp_path: Path) -> None:
    check = self_check(tmp_path)
    with launching(patch_merging=broken.wrong(OP)), use(check), pytest.warns(KernelWarning):
        patch_merging(*arguments())
        assert check.problem(OP, CPU, torch.float32) is not None
        # runs the kernel, though it is off
        assert check.check(OP, CPU, torch.float32) is not None
    check = self_check(tmp_path)
    with launching(patch_merging=correct(OP)):
        assert check.check(OP, CPU, torch.float32) is None
    assert check.problem(OP, CPU, torch.float32) is None
    assert remembered(tmp_path) == {KEY: {"problem": None}}


def inputs_of_a_check(check: Callable[..., SelfCheck], folder: Path) -> list[Tensor]:
    seen: list[Tensor] = []

    def run(case: Case, arguments: dict[str, Any], impl: Any) -> Tensor:
        assert impl == "triton" and not torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled() and not torch.is_autocast_enabled("cpu")
        seen.append(arguments["x"].clone())
        return correct(OP)(*arguments.values(), 1e-5)

    with launching():
        check(folder, run_case=run).check(OP, CPU, torch.bfloat16)
    return seen


def test_check_is_deterministic_and_keeps_random_state_and_modes(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    first = inputs_of_a_check(self_check, tmp_path / "first")
    assert torch.equal(torch.get_rng_state(), state)
    torch.randn(3)
    with torch.inference_mode(), torch.autocast("cpu"):
        second = inputs_of_a_check(self_check, tmp_path / "second")
        assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
    assert len(first) == len(second) == 2 * len(CASES)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_memory_that_a_kernel_does_not_write_is_found(tmp_path: Path) -> None:
    """The check fills the memory of results with NaN, so that unwritten elements are found."""
    made: list[Tensor] = []
    full_like = torch.full_like

    def recorded(like: Tensor, value: float) -> Tensor:
        made.append(full_like(like, value))
        return made[-1]

    def run(case: Case, arguments: dict[str, Any], impl: Any) -> Tensor:
        return made.pop()  # memory is reused, as by an allocator

    with launching(), mock.patch("torch.full_like", recorded), pytest.warns(KernelWarning):
        problem = self_check(tmp_path, run_case=run).check(OP, CPU, torch.float32)
    assert problem is not None and "NaN where eager PyTorch has numbers" in problem
