"""Bytes and launches of eager PyTorch on a CUDA device, counted without the device.

The rule, the same for every library and for our kernels: a launch reads every distinct element of
its tensor arguments once and writes every element of its outputs once; weights count; views and
allocations are free. A library call (a GEMM, a convolution) is one launch. Savings by caches and
repeated reads of tiles do not count on either side.

The dispatcher reports ops, best on the meta device, where a forward pass costs nothing. ATen's own
code decomposes ops that consist of others (`pad`, `masked_fill`, `clone`). If the CUDA
implementation of an op launches several kernels (`roll`, `convolution`, a norm of a strided
tensor), the counter does the same as its source.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._ops import OpOverload
from torch._prims_common import suggest_memory_format
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastbb_kernels._dispatch import Architecture
from fastbb_kernels.recorder import TensorArgument, record_launches

GEMM = "GEMM"
ATTENTION = "attention"
NORM = "norm"
ACTIVATION = "activation"
RESIDUAL = "residual add"
COPY = "copy"
ROLL = "roll"
PAD = "pad"
MASK = "mask, bias"
POOL = "pool"
OTHER = "other"
CATEGORIES = (*(GEMM, ATTENTION, NORM, ACTIVATION, RESIDUAL, POOL, COPY, ROLL, PAD, MASK, OTHER),)

# ops that are one kernel on a CUDA device; the counter refuses any other op, and does not guess
KERNELS = {
    "addmm": GEMM,
    "mm": GEMM,
    "bmm": ATTENTION,
    "_softmax": ATTENTION,
    "mul": ATTENTION,  # queries by their scale
    "div": ATTENTION,  # scores by their scale
    "linalg_vector_norm": NORM,
    "clamp_min": NORM,  # lengths of queries and keys
    "native_layer_norm": NORM,
    "rsqrt": NORM,
    "gelu": ACTIVATION,
    "relu": ACTIVATION,
    "relu_": ACTIVATION,
    "sigmoid": ACTIVATION,
    "silu": ACTIVATION,
    "silu_": ACTIVATION,
    "add": RESIDUAL,
    "add_": RESIDUAL,
    "avg_pool2d": POOL,
    "max_pool2d_with_indices": POOL,  # it writes the indices also in inference
    "mean": POOL,
    "cat": COPY,
    "copy_": COPY,
    # position embeddings: their interpolation and rotation
    "_upsample_bicubic2d_aa": OTHER,
    "upsample_bicubic2d": OTHER,
    "upsample_bilinear2d": OTHER,
    "addcmul": OTHER,
    "cos": OTHER,
    "neg": OTHER,
    "sin": OTHER,
    "arange": OTHER,
    "clamp": OTHER,
    "exp": OTHER,
    "eq": OTHER,
    "fill_": OTHER,
    "ge": OTHER,
    "index": OTHER,
    "masked_fill_": OTHER,
    "ne": OTHER,
    "sub": OTHER,
    "zero_": OTHER,
}
ADDITIONS = ("add", "add_")
# they write their first argument without reading it
OVERWRITING = ("copy_", "fill_", "zero_")
FREE = ("empty", "empty_strided", "as_strided_")  # in addition to views


class Launch(NamedTuple):
    """One kernel launch: the op or kernel it comes from, its category, the bytes it moves."""

    name: str
    category: str
    n_bytes: int


def n_bytes(launches: Iterable[Launch]) -> int:
    return sum(launch.n_bytes for launch in launches)


def bytes_by_category(launches: Iterable[Launch]) -> dict[str, int]:
    """Sums bytes by category, without empty ones, in the order of `CATEGORIES`."""
    totals = Counter[str]()
    for launch in launches:
        totals[launch.category] += launch.n_bytes
    return {category: totals[category] for category in CATEGORIES if totals[category]}


@contextmanager
def count_launches(weights: Iterable[Tensor] = ()) -> Iterator[list[Launch]]:
    """Counts the launches of the ops called inside the block.

    Values that are computed from weights and constants alone (a gathered position bias, a shift
    mask and its copies) have the category "mask, bias", and so have additions of them.

    Args:
        weights: parameters and buffers, on the device of the block's computations.

    Yields:
        a list that grows by one entry per launch.

    Raises:
        NotImplementedError: an op whose launches this module does not know.
    """
    counter = _Counter(weights)
    with _FusedAttention(counter), _fused_convolution(counter), counter:
        yield counter.launches


@contextmanager
def count_kernels(weights: Iterable[Tensor], arch: Architecture = 90) -> Iterator[list[Launch]]:
    """Counts like `count_launches`, and the launches of our kernels as well.

    Args:
        weights: parameters and buffers, on the device of the block's computations.
        arch: of the GPU for which ops choose what they do.
    """
    with record_launches(arch) as record, count_launches(weights) as launches:
        yield launches
    launches += [
        Launch(kernel.name, kernel_category(kernel.name), kernel.n_bytes)
        for kernel in record.launches
    ]


# parts of the names of our kernels; a fused kernel has the category of most of its work
_KERNEL_CATEGORIES = {
    "attention": ATTENTION,
    "layer_norm_nchw": NORM,
    "layer_norm_residual": NORM,
    "grn": NORM,
    "bias_act": ACTIVATION,
    **dict.fromkeys(("conv", "linear", "qkv", "mlp", "swiglu", "patch", "bottleneck"), GEMM),
}


def kernel_category(kernel: str) -> str:
    """Category of one of our kernels, by its name.

    Raises:
        NotImplementedError: no part of the name is known.
    """
    for part, category in _KERNEL_CATEGORIES.items():
        if part in kernel:
            return category
    raise NotImplementedError(f"the kernel {kernel} has no category: add a part of its name")


def n_distinct_bytes(tensors: Iterable[Tensor]) -> int:
    """Counts bytes of distinct elements; expanded ones, and tensors passed twice, count once."""
    return sum(argument.n_bytes for argument in {TensorArgument.of(t) for t in tensors})


def _storage(tensor: Tensor) -> int:
    """Identity of the memory behind a tensor; meta tensors have no address."""
    return TensorArgument.of(tensor).storage


class _Counter(TorchDispatchMode):
    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        # storages without image data; their tensors are kept so that no identity is used again
        self._constants: dict[int, Tensor] = {_storage(weight): weight for weight in weights}
        # category of the op that is being decomposed
        self._composed: str | None = None

    def __torch_dispatch__(
        self, op: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = op.overloadpacket.__name__
        if _has_kernel(op, "CompositeImplicitAutograd"):  # `contiguous`: a view or a copy
            with self:
                return op.decompose(*args, **kwargs)
        if op.is_view or name in FREE:
            return op(*args, **kwargs)
        if name in SEVERAL_KERNELS:
            return SEVERAL_KERNELS[name](self, op, *args, **kwargs)
        if name in KERNELS:
            return self.launch(name, KERNELS[name], op, *args, **kwargs)
        if _has_kernel(op, "CompositeExplicitAutograd") and not _has_kernel(op, "CPU"):
            return self._take_apart(name, op, *args, **kwargs)
        raise NotImplementedError(
            f"the count of traffic does not know how many kernels {op} launches; "
            "if one, add it to KERNELS"
        )

    def launch(
        self, name: str, category: str, op: Callable[..., Any], *args: Any, **kw: Any
    ) -> Any:
        """Runs an op that is one kernel, and counts it."""
        result = op(*args, **kw)
        written = _tensors(result)
        read = _tensors(args, {key: value for key, value in kw.items() if key != "out"})
        if name in OVERWRITING:
            read = [tensor for tensor in read if tensor is not written[0]]
        self.count(name, category, read, written)
        return result

    def count(self, name: str, category: str, read: list[Tensor], written: list[Tensor]) -> None:
        """Adds a launch; a launch that reads only constants makes a mask or a bias."""
        n_constants = sum(self._is_constant(tensor) for tensor in read)
        if self._composed is not None:
            category = self._composed
        elif n_constants == len(read) or (name in ADDITIONS and n_constants):
            category = MASK
        n_bytes = n_distinct_bytes(read) + n_distinct_bytes(written)
        self.launches.append(Launch(name, category, n_bytes))
        for tensor in written:
            if n_constants == len(read):
                self._constants[_storage(tensor)] = tensor
            else:
                self._constants.pop(_storage(tensor), None)

    def contiguous(
        self, tensor: Tensor, layout: torch.memory_format = torch.contiguous_format
    ) -> Tensor:
        """Makes the copy of a strided input that many CUDA implementations make."""
        with self:
            return tensor.contiguous(memory_format=layout)

    def _is_constant(self, tensor: Tensor) -> bool:
        return _storage(tensor) in self._constants

    def _take_apart(self, name: str, op: OpOverload, *args: Any, **kwargs: Any) -> Any:
        """Runs an op by ATen's own decomposition, and counts its parts."""
        before = self._composed
        if name == "constant_pad_nd" and not self._is_constant(args[0]):
            self._composed = PAD
        try:
            with self:
                return op._op_dk(DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        finally:
            self._composed = before


def _has_kernel(op: OpOverload, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), key)


