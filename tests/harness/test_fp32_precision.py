"""Precision of fp32 products: TF32 is read, set and restored by PyTorch's old and new settings."""

import multiprocessing
import traceback
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastbb.engine.computation import BackboneMaps
from fastbb.engine.engine import Engine
from fastbb.engine.settings import Settings
from fastbb_kernels import linear_residual
from fastbb_kernels._dispatch import input_precision
from fastbb_kernels.accuracy import max_error
from fastbb_kernels.fp32_precision import (
    convolution_precision,
    fp32_products,
    is_in_force,
    matmul_precision,
)
from fastbb_kernels.testing import interpret

# settings of a user (`b = torch.backends`), and whether products are then in TF32
SETTINGS = {
    "pass": False,
    "torch.set_float32_matmul_precision('high')": True,
    "torch.set_float32_matmul_precision('medium')": True,
    "torch.set_float32_matmul_precision('highest')": False,
    "b.cuda.matmul.allow_tf32 = True": True,
    "b.cuda.matmul.allow_tf32 = False": False,
    "b.cudnn.allow_tf32 = True": False,
    "b.cudnn.allow_tf32 = False": False,
    "b.fp32_precision = 'tf32'": True,
    "b.fp32_precision = 'ieee'": False,
    "b.fp32_precision = 'bf16'": False,
    "b.cuda.matmul.fp32_precision = 'tf32'": True,
    "b.cuda.matmul.fp32_precision = 'ieee'": False,
    "b.cuda.matmul.fp32_precision = 'none'": False,
    # all of CUDA, by PyTorch: its matrices follow
    "b.cudnn.fp32_precision = 'tf32'": True,
    "b.cudnn.fp32_precision = 'ieee'": False,
    "b.cudnn.conv.fp32_precision = 'tf32'": False,
    "b.cudnn.conv.fp32_precision = 'ieee'": False,
    "b.cudnn.conv.fp32_precision = 'none'": False,
    "b.cudnn.rnn.fp32_precision = 'ieee'": False,
    "b.mkldnn.matmul.fp32_precision = 'bf16'": False,
    "b.mkldnn.conv.fp32_precision = 'bf16'": False,
    "b.mkldnn.set_flags(_fp32_precision='bf16')": False,
    "b.fp32_precision = 'tf32'; b.cuda.matmul.fp32_precision = 'ieee'": False,
    "b.fp32_precision = 'tf32'; b.cudnn.fp32_precision = 'ieee'": False,
    "b.fp32_precision = 'ieee'; b.cudnn.fp32_precision = 'tf32'": True,
    "b.fp32_precision = 'tf32'; torch.set_float32_matmul_precision('highest')": False,
    "torch.set_float32_matmul_precision('medium'); b.cuda.matmul.fp32_precision = 'ieee'": False,
    "torch.set_float32_matmul_precision('high'); b.fp32_precision = 'ieee'": True,
    "b.cudnn.allow_tf32 = False; b.fp32_precision = 'tf32'": True,
    "b.cudnn.allow_tf32 = False; b.cudnn.conv.fp32_precision = 'tf32'": False,
}
GETTERS = (
    "torch.get_float32_matmul_precision()",
    *(f"b.cuda.matmul.{name}" for name in ("allow_tf32", "fp32_precision")),
    *(f"b.cudnn.{name}" for name in ("allow_tf32", "fp32_precision")),
    *(f"b.cudnn.{op}.fp32_precision" for op in ("conv", "rnn")),
    "b.fp32_precision",
    "b.mkldnn.fp32_precision",
    *(f"b.mkldnn.{op}.fp32_precision" for op in ("matmul", "conv", "rnn")),
)
BACKENDS: Any = torch.backends
NAMES = {"torch": torch, "b": BACKENDS}


def in_another_process(call: Callable[[], None]) -> None:
    """Runs in another process, since some settings cannot be set back to their initial values."""
    context = multiprocessing.get_context("fork")
    said, saying = context.Pipe(duplex=False)

    def run() -> None:
        try:
            call()
            saying.send(None)
        except BaseException:
            saying.send(traceback.format_exc())

    process = context.Process(target=run)
    process.start()
    saying.close()
    problem = said.recv()
    process.join()
    if problem is not None:
        pytest.fail(problem)


