"""`interpret()`: results as on a GPU, and everything is restored."""
# pyright: reportArgumentType=false
# a launch passes plain values for constexpr parameters

import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.language.extra import libdevice
from triton.runtime import interpreter as upstream
from triton.runtime.autotuner import Autotuner
from triton.runtime.errors import InterpreterError
from triton.runtime.jit import JITFunction

from fastbb_kernels import _dispatch
from fastbb_kernels.testing import fake_gpu, interpret, numpy_builder, record_launches

LOW_PRECISION = [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]


@triton.jit
def _cast_kernel(x_ptr, y_ptr, N: tl.constexpr, ROUNDING: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, x.to(y_ptr.dtype.element_ty, fp_downcast_rounding=ROUNDING))


@triton.jit
def _binary_kernel(a_ptr, b_ptr, y_ptr, OP: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(a_ptr + i), tl.load(b_ptr + i)
    if OP == "add":
        y = a + b
    elif OP == "sub":
        y = a - b
    elif OP == "mul":
        y = a * b
    elif OP == "maximum":
        y = tl.maximum(a, b)
    else:
        y = tl.abs(-a)
    tl.store(y_ptr + i, y)


@triton.jit
def _dot_kernel(
    a_ptr, b_ptr, y_ptr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr
):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + n[None, :])
    y = tl.dot(a, b, input_precision=PRECISION, out_dtype=y_ptr.dtype.element_ty)
    tl.store(y_ptr + m[:, None] * N + n[None, :], y)


