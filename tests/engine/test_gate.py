"""Self-check at dispatch: "auto" asks it before a kernel runs on a GPU, and only there."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import broken_kernels as broken
import pytest
import torch
from broken_kernels import CPU, PretendedHardware, correct, launching, self_check
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close

from fastbb_kernels import KernelWarning, _dispatch, layer_norm_nchw, mlp_block, use_impl
from fastbb_kernels.cases import small_cases
from fastbb_kernels.op import find_op, op_names
from fastbb_kernels.self_check import SelfCheck, current, use
from fastbb_kernels.testing import interpret

NORM, BLOCK = "layer_norm_nchw", "mlp_block"
PARTS = ("layer_norm_linear", "linear_residual")


def norm_arguments() -> tuple[Tensor, ...]:
    return tuple(torch.randn(shape) for shape in ((1, 3, 4, 8), (8,), (8,)))


def block_arguments() -> tuple[Tensor, ...]:
    shapes = ((6, 32), (32,), (32,), (64, 32), (64,), (32, 64), (32,))
    return tuple(torch.randn(shape) for shape in shapes)


def right(*ops: str) -> dict[str, Callable[..., Any]]:
    return {op: correct(op) for op in ops}


class Unasked(SelfCheck):
    """A check that fails the test when it is asked."""

    def problem(self, op: str, device: torch.device, dtype: torch.dtype) -> str | None:
        raise AssertionError(f"asked about {op}")

    def known_problem(self, op: str, device: torch.device, dtype: torch.dtype) -> str | None:
        return self.problem(op, device, dtype)


@pytest.mark.parametrize("op", op_names())
def test_every_op_asks_the_check_with_its_name_device_and_dtype(op: str) -> None:
    """Runs the cases of an op through its public function, which asks the check."""
    asked = []

    class Asked(SelfCheck):
        def problem(self, op: str, device: torch.device, dtype: torch.dtype) -> str | None:
            asked.append((op, device, dtype))
            return "is off"

    kernels = {name: correct(name) for name in op_names()}
    for case in small_cases():
        if case.op == op:
            asked.clear()
            arguments = case.arguments("cpu", torch.bfloat16)
            with launching(**kernels) as launches, use(Asked()):
                y = find_op(op).call(**arguments, impl="auto")
                assert torch.equal(y, find_op(op).eager(**arguments))
            # the tail's own kernel waits for a measurement: "auto" runs its parts
            first = "conv3x3_bn_act" if op == "bottleneck_tail" else op
            assert asked[0] == (first, CPU, torch.bfloat16)
            assert not any(launch.called for launch in launches.values())


def test_the_check_is_not_asked_on_a_cpu_or_a_pretended_device() -> None:
    arguments = norm_arguments()
    with torch.no_grad(), use(Unasked()):
        layer_norm_nchw(*arguments)
        layer_norm_nchw(*arguments, impl="eager")
        with pytest.raises(NotImplementedError, match="needs a CUDA or ROCm device"):
            layer_norm_nchw(*arguments, impl="triton")
    with launching(layer_norm_nchw=correct(NORM)) as launches:
        layer_norm_nchw(*arguments)
        assert current() is None and launches[NORM].call_count == 1


def test_only_a_machine_with_a_gpu_has_a_self_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "_own_check", None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert current() is None
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    check = current()
    assert isinstance(check, SelfCheck) and current() is check
    other = SelfCheck()
    with use(other):
        assert current() is other
    assert current() is check


def test_a_broken_part_does_not_turn_its_block_off(tmp_path: Path) -> None:
    """A block without a kernel runs its parts, each with its own check."""
    check = self_check(tmp_path)
    launches = {PARTS[0]: broken.wrong(PARTS[0]), PARTS[1]: correct(PARTS[1])}
    without_kernel = mock.patch("fastbb_kernels.op.use_block", lambda *args: False)
    arguments = block_arguments()
    with launching(**launches), use(check), without_kernel:
        with pytest.warns(KernelWarning, match=f"{PARTS[0]} is off") as warned:
            y = mlp_block(*arguments)
        assert_close(y, find_op(BLOCK).eager(*arguments))
        assert check.problem(BLOCK, CPU, torch.float32) is None
    assert len(warned) == 1
    off = {op for (op, _), problem in check.results(CPU).items() if problem}
    assert off == {PARTS[0]} and len(check.results(CPU)) == 2


def test_the_parts_of_a_broken_block_run_by_their_kernels(tmp_path: Path) -> None:
    launches = {BLOCK: broken.crashing(BLOCK), **right(*PARTS)}
    arguments = block_arguments()
    with launching(**launches) as launched, use(self_check(tmp_path)):
        with pytest.warns(KernelWarning, match=f"{BLOCK} is off.*the ops that it is made of run"):
            y = mlp_block(*arguments)
        assert_close(y, find_op(BLOCK).eager(*arguments))
        calls = [launched[part].call_count for part in PARTS]
        assert calls == [0, 0]  # the first call had begun with the block
        y = mlp_block(*arguments)
        assert_close(y, find_op(BLOCK).eager(*arguments))
        calls = [launched[part].call_count for part in PARTS]
        assert calls == [3, 3]  # of which two are the check
        # "triton" for all ops: the block has no working kernel, its parts have
        with use_impl("triton"):
            mlp_block(*arguments)
        assert [launched[part].call_count for part in PARTS] == [n + 1 for n in calls]
        with (
            use_impl("triton", ops=[BLOCK]),
            pytest.raises(NotImplementedError, match=f"{BLOCK}.*cannot run.*ZeroDivisionError"),
        ):
            mlp_block(*arguments)


def test_impl_triton_runs_the_kernel_unless_it_is_known_to_fail(tmp_path: Path) -> None:
    arguments = norm_arguments()
    with launching(layer_norm_nchw=broken.wrong(NORM)) as launches, use(self_check(tmp_path)):
        with pytest.warns(KernelWarning):
            y = layer_norm_nchw(*arguments, impl="triton")
        assert torch.equal(y, layer_norm_nchw(*arguments, impl="eager"))
        refusal = rf"layer_norm_nchw: impl='triton' cannot run this call: {NORM}, .*: error "
        with pytest.raises(NotImplementedError, match=refusal):
            layer_norm_nchw(*arguments, impl="triton")
    # found by another process
    with launching(layer_norm_nchw=broken.wrong(NORM)) as launches, use(self_check(tmp_path)):
        with pytest.raises(NotImplementedError, match=refusal):
            layer_norm_nchw(*arguments, impl="triton")
        launches[NORM].assert_not_called()


def test_out_of_memory_does_not_turn_a_kernel_off(tmp_path: Path) -> None:
    hardware = PretendedHardware()
    hardware.full = True
    arguments = norm_arguments()
    with (
        launching(layer_norm_nchw=broken.out_of_memory(NORM)),
        use(self_check(tmp_path, hardware)),
        pytest.raises(torch.OutOfMemoryError),
    ):
        layer_norm_nchw(*arguments)
    with launching(layer_norm_nchw=correct(NORM)), use(self_check(tmp_path, hardware)):
        layer_norm_nchw(*arguments, impl="triton")


def test_nothing_is_checked_while_a_graph_is_captured(tmp_path: Path) -> None:
    hardware = PretendedHardware()
    check = self_check(tmp_path, hardware)
    arguments = norm_arguments()
    with launching(layer_norm_nchw=correct(NORM)) as launches, use(check):
        hardware.capturing = True
        for _ in range(2):
            layer_norm_nchw(*arguments)
        launches[NORM].assert_not_called()
        hardware.capturing = False
        layer_norm_nchw(*arguments)
        assert launches[NORM].call_count == 2 + 1
        hardware.capturing = True
        layer_norm_nchw(*arguments)
        assert launches[NORM].call_count == 2 + 2
    # a result of another process needs no check
    with launching(layer_norm_nchw=correct(NORM)) as launches:
        with use(self_check(tmp_path, hardware)):
            layer_norm_nchw(*arguments)
        assert launches[NORM].call_count == 1


def test_threads_share_one_check(tmp_path: Path) -> None:
    def slow(*args: Any) -> Tensor:
        time.sleep(0.001)
        return broken.wrong(NORM)(*args)

    start = threading.Barrier(4)
    arguments = norm_arguments()
    found: list[Tensor] = []

    def ask() -> None:
        start.wait()
        with torch.no_grad():
            found.append(layer_norm_nchw(*arguments))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    with (
        launching(layer_norm_nchw=slow) as launches,
        use(self_check(tmp_path)),
        pytest.warns(KernelWarning) as warned,
    ):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # every thread had launched once, and one of them checked
        assert launches[NORM].call_count <= 4 + 1 and len(warned) == 1
        expected = layer_norm_nchw(*arguments, impl="eager")
    assert len(found) == 4 and all(torch.equal(y, expected) for y in found)


@pytest.fixture
def without_what_was_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def find_out(folder: Path) -> None:
    """Another process finds that a kernel is wrong, and remembers it."""
    with launching(layer_norm_nchw=broken.wrong(NORM)), pytest.warns(KernelWarning):
        self_check(folder).check(NORM, CPU, torch.float32)


class Norm(nn.Module):
    def forward(self, *tensors: Tensor) -> Tensor:
        return layer_norm_nchw(*tensors)


@pytest.mark.parametrize("is_right", [True, False], ids=["right", "wrong"])
@pytest.mark.usefixtures("without_what_was_compiled_before")
def test_the_check_is_asked_while_a_compiler_traces(is_right: bool, tmp_path: Path) -> None:
    """The function compiles to one graph, in which the answer is a constant."""
    arguments = norm_arguments()
    if not is_right:
        find_out(tmp_path)
    targets: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    with (
        launching(),
        use(self_check(tmp_path)),
        # as on a GPU, where the dispatcher of torch launches
        mock.patch("fastbb_kernels.op.launches_directly", lambda: False),
    ):
        compiled = torch.compile(Norm(), fullgraph=True, backend=backend)
        with nullcontext() if is_right else pytest.warns(KernelWarning, match="is off"):
            y = compiled(*arguments)
    assert torch.equal(y, layer_norm_nchw(*arguments, impl="eager"))
    assert any("fastbb" in target for target in targets) == is_right


@pytest.mark.parametrize("is_known", [True, False], ids=["known", "unknown"])
def test_fake_tensors_start_no_check(is_known: bool, tmp_path: Path) -> None:
    if is_known:
        find_out(tmp_path)
    with (
        torch.no_grad(),
        FakeTensorMode(),
        use(self_check(tmp_path)),
        launching(layer_norm_nchw=correct(NORM)) as launches,
    ):
        arguments = tuple(torch.empty(shape) for shape in ((1, 3, 4, 8), (8,), (8,)))
        with pytest.warns(KernelWarning, match="is off") if is_known else nullcontext():
            layer_norm_nchw(*arguments)
    assert launches[NORM].call_count == (not is_known)


def test_a_real_kernel_passes_in_the_interpreter(tmp_path: Path) -> None:
    check = self_check(tmp_path)
    with interpret(), use(check):
        assert check.check("patch_merging", CPU, torch.float16) is None
    assert check.results(CPU) == {("patch_merging", torch.float16): None}
