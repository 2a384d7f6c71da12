"""Check of each compiled kernel, by its configuration, before its first launch counts."""

import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

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

from fastbb_kernels import KernelWarning, linear_residual
from fastbb_kernels.cases import small_cases
from fastbb_kernels.launching import FEW_IMAGES, chosen_config, note_binary
from fastbb_kernels.op import find_op, op_names
from fastbb_kernels.self_check import BINARIES, use
from fastbb_kernels.testing import interpret

OP = "linear_residual"
MANY, FEW = 3000, 5


class Tiles(NamedTuple):
    name: str


def tiles(n_rows: int, arch: Any) -> Tiles:
    return Tiles("large" if n_rows == MANY else "small")


def arguments(n_rows: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(n_rows)
    x, weight, residual = (
        torch.randn(shape, generator=generator) for shape in ((n_rows, 8), (16, 8), (n_rows, 16))
    )
    return x, weight, torch.ones(16), residual


def expected(n_rows: int) -> Tensor:
    return linear_residual(*arguments(n_rows), impl="eager")


class Launcher:
    """A kernel with two tilings, each a binary.

    Attributes:
        wrong: name of the tiling that is miscompiled.
        seen: tiling and rows of each launch.
    """

    def __init__(self, wrong: str = "") -> None:
        self.wrong = wrong
        self.seen: list[tuple[str, int]] = []

    def __call__(self, x: Tensor, *args: Any) -> Tensor:
        tiling = chosen_config("tiles", tiles, x.device, len(x)).name
        note_binary(f"digest of {tiling}")
        self.seen.append((tiling, len(x)))
        y = correct(OP)(x, *args)
        if tiling == self.wrong:
            y[-1, -1] += y.abs().max()
        return y


def test_each_launch_config_is_checked_at_its_first_launch(tmp_path: Path) -> None:
    launcher = Launcher(wrong="large")
    with launching(linear_residual=launcher), use(self_check(tmp_path)):
        for _ in range(2):
            assert_close(linear_residual(*arguments(FEW)), expected(FEW))
        assert launcher.seen == [("small", FEW)] * 4  # a call, its check of two runs, a call
        launcher.seen.clear()
        with pytest.warns(KernelWarning, match=r"is off.*Tiles\(name='large'\): error "):
            y = linear_residual(*arguments(MANY))
        assert torch.equal(y, expected(MANY))
        # few rows, by the configuration of many; the first run is wrong
        (first, n_first), (again, n_again) = launcher.seen
        assert first == again == "large" and n_first == MANY and FEW < n_again < MANY
        # the op is off, whatever it is launched with
        assert torch.equal(linear_residual(*arguments(FEW)), expected(FEW))
        assert len(launcher.seen) == 2


def test_another_process_checks_only_new_launch_configs(tmp_path: Path) -> None:
    with launching(linear_residual=Launcher()), use(self_check(tmp_path)):
        linear_residual(*arguments(FEW))
    launcher = Launcher()
    with launching(linear_residual=launcher), use(self_check(tmp_path)):
        linear_residual(*arguments(FEW))
        assert launcher.seen == [("small", FEW)]
        for _ in range(2):
            linear_residual(*arguments(MANY))
    assert [tiling for tiling, _ in launcher.seen] == ["small"] + ["large"] * 4
    results = json.loads((tmp_path / f"{MACHINE.key}.json").read_text())["results"]
    assert results[BINARIES] == {
        f"{OP}/torch.float32/digest of {name}": True for name in ("large", "small")
    }


@pytest.mark.parametrize("value", [None, 1, "true", {}], ids=str)
def test_binary_with_an_invalid_record_is_checked_again(value: Any, tmp_path: Path) -> None:
    check = self_check(tmp_path)
    check.cache(CPU).put(BINARIES, f"{OP}/torch.float32/digest of small", value)
    launcher = Launcher(wrong="small")
    with launching(linear_residual=launcher), use(check), pytest.warns(KernelWarning):
        assert torch.equal(linear_residual(*arguments(FEW)), expected(FEW))


def test_binary_that_depends_on_the_rows_is_checked_with_all_rows(tmp_path: Path) -> None:
    """The binary depends on the number of rows, not on a launch configuration."""

    def launch(x: Tensor, *args: Any) -> Tensor:
        note_binary(f"{len(x) == MANY}")
        return (broken.wrong if len(x) == MANY else correct)(OP)(x, *args)

    with (
        launching(linear_residual=launch),
        use(self_check(tmp_path)),
        pytest.warns(KernelWarning, match=f"{MANY}x8, fp32: error"),
    ):
        assert torch.equal(linear_residual(*arguments(MANY)), expected(MANY))


def test_a_binary_that_no_check_launches_is_not_used(tmp_path: Path) -> None:
    calls = iter(range(10**6))

    def launch(*args: Any) -> Tensor:
        note_binary(f"another each time: {next(calls)}")
        return correct(OP)(*args)

    with launching(linear_residual=launch), use(self_check(tmp_path)):
        with pytest.warns(KernelWarning, match="not checked: other kernels are launched"):
            assert torch.equal(linear_residual(*arguments(FEW)), expected(FEW))
        n_calls = next(calls)
        assert torch.equal(linear_residual(*arguments(FEW)), expected(FEW))
        assert next(calls) == n_calls + 1


def test_unchecked_binary_is_not_used_while_a_graph_is_captured(tmp_path: Path) -> None:
    hardware = PretendedHardware()
    launcher = Launcher(wrong="large")
    with launching(linear_residual=launcher), use(self_check(tmp_path, hardware)):
        linear_residual(*arguments(FEW))
        hardware.capturing = True
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(linear_residual(*arguments(MANY)), expected(MANY))
        hardware.capturing = False
        with pytest.warns(KernelWarning, match="large"):
            linear_residual(*arguments(MANY))


def test_a_launch_inside_a_compiled_graph_is_checked(tmp_path: Path) -> None:
    """A compiled graph calls the launcher without asking whether the op is off."""
    launch = launch_of(OP)
    with launching(linear_residual=Launcher(wrong="small")) as launches, use(self_check(tmp_path)):
        with pytest.warns(KernelWarning):
            assert torch.equal(launch(*arguments(FEW), None), expected(FEW))
        n_launches = launches[OP].call_count
        assert torch.equal(launch(*arguments(FEW), None), expected(FEW))
        assert launches[OP].call_count == n_launches


@pytest.mark.parametrize("op", op_names())
def test_every_kernel_passes_its_check_with_random_arguments(op: str, tmp_path: Path) -> None:
    """Runs in the interpreter, where kernels are right."""
    cases = [case for case in small_cases() if case.op == op]
    case = min(cases, key=lambda case: find_op(op).n_bytes(**case.arguments("meta", torch.half)))
    check = self_check(tmp_path)
    with torch.no_grad(), interpret(), use(check):
        find_op(op).call(**case.arguments("cpu", torch.float16), impl="triton")
    assert check.results(CPU) == {(op, torch.float16): None}


# inputs of a check with few images


def test_check_inputs_keep_the_strides_and_alignment_of_the_call() -> None:
    launch = launch_of("window_attention")
    memory = torch.zeros(8 * 4 * 4 * 96 + 3)
    qkv = memory[3:].view(8, 4, 4, 96).transpose(1, 2)
    bias = torch.zeros(1, 16, 16)
    few = launch.alike((qkv, bias, None, 1, (4, 4), (0, 0), False, 0.0), FEW_IMAGES, seed=0)
    assert few[0].shape == (FEW_IMAGES, 4, 4, 96) and few[0].stride() == qkv.stride()
    assert few[0].data_ptr() % 16 == qkv.data_ptr() % 16 == 12
    assert few[1].shape == bias.shape and few[2:] == (None, 1, (4, 4), (0, 0), False, 0.0)
    assert 0.9 < few[0].std() < 1.1 and few[0].unique().numel() > 1000
    again = launch.alike((qkv, bias, None, 1, (4, 4), (0, 0), False, 0.0), FEW_IMAGES, seed=0)
    assert torch.equal(few[0], again[0])
    assert launch.alike((qkv, bias), None, seed=0)[0].shape == qkv.shape


def test_check_inputs_have_realistic_magnitudes() -> None:
    launch = launch_of("layer_norm_linear")
    zeros = [torch.zeros(shape) for shape in ((3, 5, 1024), (1024,), (1024,), (256, 1024), (256,))]
    x, norm_weight, norm_bias, weight, bias = launch.alike((*zeros, 1e-5, None), None, seed=0)[:5]
    assert 0.9 < x.std() < 1.1 and 0.95 < norm_weight.mean() < 1.05
    assert abs(norm_bias.mean()) < 0.05 and 0.15 < bias.std() < 0.25
    assert 0.95 < weight.std() * 32 < 1.05
    stem = launch_of("stem_conv_bn_relu_pool")
    pixels = stem.alike((torch.zeros(4, 3, 9, 9, dtype=torch.uint8),), None, seed=0)[0]
    assert pixels.dtype == torch.uint8 and pixels.float().std() > 50
    empty = launch.alike((torch.zeros(0, 4), *zeros[1:]), FEW_IMAGES, seed=0)[0]
    assert empty.shape == (0, 4)