@triton.jit
def _function_kernel(x_ptr, y_ptr, NAME: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    if NAME == "tl.math.erf":
        y = tl.math.erf(x)
    elif NAME == "erf":
        y = libdevice.erf(x)
    elif NAME == "tanh":
        y = libdevice.tanh(x)
    elif NAME == "exp":
        y = libdevice.exp(x)
    elif NAME == "rsqrt":
        y = libdevice.rsqrt(x)
    elif NAME == "pow":
        y = libdevice.pow(x, 1.5)
    elif NAME == "log1p":
        y = libdevice.log1p(x)
    elif NAME == "fast_expf":
        y = libdevice.fast_expf(x)
    elif NAME == "fast_tanhf":
        y = libdevice.fast_tanhf(x)
    else:
        y = libdevice.j0(x)
    tl.store(y_ptr + i, y)


@triton.jit
def _masked_load_kernel(x_ptr, y_ptr, n, OTHER: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    if OTHER is None:
        x = tl.load(x_ptr + i, mask=i < n)
    else:
        x = tl.load(x_ptr + i, mask=i < n, other=OTHER)
    tl.store(y_ptr + i, x)


@triton.jit
def _scaled_sum_kernel(x_ptr, y_ptr, scale, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr, tl.sum(tl.load(x_ptr + i) * scale, 0))


@triton.jit
def _accumulate_kernel(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(y_ptr + i) + tl.load(x_ptr + i))


_tuned_kernel = triton.autotune(
    [triton.Config({"N": n}) for n in (32, 64)], key=[], restore_value=["y_ptr"]
)(_accumulate_kernel)


@triton.jit
def _fail_in_program_kernel(y_ptr, limit):
    i = tl.program_id(0)
    tl.device_assert(i < limit)
    tl.store(y_ptr + i, 1.0)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def cast(x: Tensor, dtype: torch.dtype, rounding: str | None = None) -> Tensor:
    y = torch.empty_like(x, dtype=dtype)
    with interpret():
        _cast_kernel[(1,)](x, y, N=x.numel(), ROUNDING=rounding)
    return y


def dot(a: Tensor, b: Tensor, dtype: torch.dtype, precision: str = "ieee") -> Tensor:
    (m, k), n = a.shape, b.shape[1]
    y = torch.empty(m, n, dtype=dtype)
    with interpret():
        _dot_kernel[(1,)](a, b, y, PRECISION=precision, M=m, N=n, K=k)
    return y


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_casts_round_like_torch(dtype: torch.dtype) -> None:
    largest, tiny = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    x = torch.cat(
        [
            random(3000) * 4,
            torch.linspace(-2 * tiny, 2 * tiny, 500),  # subnormals, and halfway between them
            1 + torch.arange(500) / 512,  # ties
            torch.tensor([0.0, -0.0, largest, -largest] * 24),
        ]
    )
    assert torch.equal(cast(x, dtype).float(), x.to(dtype).float())
    assert torch.equal(cast(x.to(dtype), torch.float32), x.to(dtype).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_casts_keep_infinity_and_nan(dtype: torch.dtype) -> None:
    x = torch.tensor([float("inf"), float("-inf"), float("nan"), 3.4e38])
    torch.testing.assert_close(cast(x, dtype), x.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_fp8_casts_saturate(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    got = cast(torch.tensor([float("inf"), -1e9, float("nan"), 2 * largest]), dtype).float()
    assert got[[0, 1, 3]].tolist() == [largest, -largest, largest] and got[2].isnan()


def test_rtz_casts_truncate() -> None:
    x = random(4096)
    got, nearest = cast(x, torch.bfloat16, "rtz").float(), x.bfloat16().float()
    truncated = (x.view(torch.int32) & -65536).view(torch.float32)
    assert torch.equal(got, truncated) and not torch.equal(got, nearest)


@pytest.mark.parametrize("op", ["add", "sub", "mul", "maximum", "abs"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_arithmetic_rounds_like_torch(dtype: torch.dtype, op: str) -> None:
    a, b = random(1024, dtype=dtype), random(1024, dtype=dtype)
    y = torch.empty_like(a)
    with interpret():
        _binary_kernel[(1,)](a, b, y, OP=op, N=1024)
    assert torch.equal(y, a.abs() if op == "abs" else getattr(torch, op)(a, b))


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION], ids=str)
def test_dots_accumulate_in_fp32(dtype: torch.dtype) -> None:
    a, b = random(32, 64, dtype=dtype), random(64, 16, dtype=dtype)
    exact = a.double() @ b.double()
    torch.testing.assert_close(dot(a, b, torch.float32).double(), exact, rtol=1e-6, atol=1e-5)


def test_integer_dots_are_exact() -> None:
    a, b = (torch.randint(-128, 128, (32, 32), dtype=torch.int8) for _ in range(2))
    assert torch.equal(dot(a, b, torch.int32), a.int() @ b.int())


def test_fp16_dot_is_the_rounded_fp32_product() -> None:
    a, b = random(32, 64, dtype=torch.float16), random(64, 16, dtype=torch.float16)
    assert torch.equal(dot(a, b, torch.float16), (a.float() @ b.float()).half())


def test_input_precision_sets_the_error_of_fp32_dots() -> None:
    a, b = random(32, 64), random(64, 32)
    exact = a.double() @ b.double()
    error = {
        precision: (dot(a, b, torch.float32, precision) - exact).abs().max().item()
        for precision in ("ieee", "tf32", "tf32x3")
    }
    assert error["ieee"] < 2e-5 and error["tf32x3"] < 2e-5 and 1e-3 < error["tf32"] < 1e-1
    short = [(x.view(torch.int32) & -8192).view(torch.float32) for x in (a, b)]
    # tf32 reads the upper 19 bits, and nothing else is different
    torch.testing.assert_close(dot(a, b, torch.float32, "tf32"), short[0] @ short[1])


@pytest.mark.parametrize(
    "name, function",
    {
        "tl.math.erf": torch.erf,
        "erf": torch.erf,
        "tanh": torch.tanh,
        "exp": torch.exp,
        "rsqrt": torch.rsqrt,
        "pow": lambda x: x**1.5,
        "log1p": torch.log1p,
        "fast_expf": torch.exp,
        "fast_tanhf": torch.tanh,
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_libdevice_functions_equal_torch(name: str, function: Any) -> None:
    x = random(256).abs() + 0.1
    y = torch.empty_like(x)
    with interpret():
        _function_kernel[(1,)](x, y, NAME=name, N=256)
    torch.testing.assert_close(y, function(x), rtol=1e-6, atol=0)


def test_missing_libdevice_function_raises_an_error_that_names_it() -> None:
    with interpret(), pytest.raises(InterpreterError, match="no __nv_j0f of libdevice"):
        _function_kernel[(1,)](random(8), random(8), NAME="j0", N=8)


@pytest.mark.parametrize(
    "dtype, undefined",
    [(torch.float32, float("nan")), (torch.bfloat16, float("nan")), (torch.int32, 2**31 - 1)],
    ids=str,
)
def test_masked_lanes_without_other_are_poisoned(dtype: torch.dtype, undefined: float) -> None:
    x, y = torch.ones(8, dtype=dtype), torch.zeros(8, dtype=dtype)
    with interpret():
        _masked_load_kernel[(1,)](x, y, 5, OTHER=None, N=8)
        assert str(y.tolist()) == str([x[0].item()] * 5 + [undefined] * 3)
        _masked_load_kernel[(1,)](x, y, 5, OTHER=0, N=8)
        assert y.tolist() == [1] * 5 + [0] * 3
        _masked_load_kernel[(1,)](x, y, 8, OTHER=None, N=8)
        assert y.tolist() == [1] * 8


def test_a_float_argument_is_fp32_as_in_compiled_code() -> None:
    # a Python number would take the dtype of x, so the products would round to bf16
    x, y = random(64, dtype=torch.bfloat16), torch.empty(1)
    with interpret():
        _scaled_sum_kernel[(1,)](x, y, 0.1, N=64)
    torch.testing.assert_close(y[0], (x.float() * 0.1).sum(), rtol=1e-6, atol=1e-6)


def test_autotuning_runs_every_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    run = upstream.InterpreterBuilder.create_make_range

    def record(self: Any, ty: Any, start: int, stop: int) -> Any:
        seen.append(stop)
        return run(self, ty, start, stop)

    monkeypatch.setattr(upstream.InterpreterBuilder, "create_make_range", record)
    x, y = torch.ones(64), torch.zeros(64)
    with interpret():
        _tuned_kernel[(1,)](x, y)
    # the last configuration ran on the original contents of y
    assert seen == [32, 64] and y.tolist() == [1.0] * 64


def patched_state() -> dict[str, dict[str, Any]]:
    owners = [tl, tl.core, tl.math, tl.tensor, tl.dtype, tl.block_type, tl.tensor_descriptor]
    owners += [tl.core.tensor_descriptor_base, libdevice, upstream, upstream.InterpreterBuilder]
    owners += [JITFunction, Autotuner, sys.modules[__name__]]
    state = {str(owner): dict(vars(owner)) for owner in owners}
    return {**state, "dispatch": {"pretending": _dispatch.launches_directly()}}


def test_interpret_restores_triton_afterwards() -> None:
    x, y = torch.ones(64), torch.zeros(64)
    before = patched_state()
    with interpret(), interpret():
        _scaled_sum_kernel[(1,)](x, y, 2.0, N=64)
    assert patched_state() == before
    with pytest.raises(InterpreterError), interpret():
        _fail_in_program_kernel[(1,)](y, 0)
    assert patched_state() == before
    with interpret():  # and it works once more
        _scaled_sum_kernel[(1,)](x, y, 2.0, N=64)
    assert patched_state() == before and y[0] == 128


def test_leaving_an_inner_block_keeps_interpreting() -> None:
    x, y = torch.ones(64), torch.zeros(64)
    with interpret():
        with pytest.raises(KeyError), interpret():
            raise KeyError
        _scaled_sum_kernel[(1,)](x, y, 2.0, N=64)
        assert _dispatch.launches_directly() and y[0] == 128


def test_interpret_inside_record_launches_is_refused() -> None:
    with (
        record_launches(90),
        pytest.raises(RuntimeError, match="leave that first"),
        interpret(),
    ):
        pass
    assert not _dispatch.launches_directly()


def test_kernels_compile_before_and_after_interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knobs.compilation, "always_compile", True)
    x, y = torch.ones(64), torch.zeros(64)
    for n in (32, 64):
        with fake_gpu(90) as gpu:
            _scaled_sum_kernel[(1,)](x, y, 2.0, N=n)
        assert gpu.launches[0].kernel is not None
        with interpret():
            _scaled_sum_kernel[(1,)](x, y, 2.0, N=n)
        assert y[0] == 2 * n


def test_kernel_defined_inside_the_block_compiles_afterwards(tmp_path: Path) -> None:
    file = tmp_path / "late.py"
    file.write_text(
        "import triton\nimport triton.language as tl\n\n@triton.jit\n"
        "def _one_kernel(y_ptr):\n    tl.store(y_ptr, 1.0)\n"
    )
    with interpret():
        late = load("late", file)
        y = torch.zeros(1)
        late._one_kernel[(1,)](y)
    assert y.item() == 1 and isinstance(late._one_kernel, JITFunction)


def load(name: str, file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_errors_name_kernel_and_program() -> None:
    with interpret(), pytest.raises(InterpreterError) as failed:
        _fail_in_program_kernel[(3,)](torch.zeros(3), 2)
    assert "_fail_in_program_kernel, program (2, 0, 0): AssertionError" in str(failed.value)
    assert failed.value.__cause__ is not None
    frames = traceback.extract_tb(failed.value.__cause__.__traceback__)
    assert ("_fail_in_program_kernel", "tl.device_assert(i < limit)") in [
        (frame.name, frame.line) for frame in frames if frame.filename == __file__
    ]


def test_meta_tensors_are_refused() -> None:
    y = torch.zeros(3, device="meta")
    with (
        interpret(),
        pytest.raises(ValueError, match="_fail_in_program_kernel: .* y_ptr is on meta"),
    ):
        _fail_in_program_kernel[(3,)](y, 3)


def test_triton_interpret_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knobs.runtime, "interpret", True)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), interpret():
        pass


def test_missing_ml_dtypes_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    name = "fastbb_kernels.testing.without_ml_dtypes"
    with pytest.raises(ImportError, match=r"pip install 'fastbb\[testing\]'"):
        load(name, Path(numpy_builder.__file__))