def _tensors(*values: Any) -> list[Tensor]:
    """Returns the tensors on the device; Python numbers arrive as CPU scalars, passed by value."""
    leaves = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    return [leaf for leaf in leaves if leaf.dim() > 0 or leaf.device.type != "cpu"]


def _roll(counter: _Counter, op: OpOverload, x: Tensor, shifts: list[int], dims: list[int]) -> Any:
    # TensorTransformations.cu: contiguous, then one kernel per dimension
    x = counter.contiguous(x)
    for shift, dim in zip(shifts, dims):
        x = counter.launch("roll", ROLL, op, x, [shift], [dim])
    return x


def _convolution(
    counter: _Counter, op: OpOverload, x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any
) -> Tensor:
    # Convolution.cpp: if x or weight is channels-last, both are made so, and the result is; cuDNN's
    # kernel has no bias, an addition in place follows it
    formats = {suggest_memory_format(tensor) for tensor in (x, weight)} - {torch.contiguous_format}
    layout = next(iter(formats), torch.contiguous_format)
    x, weight = (counter.contiguous(tensor, layout) for tensor in (x, weight))
    y = torch.empty_like(op(x, weight, None, *args), memory_format=layout)
    counter.count("convolution", GEMM, [x, weight], [y])
    if bias is not None:
        counter.count("convolution_bias", GEMM, [y, bias], [y])
    return y


