"""The operations of a Triton kernel in numpy, with the rounding of a GPU.

`NumpyBuilder` is Triton's own `InterpreterBuilder` with the wrong operations (bf16 and fp8 as
integers, truncating casts, tf32 computed as fp32) and the slow operations replaced.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton._C.libtriton import ir
from triton.language.semantic import TritonSemantic
from triton.runtime.interpreter import InterpreterBuilder, InterpreterOptions, TensorHandle
from triton.runtime.jit import JITFunction

from .memory import Memory

try:
    import ml_dtypes
except ImportError as e:
    raise ImportError(
        "fastbb_kernels.testing needs ml_dtypes for bf16 and fp8: pip install 'fastbb[testing]'"
    ) from e

# by tl.dtype.name
NUMPY_DTYPES = {
    name: np.dtype(dtype)
    for name, dtype in {
        "int1": np.bool_,
        "int8": np.int8,
        "int16": np.int16,
        "int32": np.int32,
        "int64": np.int64,
        "uint8": np.uint8,
        "uint16": np.uint16,
        "uint32": np.uint32,
        "uint64": np.uint64,
        "fp16": np.float16,
        "fp32": np.float32,
        "fp64": np.float64,
        "bf16": ml_dtypes.bfloat16,
        "fp8e5": ml_dtypes.float8_e5m2,
        "fp8e4nv": ml_dtypes.float8_e4m3fn,
        "fp8e5b16": ml_dtypes.float8_e5m2fnuz,
        "fp8e4b8": ml_dtypes.float8_e4m3fnuz,
    }.items()
}

# GPUs convert to these with `cvt.rn.satfinite`
SATURATING = (NUMPY_DTYPES["fp8e4nv"], NUMPY_DTYPES["fp8e5"])

# libdevice's names without prefix and type
LIBDEVICE: dict[str, Callable[..., Tensor]] = {
    **{
        name: getattr(torch, name)
        for name in (
            *("abs", "acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "ceil"),
            *("copysign", "cos", "cosh", "erf", "erfc", "erfinv", "exp", "exp2", "expm1"),
            *("floor", "fmod", "hypot", "lgamma", "log", "log10", "log1p", "log2"),
            *("pow", "rsqrt", "sin", "sinh", "sqrt", "tan", "tanh", "trunc"),
        )
    },
    "exp10": lambda x: torch.pow(10.0, x),
    "fabs": torch.abs,
    "fdivide": torch.div,
    "isinf": torch.isinf,
    "isnan": torch.isnan,
    "normcdf": torch.special.ndtr,
    "rint": torch.round,
}


def numpy_dtype(dtype: Any) -> np.dtype:
    """Returns the dtype in which numpy computes a scalar, block or pointer type of Triton."""
    scalar = dtype.scalar
    if scalar.is_ptr():
        return np.dtype(np.uint64)
    if scalar.name not in NUMPY_DTYPES:
        raise NotImplementedError(f"interpret() has no {scalar}")
    return NUMPY_DTYPES[scalar.name]


class NumpyBuilder(InterpreterBuilder):
    """Executes each operation immediately, on the arrays in its handles."""

    def __init__(self) -> None:
        super().__init__()
        self.use(Memory())

    def use(self, memory: Memory) -> None:
        """Sets the memory of loads and stores."""
        self.memory = memory
        # debug: tl.device_assert is checked
        self.options = InterpreterOptions(debug=True, sanitize_overflow=memory.checks_overflow)

    def get_bf16(self, value: float) -> TensorHandle:
        return TensorHandle(np.array([value], dtype=NUMPY_DTYPES["bf16"]), tl.bfloat16)

    def cast_impl(self, src: TensorHandle, dst_type: Any) -> TensorHandle:
        return TensorHandle(_cast(src.data, numpy_dtype(dst_type)), dst_type.scalar)

    def create_fp_to_fp(self, src: TensorHandle, dst_type: Any, rounding_mode: Any) -> TensorHandle:
        if rounding_mode != ir.ROUNDING_MODE.RTZ:
            return self.cast_impl(src, dst_type)
        return TensorHandle(_toward_zero(src.data, numpy_dtype(dst_type)), dst_type.scalar)

    def create_dot(
        self,
        a: TensorHandle,
        b: TensorHandle,
        d: TensorHandle,
        input_precision: Any,
        max_num_imprecise_acc: Any,
    ) -> TensorHandle:
        self.memory.dot(2 * a.data.size * b.data.shape[-1])
        product = _matmul(a.data, b.data, input_precision)
        data = (product + d.data.astype(product.dtype)).astype(d.data.dtype)
        return TensorHandle(data, d.dtype.scalar)

    def create_erf(self, arg: TensorHandle) -> TensorHandle:
        return TensorHandle(torch.erf(_torch(arg.data)).numpy(), arg.dtype.scalar)

    def create_fma(self, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        # products of fp32 are exact in fp64
        data = x.data.astype(np.float64) * y.data + z.data
        return TensorHandle(data.astype(z.data.dtype), z.dtype.scalar)

    def create_extern_elementwise(
        self,
        libName: str,
        libPath: str,
        symbol: str,
        argList: list[TensorHandle],
        retType: Any,
        isPure: bool,
    ) -> TensorHandle:
        name = symbol.removeprefix("__nv_")
        if argList[0].dtype.scalar == tl.float32:
            name = name.removesuffix("f")
        function = LIBDEVICE.get(name.removeprefix("fast_"))
        if function is None:
            raise NotImplementedError(f"interpret() has no {symbol} of libdevice")
        data = function(*(_torch(arg.data) for arg in argList)).numpy()
        return TensorHandle(data.astype(numpy_dtype(retType)), retType.scalar)

    def create_load(self, ptr: TensorHandle, _0: Any, _1: Any, is_volatile: Any) -> TensorHandle:
        return self.create_masked_load(ptr, None, None, _0, _1, is_volatile)

    def create_masked_load(
        self,
        ptrs: TensorHandle,
        mask: Any,
        other: TensorHandle | None,
        cache_modifier: Any,
        eviction_policy: Any,
        is_volatile: Any,
    ) -> TensorHandle:
        dtype, shape = ptrs.get_element_ty(), ptrs.data.shape
        otherwise = np.full(shape, _undefined(numpy_dtype(dtype))) if other is None else other.data
        return TensorHandle(self.memory.load(ptrs.data, _mask(mask, shape), otherwise), dtype)

    def create_store(self, ptr: TensorHandle, val: TensorHandle, _0: Any, _1: Any) -> None:
        self.create_masked_store(ptr, val, None, _0, _1)

    def create_masked_store(
        self,
        ptrs: TensorHandle,
        value: TensorHandle,
        mask: Any,
        cache_modifier: Any,
        eviction_policy: Any,
    ) -> None:
        self.memory.store(ptrs.data, value.data, _mask(mask, ptrs.data.shape))

    def create_atomic_rmw(
        self, rmwOp: Any, ptr: TensorHandle, val: TensorHandle, mask: Any, sem: Any, scope: Any
    ) -> TensorHandle:
        op = self.ir_rmw_op_to_interpreter_rmw_op[rmwOp]
        order = self.ir_sem_to_interpreter_sem[sem]
        on = _mask(mask, ptr.data.shape)
        data = self.memory.atomic_rmw(op, ptr.data, val.data, on, order)
        return TensorHandle(data, val.dtype.scalar)

    def create_atomic_cas(
        self, ptr: TensorHandle, cmp: TensorHandle, val: TensorHandle, sem: Any, scope: Any
    ) -> TensorHandle:
        order = self.ir_sem_to_interpreter_sem[sem]
        data = self.memory.atomic_cas(ptr.data, cmp.data, val.data, order)
        return TensorHandle(data, cmp.dtype.scalar)

    def create_barrier(self) -> None:
        self.memory.barrier()


builder = NumpyBuilder()
semantic = TritonSemantic(builder)


def _torch(array: np.ndarray) -> Tensor:
    # a copy, because torch warns of read-only arrays such as broadcast ones
    return torch.from_numpy(np.array(array))


def _mask(mask: Any, shape: tuple[int, ...]) -> np.ndarray:
    if mask is None:
        return np.ones(shape, dtype=bool)
    # a descriptor passes an array, all others pass a handle
    return mask if isinstance(mask, np.ndarray) else mask.data


def _undefined(dtype: np.dtype) -> Any:
    """Returns the value of a lane that is switched off without `other=`."""
    if dtype.kind == "b":
        return dtype.type(True)
    if dtype.kind in "iu":
        return dtype.type(np.iinfo(dtype).max)
    return dtype.type(float("nan"))


def _cast(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if dtype in SATURATING:
        largest = float(ml_dtypes.finfo(dtype).max)
        x = np.clip(x.astype(np.float32), -largest, largest)
    return x.astype(dtype)


def _toward_zero(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    rounded = _cast(x, dtype)
    grew = np.abs(rounded.astype(np.float64)) > np.abs(x.astype(np.float64))
    # sign and magnitude: subtracting 1 from the bits is one step toward zero
    bits = rounded.view(f"u{dtype.itemsize}")
    return np.where(grew, bits - bits.dtype.type(1), bits).view(dtype)


def _matmul(a: np.ndarray, b: np.ndarray, precision: Any) -> np.ndarray:
    """Computes a product like tensor cores: in fp32, int32 or fp64.

    Args:
        a: [..., M, K].
        b: [..., K, N].
        precision: of fp32 products; products of shorter numbers are exact in fp32.
    """
    if a.dtype.kind in "iu":
        return np.matmul(a.astype(np.int32), b.astype(np.int32))
    if a.dtype == np.float64:
        return np.matmul(a, b)
    x, y = a.astype(np.float32), b.astype(np.float32)
    if a.dtype != np.float32 or precision == ir.INPUT_PRECISION.IEEE:
        return np.matmul(x, y)
    if precision == ir.INPUT_PRECISION.TF32:
        return np.matmul(_tf32(x), _tf32(y))
    if precision == ir.INPUT_PRECISION.TF32x3:
        x_high, y_high = _round_to_tf32(x), _round_to_tf32(y)
        x_low, y_low = _round_to_tf32(x - x_high), _round_to_tf32(y - y_high)
        small = np.matmul(x_low, y_high) + np.matmul(x_high, y_low)
        return small + np.matmul(x_high, y_high)
    raise NotImplementedError(f"interpret() has no input_precision {precision}")


def _tf32(x: np.ndarray) -> np.ndarray:
    """Returns the value that a tensor core reads of an fp32 operand, without the low 13 bits."""
    return (np.ascontiguousarray(x).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def _round_to_tf32(x: np.ndarray) -> np.ndarray:
    """Rounds like `cvt.rna.tf32.f32`: to nearest, ties away from zero."""
    return _tf32((np.ascontiguousarray(x).view(np.uint32) + np.uint32(0x1000)).view(np.float32))


# a maximum drops NaN by default
_UFUNCS = (
    (tl.standard._sum_combine, np.add),
    (tl.standard._elementwise_max, np.fmax),
    (tl.standard._elementwise_min, np.fmin),
)


def reduce(input: Any, axis: Any, combine_fn: JITFunction, keep_dims: Any = False, **_: Any) -> Any:
    """Replaces `tl.reduce`: combines neighbours along the axis until one is left, in whole tiles.

    The additions form a tree, so that sums round as on a GPU.
    """
    axis, keep_dims = (getattr(value, "value", value) for value in (axis, keep_dims))
    many = isinstance(input, tuple | tl.tuple)
    tensors = list(input) if many else [input]
    shape = tensors[0].handle.data.shape
    arrays = [tensor.handle.data for tensor in tensors]
    types = [tensor.dtype for tensor in tensors]
    if axis is None:
        arrays, reduced = [array.reshape(-1) for array in arrays], (1,) * len(shape)
    else:
        arrays = [np.moveaxis(array, axis, -1) for array in arrays]
        reduced = tuple(1 if i == axis % len(shape) else n for i, n in enumerate(shape))
    ufunc = next((ufunc for function, ufunc in _UFUNCS if function is combine_fn), None)
    while arrays[0].shape[-1] > 1:
        left, right = [a[..., 0::2] for a in arrays], [a[..., 1::2] for a in arrays]
        if ufunc is not None:
            arrays = [ufunc(left[0], right[0])]
            continue
        combined = combine_fn(*map(_tensor, left, types), *map(_tensor, right, types))
        parts = combined if isinstance(combined, tuple | tl.tuple) else (combined,)
        arrays = [part.handle.data for part in parts]
    arrays = [array.reshape(reduced) if keep_dims else array[..., 0] for array in arrays]
    outputs = tuple(map(_tensor, arrays, types))
    return outputs if many else outputs[0]


def _tensor(array: np.ndarray, dtype: Any) -> tl.tensor:
    if not array.shape:
        return tl.tensor(TensorHandle(array.reshape(1), dtype), dtype)
    return tl.tensor(TensorHandle(array, dtype), tl.block_type(dtype, list(array.shape)))
