"""Runs `@triton.jit` kernels on CPU tensors, with the results of a GPU.

Triton has an interpreter: if an environment variable is set before triton is imported, kernels are
Python functions on numpy arrays. `interpret` runs its machinery with the operations of
`numpy_builder`, inside a `with` block, in a process that can also compile.

The interpreter does not model shared memory, registers, approximate exp and division (two units in
the last place of fp32), the order of sums, and errors of the compiler. Compile each kernel as well.
"""

import ast
import functools
import inspect
import math
import textwrap
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FunctionType, SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.language.extra import libdevice
from triton.language.extra.cuda import libdevice as cuda_libdevice
from triton.runtime import interpreter as upstream
from triton.runtime.autotuner import Autotuner
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import TensorHandle
from triton.runtime.jit import JITFunction, TensorWrapper, mangle_type
from triton.tools.tensor_descriptor import TensorDescriptor

from .._dispatch import launches_directly, pretend
from .memory import Memory
from .numpy_builder import builder, numpy_dtype, reduce, semantic

_interpreting = False


@contextmanager
def interpret() -> Iterator[None]:
    """Runs launches of Triton kernels inside the block in numpy, on CPU tensors.

    Kernels and launchers are unchanged. Casts, arithmetic and dots of bf16, fp16 and fp8 round as
    on a GPU; an fp32 dot follows `input_precision` ("tf32", Triton's default, drops 13 bits). Lanes
    that a mask switches off without `other=` hold NaN, or the largest integer, because on a GPU
    they are undefined. An autotuned kernel runs with every configuration, and the results of the
    last one remain. Ops of this package run their Triton kernels:

        with torch.no_grad(), use_impl("triton"), interpret():
            model(pixels)

    Blocks nest. Use them in one thread: launches of other threads are interpreted as well.

    Raises:
        InterpreterError: inside, where a kernel fails; it names the kernel and the program.
        ValueError: inside, where a kernel is given a tensor that is not on the CPU.
        RuntimeError: inside `fake_gpu` or `record_launches`; or TRITON_INTERPRET is set, so that
            kernels are bound to Triton's own interpreter.
    """
    global _interpreting
    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET binds kernels to Triton's own interpreter: unset it")
    if _interpreting:
        yield
        return
    if launches_directly():
        raise RuntimeError("interpret() inside fake_gpu() or record_launches(): leave that first")
    _interpreting = True
    try:
        with ExitStack() as stack:
            stack.enter_context(pretend(None))
            stack.enter_context(np.errstate(all="ignore"))
            stack.enter_context(_patched())
            yield
    finally:
        _interpreting = False


@contextmanager
def use_memory(memory: Memory) -> Iterator[None]:
    """Makes interpreted launches inside the block use `memory`.

    Raises:
        RuntimeError: launches already use another memory than the default.
    """
    if type(builder.memory) is not Memory:
        raise RuntimeError("a trace is already active, and its counts would miss this part")
    before = builder.memory
    builder.use(memory)
    try:
        yield
    finally:
        builder.use(before)


@contextmanager
def _patched() -> Iterator[None]:
    """Replaces the launch and the functions of the language."""
    scope = upstream._LangPatchScope()
    try:
        scope.set_attr(upstream, "interpreter_builder", builder)
        scope.set_attr(upstream, "interpreter_semantic", semantic)
        scope.set_attr(upstream, "_get_np_dtype", numpy_dtype)
        scope.set_attr(JITFunction, "run", _launch)
        scope.set_attr(JITFunction, "__call__", _call)
        scope.set_attr(Autotuner, "run", _run_every_config)
        # upstream searches modules of the language among the globals of a kernel
        names = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
        scope._changes += upstream._patch_lang(names)._changes
        for owner in (tl, tl.core, tl.tensor):
            scope.set_attr(owner, "reduce", reduce)
        # triton 3.6 calls int() on an array with an axis, which numpy 2.4 refuses
        scope.set_attr(tl.tensor, "__index__", lambda tensor: int(tensor.handle.data.item()))
        # the original constructors take two fifths of the time of a kernel
        scope.set_attr(tl.tensor, "__init__", _init_tensor)
        scope.set_attr(tl.block_type, "__init__", _init_block_type)
        upstream._patch_builtin(cuda_libdevice, builder, scope)
        for name, _ in inspect.getmembers(libdevice, inspect.isfunction):
            # the exact function stands for a fast version that only AMD has
            exact = name.removeprefix("fast_").removesuffix("f")
            emulated = getattr(cuda_libdevice, name, None) or getattr(cuda_libdevice, exact, None)
            scope.set_attr(libdevice, name, emulated or _missing_libdevice(name))
        yield
    finally:
        scope.restore()


