"""`record_launches`: kernels, their arguments, and the least number of bytes they move."""
# Triton types constants as `tl.constexpr`, and callers pass numbers
# pyright: reportArgumentType=false

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from fastbb_kernels import _dispatch, linear_residual, use_impl
from fastbb_kernels.op import find_op
from fastbb_kernels.recorder import TensorArgument, record_launches


@triton.jit
def _add_fwd_kernel(x_ptr, y_ptr, out_ptr, n_elements, BLOCK: tl.constexpr, alpha=1.0):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n_elements
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    if y_ptr is not None:
        x += alpha * tl.load(y_ptr + offsets, mask=mask, other=0.0)
    tl.store(out_ptr + offsets, x, mask=mask)


@triton.autotune([triton.Config({"BLOCK": 64}), triton.Config({"BLOCK": 128})], key=["n_elements"])
@triton.jit
def _tuned_fwd_kernel(x_ptr, n_elements, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + offsets, 0.0, mask=offsets < n_elements)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def add(x: Tensor, y: Tensor | None, block: int = 64, **options) -> Tensor:
    out = torch.empty_like(x)
    _add_fwd_kernel[lambda meta: (triton.cdiv(x.numel(), meta["BLOCK"]), 2)](
        x, y, out, x.numel(), BLOCK=block, **options
    )
    return out


def test_recorded_launch_has_grid_constants_scalars_and_tensors() -> None:
    x, y = meta(10, 20, dtype=torch.bfloat16), meta(20, 10).T
    with record_launches() as recording:
        add(x, y, block=32, num_warps=8)
    (launch,) = recording.launches
    assert launch.name == "_add_fwd_kernel"
    assert launch.grid == (7, 2, 1), "the lambda sees BLOCK and the arguments"
    assert launch.constexprs == {"BLOCK": 32}
    assert launch.scalars == {"n_elements": 200, "alpha": 1.0}, "defaults included"
    assert list(launch.tensors) == ["x_ptr", "y_ptr", "out_ptr"]
    assert launch.tensors["y_ptr"] == TensorArgument.of(y)
    assert launch.tensors["y_ptr"].stride == (1, 10)
    assert launch.tensors["x_ptr"].dtype == torch.bfloat16
    assert (launch.num_warps, launch.num_stages) == (8, 3)


def test_record_launches_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_anything(*args, **kwargs) -> None:
        raise AssertionError("compiled")

    monkeypatch.setattr(JITFunction, "_do_compile", compile_anything)
    with record_launches() as recording:
        add(meta(8), meta(8))
        _add_fwd_kernel.warmup(torch.float32, None, torch.float32, 8, 64, grid=(1,))
    assert len(recording.launches) == 1, "a warm-up launches nothing"
    assert recording.kernels == []
    with pytest.raises(ValueError, match="_add_fwd_kernel was recorded, not compiled"):
        _ = recording.launches[0].shared


def test_none_argument_is_recorded_as_a_constant() -> None:
    with record_launches() as recording:
        add(meta(8), None)
    assert recording.launches[0].constexprs == {"y_ptr": None, "BLOCK": 64}


def test_equal_specializations_mean_the_same_binary() -> None:
    x = torch.empty(129)
    with record_launches() as recording:
        add(x[:64], None)
        add(x[:128], None)  # another multiple of 16: the same
        add(x[:65], None)  # no multiple
        add(x[1:65], None)  # not aligned
        add(x[:64], None, num_warps=8)
        add(x[:64], None, block=32)
        add(x[:64].bfloat16(), None)
    first, *others = [launch.specialization for launch in recording.launches]
    assert [other == first for other in others] == [True, False, False, False, False, False]


def test_tensors_in_tuples_and_descriptors_have_names() -> None:
    x = meta(32, 16)
    with record_launches() as recording:
        descriptor = TensorDescriptor.from_tensor(x, [8, 8])
        _add_fwd_kernel[(1,)](descriptor, (x, 3), x, 8, 64)
    (launch,) = recording.launches
    assert list(launch.tensors) == ["x_ptr", "y_ptr[0]", "out_ptr"]
    assert launch.scalars["y_ptr[1]"] == 3
    assert len({tensor.storage for tensor in launch.tensors.values()}) == 1


