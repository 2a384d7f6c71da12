"""Pins of Triton's internals: names and signatures that `interpret` replaces or calls.

A failure here after an upgrade of triton says what changed, before other tests fail for reasons
that are hard to see.
"""

import inspect
from typing import Any

import pytest
import triton
import triton.language as tl
from triton import knobs
from triton._C.libtriton import interpreter as native
from triton._C.libtriton import ir
from triton.language import semantic
from triton.language.extra import libdevice
from triton.language.extra.cuda import libdevice as cuda_libdevice
from triton.runtime import autotuner, interpreter, jit
from triton.tools import tensor_descriptor

from fastbb_kernels.testing.numpy_builder import NumpyBuilder

# the floor of pyproject.toml, and the pin of constraints.txt
VERSIONS = ("3.6.", "3.8.")

# operations that numpy_builder.py overrides are compared in another test
SIGNATURES = {
    # interpreter.py: _patched
    "interpreter._LangPatchScope.set_attr": "(self, obj, name, value)",
    "interpreter._LangPatchScope.restore": "(self)",
    "interpreter._patch_lang": "(fn)",
    "interpreter._patch_builtin": "(pkg, builder, scope)",
    "interpreter._get_np_dtype": "(tt_dtype)",
    "jit.JITFunction.run": "(self, *args, grid, warmup, **kwargs)",
    "jit.JITFunction.__call__": "(self, *args, **kwargs)",
    "tl.tensor.__init__": "(self, handle, type)",
    "tl.block_type.__init__": "(self, element_ty, shape)",
    "tl.core.reduce": (
        "(input, axis, combine_fn, keep_dims=False, _semantic=None, _generator=None)"
    ),
    # interpreter.py: _launch, _argument
    "interpreter.InterpreterBuilder.set_grid_dim": "(self, nx, ny, nz)",
    "interpreter.InterpreterBuilder.set_grid_idx": "(self, x, y, z)",
    "interpreter._implicit_cvt": "(arg)",
    "interpreter._tuple_create": "(arg, contents)",
    "interpreter.TensorHandle": "(data, dtype, attr=<factory>)",
    "jit.mangle_type": "(arg, specialize=False)",
    "tl.str_to_ty": "(name, c)",
    "semantic.TritonSemantic": "(builder)",
    "semantic.TritonSemantic.to_tensor": "(self, x, check_type=True)",
    "semantic.TritonSemantic.make_tensor_descriptor": (
        "(self, base, shape, strides, block_shape, padding_option='zero')"
    ),
    # interpreter.py: _run_every_config
    "autotuner.Autotuner.run": "(self, *args, **kwargs)",
    "autotuner.Autotuner.prune_configs": "(self, kwargs)",
    "autotuner.Config.all_kwargs": "(self)",
}

PRESENT = [
    *("interpreter.interpreter_builder", "interpreter.interpreter_semantic"),
    *("jit.KernelParam.is_constexpr", "jit.TensorWrapper"),
    *("tl.standard._sum_combine", "tl.standard._elementwise_max", "tl.standard._elementwise_min"),
    *("tl.reduce", "tl.tensor.reduce", "knobs.runtime.interpret"),
    *("native.load", "native.store", "native.atomic_rmw", "native.atomic_cas"),
    *("ir.ROUNDING_MODE.RTZ", "ir.INPUT_PRECISION.IEEE"),
    *("ir.INPUT_PRECISION.TF32", "ir.INPUT_PRECISION.TF32x3"),
    *("interpreter.InterpreterBuilder.ir_rmw_op_to_interpreter_rmw_op",),
    *("interpreter.InterpreterBuilder.ir_sem_to_interpreter_sem",),
    *("libdevice.erf", "cuda_libdevice.erf", "tensor_descriptor.TensorDescriptor"),
]

MODULES = {
    "autotuner": autotuner,
    "cuda_libdevice": cuda_libdevice,
    "interpreter": interpreter,
    "ir": ir,
    "jit": jit,
    "knobs": knobs,
    "libdevice": libdevice,
    "native": native,
    "semantic": semantic,
    "tensor_descriptor": tensor_descriptor,
    "tl": tl,
}

WHERE = "see fastbb_kernels/testing/interpreter.py and numpy_builder.py for its use"


def find(name: str) -> Any:
    module, *attributes = name.split(".")
    found: Any = MODULES[module]
    for attribute in attributes:
        assert hasattr(found, attribute), f"triton {triton.__version__} has no {name}: {WHERE}"
        found = getattr(found, attribute)
    return found


def signature(function: Any) -> str:
    """Parameters and their defaults; annotations do not matter to callers."""
    parameters = inspect.signature(function).parameters.values()
    return str(inspect.Signature([p.replace(annotation=p.empty) for p in parameters]))


def test_triton_version_is_a_tested_one() -> None:
    assert triton.__version__.startswith(VERSIONS), (
        f"the harness was tested with triton {VERSIONS}, this is {triton.__version__}: the other "
        "tests of this file say what to repair; then change VERSIONS and constraints.txt"
    )


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_is_unchanged(name: str) -> None:
    got = signature(find(name))
    assert got == SIGNATURES[name], f"triton {triton.__version__}: {name}{got}: {WHERE}"


@pytest.mark.parametrize("name", PRESENT)
def test_name_exists_in_triton(name: str) -> None:
    find(name)


@pytest.mark.parametrize(
    "name", [n for n in vars(NumpyBuilder) if n.startswith(("create", "cast"))]
)
def test_overridden_operation_has_the_signature_of_triton(name: str) -> None:
    upstream = find(f"interpreter.InterpreterBuilder.{name}")
    ours = signature(getattr(NumpyBuilder, name))
    assert signature(upstream) == ours, (
        f"triton {triton.__version__}: InterpreterBuilder.{name}{signature(upstream)}, "
        f"ours is {ours}: {WHERE}"
    )


def test_interpreter_options_are_unchanged() -> None:
    options = interpreter.InterpreterOptions(debug=True, sanitize_overflow=False)
    assert options.default_dot_input_precision == "tf32", f"another default precision: {WHERE}"
    assert {"tf32", "tf32x3", "ieee"} == set(options.allowed_dot_input_precisions), WHERE


def test_initial_state_of_tritons_objects_is_unchanged() -> None:
    @triton.jit
    def _kernel(x_ptr, N: tl.constexpr):
        pass

    assert interpreter._LangPatchScope()._changes == [], WHERE
    assert [(p.name, p.is_constexpr) for p in _kernel.params] == [("x_ptr", False), ("N", True)]
    assert list(_kernel.signature.parameters) == ["x_ptr", "N"], WHERE
    assert _kernel.pre_run_hooks == [] and _kernel.fn.__name__ == _kernel.__name__ == "_kernel"
    tuner = autotuner.Autotuner(_kernel, ["x_ptr"], [], [], None, None)
    assert tuner.arg_names == ["x_ptr"] and tuner.fn is _kernel and len(tuner.configs) == 1, WHERE
    assert list(inspect.signature(tuner.pre_hook).parameters) == ["kwargs", "reset_only"], WHERE
    assert list(inspect.signature(tuner.post_hook).parameters) == ["kwargs", "exception"], WHERE