def _missing_libdevice(name: str) -> Callable[..., Any]:
    def missing(*_: Any) -> Any:
        raise NotImplementedError(f"interpret() has no libdevice.{name}")

    return missing


@functools.cache
def _wrapped_shape(shape: tuple[int, ...]) -> tuple[Any, tl.constexpr]:
    return tl.tuple([tl.constexpr(size) for size in shape]), tl.constexpr(math.prod(shape))


def _init_tensor(tensor: tl.tensor, handle: TensorHandle, type: Any) -> None:
    """Replaces `tl.tensor.__init__`; wraps each shape once."""
    tensor.handle, tensor.type, tensor.dtype = handle, type, type.scalar
    tensor.shape, tensor.numel = _wrapped_shape(tuple(type.shape) if type.is_block() else ())


_upstream_init_block_type = tl.block_type.__init__
_block_types: dict[tuple[Any, ...], dict[str, Any]] = {}


def _init_block_type(block: tl.block_type, element_ty: Any, shape: Any) -> None:
    """Replaces `tl.block_type.__init__`; checks and names each type once."""
    key = (element_ty.name, *(getattr(size, "value", size) for size in shape))
    if key not in _block_types:
        _upstream_init_block_type(block, element_ty, shape)
        _block_types[key] = dict(vars(block))
    vars(block).update(_block_types[key])