def _of_contiguous(counter: _Counter, op: OpOverload, x: Tensor, *args: Any) -> Any:
    # layer_norm_kernel.cu and SoftMax.cu: expect_contiguous, then one kernel
    name = op.overloadpacket.__name__
    return counter.launch(name, KERNELS[name], op, counter.contiguous(x), *args)


def _batch_norm(
    counter: _Counter,
    op: OpOverload,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    *args: Any,
) -> Any:
    # Normalization.cpp: cuDNN takes no bf16. Normalization.cu, in eval: a copy of the mean, the
    # inverse deviation, both fp32, then one kernel
    result = op(x, weight, bias, mean, var, *args)
    statistics = [torch.empty_like(mean, dtype=torch.float32) for _ in range(2)]
    for source, made in zip((mean, var), statistics):
        counter.count("batch_norm_statistics", NORM, [source], [made])
    read = [tensor for tensor in (x, weight, bias, *statistics) if tensor is not None]
    counter.count("native_batch_norm", NORM, read, [result[0]])
    return result


SEVERAL_KERNELS: dict[str, Callable[..., Any]] = {
    "roll": _roll,
    "convolution": _convolution,
    "native_batch_norm": _batch_norm,
    "native_layer_norm": _of_contiguous,
    "_softmax": _of_contiguous,
}


@contextmanager
def _fused_convolution(counter: _Counter) -> Iterator[None]:
    """Counts cuDNN's fused convolution, which our op calls on a GPU and not on a pretended one."""
    module = import_module("fastbb_kernels.ops.conv3x3_bn_act")

    def convolve(
        x: Tensor, weight: Tensor, bias: Tensor, stride: int, dilation: int, residual: Tensor | None
    ) -> Tensor:
        x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
        y = module.empty_output(x, weight, stride)
        read = [tensor for tensor in (x, weight, bias, residual) if tensor is not None]
        counter.count("cudnn_convolution_add_relu", GEMM, read, [y])
        return y

    with mock.patch.object(module, "_call_cudnn", convolve):
        yield


class _FusedAttention(TorchFunctionMode):
    """Keeps scaled_dot_product_attention one op, which devices other than CUDA decompose.

    It counts like the memory-efficient backend, which takes a dense mask on every architecture
    (PyTorch may prefer a recent cuDNN on Hopper and Blackwell): attention.cpp copies a mask whose
    rows do not start at multiples of 8 elements into one whose rows do, and the memory of the
    output is laid out as [B, N, heads, head_dim].
    """

    def __init__(self, counter: _Counter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        return self._attend(*args, **kwargs)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
    ) -> Tensor:
        read = [q, k, v]
        if attn_mask is not None:
            n_keys = attn_mask.shape[-1]
            if any(stride % 8 for stride in attn_mask.stride()[:-1]) or attn_mask.stride(-1) != 1:
                attn_mask = F.pad(attn_mask, (0, 8 - n_keys % 8))[..., :n_keys]
            read.append(attn_mask)
        batch, heads, n_queries, _head_dim = q.shape
        y = q.new_empty(batch, n_queries, heads, v.shape[-1]).transpose(1, 2)
        self._counter.count("scaled_dot_product_attention", ATTENTION, read, [y])
        return y