def said() -> dict[str, Any]:
    """Values of every public getter."""

    def value(getter: str) -> Any:
        try:
            return eval(getter, NAMES)
        except RuntimeError:
            return "raises"

    return {getter: value(getter) for getter in GETTERS}


def stored() -> list[dict[str, Any]]:
    """Values of every getter, also after the setting that it follows is changed."""
    found = [said()]
    own = own_setting("generic")
    for generic, cuda in product(("none", "ieee", "tf32", "bf16"), ("none", "ieee", "tf32")):
        BACKENDS.fp32_precision = "none"
        own_cuda = own_setting("cuda")
        BACKENDS.fp32_precision = generic
        torch.backends.cudnn.fp32_precision = cuda
        found.append(said())
        torch.backends.cudnn.fp32_precision = own_cuda
        BACKENDS.fp32_precision = own
    return found


def own_setting(backend: str) -> str:
    return torch._C._get_fp32_precision_getter(backend, "all")


@pytest.mark.parametrize("setting", SETTINGS)
def test_kernels_follow_the_tf32_settings_of_pytorch(setting: str) -> None:
    x, weight, residual = torch.randn(16, 64), torch.randn(32, 64), torch.zeros(16, 32)
    exact = x.double() @ weight.double().T

    def check() -> None:
        exec(setting, NAMES)
        with torch.no_grad(), interpret():
            y = linear_residual(x, weight, None, residual, impl="triton")
        error = max_error(y, exact)
        assert (error > 1e-3) if SETTINGS[setting] else (error < 1e-4)
        assert (matmul_precision() == "tf32") == SETTINGS[setting]
        assert matmul_precision() == input_precision(torch.float32)
        assert input_precision(torch.bfloat16) == "ieee"
        says_cudnn = said()["b.cudnn.conv.fp32_precision"]
        assert convolution_precision() == ("tf32" if says_cudnn == "tf32" else "ieee")

    in_another_process(check)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("precision", [None, "fp32", "tf32"])
def test_engine_restores_the_tf32_settings_of_the_user(precision: Any, setting: str) -> None:
    backbone: Any = nn.Linear(1, 1)  # of a backbone, only the dtype of its weights is read
    engine = Engine(BackboneMaps(backbone), Settings("eager", precision))
    pixels = torch.zeros(1)

    def check() -> None:
        exec(setting, NAMES)
        before = stored()
        seen: list[Any] = []

        def run(pixel_values: Tensor) -> None:
            seen.append((matmul_precision(), convolution_precision(), said()))

        def fail(pixel_values: Tensor) -> None:
            raise ZeroDivisionError

        engine.in_precision(run, pixels)
        with pytest.raises(ZeroDivisionError):
            engine.in_precision(fail, pixels)
        ((matmul, convolution, inside),) = seen
        if precision is None:
            assert inside == before[0]
        else:
            wanted = "tf32" if precision == "tf32" else "ieee"
            assert matmul == convolution == wanted
            on_cpu = {inside[f"b.mkldnn.{op}.fp32_precision"] for op in ("matmul", "conv")}
            assert precision == "tf32" or on_cpu <= {"ieee", "none"}
        assert stored() == before

    in_another_process(check)


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_old_getters_of_pytorch_report_the_precision(precision: Any) -> None:
    def check() -> None:
        torch.set_float32_matmul_precision("highest" if precision == "tf32" else "medium")
        torch.backends.cudnn.allow_tf32 = precision == "ieee"
        assert not is_in_force(precision)
        with fp32_products(precision):
            assert is_in_force(precision)
            allowed = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
            assert allowed == (precision == "tf32",) * 2
            name = torch.get_float32_matmul_precision()
            assert name == ("high" if precision == "tf32" else "highest")

    in_another_process(check)


def test_dynamo_traces_functions_that_read_the_precision() -> None:
    def scaled(x: Tensor) -> Tensor:
        return x * (2 if input_precision(x.dtype) == convolution_precision() == "tf32" else 3)

    compiled = torch.compile(scaled, fullgraph=True, backend="eager")
    with fp32_products("ieee"):
        assert compiled(torch.ones(1)).item() == 3