def _launch(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """Replaces `JITFunction.run`."""
    if warmup:
        return
    name, memory = kernel.__name__, builder.memory
    # other arguments are options of the compiler, such as num_warps
    known = {key: value for key, value in kwargs.items() if key in kernel.signature.parameters}
    for hook in kernel.pre_run_hooks:
        hook(*args, **known)
    bound = kernel.signature.bind(*args, **known)
    bound.apply_defaults()
    sizes: Any = grid(bound.arguments) if callable(grid) else grid
    x, y, z = (*sizes, 1, 1)[:3]
    memory.begin_launch(name, (x, y, z))
    values = {
        parameter.name: value if parameter.is_constexpr else _argument(parameter.name, value)
        for parameter, value in zip(kernel.params, bound.arguments.values())
    }
    function = _runnable(kernel.fn)
    builder.set_grid_dim(x, y, z)
    for program in memory.programs((x, y, z)):
        builder.set_grid_idx(*program)
        memory.begin_program(program)
        try:
            function(**values)
        except InterpreterError:
            raise
        except Exception as e:
            raise InterpreterError(f"{name}, program {program}: {e!r}") from e
    memory.end_launch()


def _call(function: JITFunction, *args: Any, **kwargs: Any) -> Any:
    """Replaces `JITFunction.__call__`: a kernel calls another `@triton.jit` function."""
    return _runnable(function.fn)(*args, **kwargs)


def _argument(name: str, value: Any) -> Any:
    """Converts an argument that is not a constexpr to the value that compiled code would get."""
    if isinstance(value, tuple):
        parts = (_argument(f"{name}.{i}", part) for i, part in enumerate(value))
        return upstream._tuple_create(value, parts)
    if isinstance(value, TensorDescriptor):
        return semantic.make_tensor_descriptor(
            base=_argument(name, value.base),
            shape=[upstream._implicit_cvt(size) for size in value.shape],
            strides=[*map(upstream._implicit_cvt, value.strides[:-1]), tl.constexpr(1)],
            block_shape=[tl.constexpr(size) for size in value.block_shape],
            padding_option=value.padding,
        )
    if isinstance(value, Tensor | TensorWrapper):
        tensor = value.base if isinstance(value, TensorWrapper) else value
        pointer = np.array([builder.memory.address(name, tensor)], dtype=np.uint64)
        type: Any = tl.str_to_ty(mangle_type(value), None)
        return tl.tensor(TensorHandle(pointer, type), type)
    if isinstance(value, float):
        # upstream leaves it a Python number, which takes the dtype of the other operand
        return tl.tensor(TensorHandle(np.array([value], dtype=np.float32), tl.float32), tl.float32)
    if isinstance(value, bool):
        # triton 3.6 converts it to int32 and refuses the result
        return tl.tensor(TensorHandle(np.array([value]), tl.int1), tl.int1)
    return upstream._implicit_cvt(value)


def _run_every_config(tuner: Autotuner, *args: Any, **kwargs: Any) -> None:
    """Replaces `Autotuner.run`: runs each configuration that would be timed, on equal inputs."""
    tuner.nargs = dict(zip(tuner.arg_names, args))
    configs = tuner.prune_configs(kwargs)
    for config in configs:
        values = {**tuner.nargs, **kwargs, **config.all_kwargs()}
        if config.pre_hook:
            config.pre_hook(values)
        last = config is configs[-1]
        # a user's hook may not have the parameter reset_only
        tuner.pre_hook(values, **({"reset_only": True} if last else {}))
        tuner.fn.run(*args, **kwargs, **config.all_kwargs())
        if not last:
            tuner.post_hook(values, exception=None)
    tuner.nargs = None


_functions: WeakKeyDictionary[FunctionType, Callable[..., Any]] = WeakKeyDictionary()


def _runnable(function: FunctionType) -> Callable[..., Any]:
    """Converts the function of a kernel such that Python runs it with the semantics of Triton."""
    if function not in _functions:
        _functions[function] = _rewrite(function)
    return _functions[function]


def _rewrite(function: FunctionType) -> Callable[..., Any]:
    lines, first_line = inspect.getsourcelines(function)
    tree = ast.parse(textwrap.dedent("".join(lines)))
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list = []
    # an outer function provides captured variables, and leaves the globals of the module unchanged
    cells = zip(function.__code__.co_freevars, function.__closure__ or ())
    captured = {"_statement": _Statement, **{name: cell.cell_contents for name, cell in cells}}
    around = ast.parse(f"def factory({', '.join(captured)}):\n  return {function.__name__}")
    factory = around.body[0]
    assert isinstance(factory, ast.FunctionDef)
    factory.body.insert(0, _StatementCalls().visit(definition))
    # errors show the line of the kernel
    ast.increment_lineno(around, first_line - 1)
    code = compile(ast.fix_missing_locations(around), function.__code__.co_filename, "exec")
    namespace: dict[str, Any] = {}
    exec(code, function.__globals__, namespace)
    return namespace["factory"](**captured)


class _Statement:
    """Statements with a different meaning in a kernel than in Python."""

    @staticmethod
    def assign(value: Any) -> Any:
        return semantic.to_tensor(value, False)

    @staticmethod
    def both(left: Any, right: Callable[[], Any]) -> Any:
        return left.logical_and(right()) if _is_block(left) else left and right()

    @staticmethod
    def either(left: Any, right: Callable[[], Any]) -> Any:
        return left.logical_or(right()) if _is_block(left) else left or right()

    @staticmethod
    def negate(value: Any) -> Any:
        return value.__not__() if _is_block(value) else not value


def _is_block(value: Any) -> bool:
    return isinstance(value, tl.tensor) and bool(value.shape)


class _StatementCalls(ast.NodeTransformer):
    """Replaces assignments, `and`, `or` and `not` by calls of `_Statement`."""

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        self.generic_visit(node)
        node.value = self._call("assign", node.value)
        return node

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        self.generic_visit(node)
        name = "both" if isinstance(node.op, ast.And) else "either"
        no_parameters = ast.arguments([], [], None, [], [], None, [])
        result = node.values[0]
        for value in node.values[1:]:
            result = self._call(name, result, ast.Lambda(no_parameters, value))
        return ast.copy_location(result, node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        self.generic_visit(node)
        if not isinstance(node.op, ast.Not):
            return node
        return ast.copy_location(self._call("negate", node.operand), node)

    def _call(self, name: str, *args: ast.expr) -> ast.Call:
        function = ast.Attribute(ast.Name("_statement", ast.Load()), name, ast.Load())
        return ast.Call(function, list(args), [])