@pytest.mark.parametrize(
    ("view", "n_elements"),
    [
        pytest.param(lambda x: x, 24, id="contiguous"),
        pytest.param(lambda x: x.T, 24, id="transposed"),
        pytest.param(lambda x: x[:, ::2], 12, id="strided"),
        pytest.param(lambda x: x[:0], 0, id="empty"),
        pytest.param(lambda x: x[:1, :1].expand(4, 6), 1, id="expanded"),
        pytest.param(lambda x: x[:, None].expand(4, 5, 6), 24, id="expanded in the middle"),
        pytest.param(lambda x: x[:, None, ::2].expand(4, 5, 3), 12, id="expanded and strided"),
        pytest.param(lambda x: x[0].unfold(0, 3, 1), 6, id="overlapping windows"),
    ],
)
def test_elements_of_a_view_count_once(view: Callable[[Tensor], Tensor], n_elements: int) -> None:
    x = view(torch.arange(24.0).reshape(4, 6))
    assert n_elements == len(set(x.flatten().tolist()))
    assert TensorArgument.of(x).n_elements == n_elements


def test_bytes_of_each_argument_count_once() -> None:
    x, bias = meta(16, 8, dtype=torch.bfloat16), meta(8)
    with record_launches() as recording:
        _add_fwd_kernel[(1,)](x, bias.expand(16, 8), x, 128, 64)
    (launch,) = recording.launches
    assert launch.n_bytes == recording.n_bytes == 2 * 16 * 8 * 2 + 8 * 4
    assert launch.tensors["x_ptr"].storage == launch.tensors["out_ptr"].storage


def test_a_public_op_records_its_launch_and_its_bytes() -> None:
    x, weight = meta(50, 96, dtype=torch.bfloat16), meta(64, 96, dtype=torch.bfloat16)
    bias, residual = meta(64, dtype=torch.bfloat16), meta(50, 64, dtype=torch.bfloat16)
    with use_impl("triton"), record_launches() as recording:
        y = linear_residual(x, weight, bias, residual)
    assert y.shape == residual.shape
    assert [launch.name for launch in recording.launches] == ["_linear_residual_fwd_kernel"]
    assert recording.n_bytes == find_op("linear_residual").n_bytes(x, weight, bias, residual)


@pytest.mark.parametrize("arch", [80, "gfx942"], ids=str)
def test_launchers_see_the_architecture(arch: int | str) -> None:
    with record_launches(arch):
        assert _dispatch.architecture(torch.device("meta")) == arch


@pytest.mark.parametrize("grid", [(1 << 31,), (1, 1 << 16), (1, 1, 1 << 16)], ids=str)
def test_a_grid_that_cuda_does_not_launch_is_refused(grid: tuple[int, ...]) -> None:
    x = meta(8)
    largest = tuple(size - 1 if size > 1 else 1 for size in grid)
    with record_launches() as recording:
        _add_fwd_kernel[largest](x, None, x, 8, 64)
        with pytest.raises(ValueError, match="_add_fwd_kernel: CUDA launches at most"):
            _add_fwd_kernel[grid](x, None, x, 8, 64)
    assert recording.launches[0].grid == (*largest, 1, 1)[:3]


def test_an_autotuned_kernel_is_refused_by_name() -> None:
    x = meta(8)
    with record_launches(), pytest.raises(NotImplementedError, match="_tuned_fwd_kernel: an auto"):
        _tuned_fwd_kernel[(1,)](x, 8)


def test_unknown_architecture_raises_value_error() -> None:
    with (
        pytest.raises(ValueError, match=r"one of \[80, 86.*'gfx942'\], got 91"),
        record_launches(91),
    ):
        pass


def test_nested_blocks_are_refused_and_errors_restore_triton() -> None:
    run = JITFunction.run
    with pytest.raises(RuntimeError, match="do not nest"):  # noqa: SIM117  (the inner one raises)
        with record_launches():
            with record_launches():
                pass
    assert JITFunction.run is run
    assert not _dispatch.launches_directly()
