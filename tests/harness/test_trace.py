"""`trace()`: bytes counted by hand, and errors for wrong accesses. Bugs: test_canaries.py."""
# pyright: reportArgumentType=false, reportCallIssue=false
# a launch passes plain values for constexpr parameters, and options of the compiler

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from buggy_kernels import _copy_rows_kernel, _linear_kernel
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastbb_kernels.testing import OutOfBounds, Race, TensorTrace, corners, interpret, trace
from fastbb_kernels.testing.tensor_view import TensorView


@triton.jit
def _copy_kernel(x_ptr, y_ptr, n, stride_x, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    x = tl.load(x_ptr + i * stride_x, mask=i < n, other=0.0)
    tl.store(y_ptr + i, x, mask=i < n)


@triton.jit
def _add_kernel(a_ptr, b_ptr, y_ptr, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(a_ptr + i) + tl.load(b_ptr + i))


@triton.jit
def _gather_kernel(x_ptr, index_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(x_ptr + tl.load(index_ptr + i)))


@triton.jit
def _tuple_kernel(tensors, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(tensors[1] + i, tl.load(tensors[0] + i))


@triton.jit
def _descriptor_kernel(x_desc, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i[:, None] * N + i[None, :], x_desc.load([0, 0]))


@triton.jit
def _block_pointer_kernel(x_ptr, y_ptr, n_rows, N: tl.constexpr):
    x = tl.make_block_ptr(x_ptr, (n_rows, N), (N, 1), (0, 0), (N, N), (1, 0))
    y = tl.make_block_ptr(y_ptr, (N, N), (N, 1), (0, 0), (N, N), (1, 0))
    tl.store(y, tl.load(x))


@triton.jit
def _count_kernel(y_ptr, x_ptr, HOW: tl.constexpr):
    i = tl.program_id(0)
    if HOW == "store after":
        tl.store(y_ptr, 0.0)
    tl.atomic_add(y_ptr, 1.0)
    if HOW == "load after" and i == 0:
        tl.store(x_ptr, tl.load(y_ptr))


@triton.jit
def _select_kernel(a_ptr, b_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(tl.where(i % 2 == 0, a_ptr + i, b_ptr + i), mask=i > 0, other=7.0))


def run_copy(x: Tensor, y: Tensor, n: int | None = None, stride: int = 1, block: int = 16) -> None:
    n = y.numel() if n is None else n
    _copy_kernel[(triton.cdiv(n, block),)](x, y, n, stride, N=block)


def traced(launch: Callable[[], object]) -> dict[str, TensorTrace]:
    with trace() as t:
        launch()
    return t.launches[-1].tensors


def test_bytes_of_a_linear_layer_equal_those_counted_by_hand() -> None:
    (n_rows, depth), n_cols = (19, 40), 40
    x, weight = torch.randn(n_rows, depth).bfloat16(), torch.randn(depth, n_cols).bfloat16()
    bias, y = torch.randn(n_cols), torch.empty(n_rows, n_cols).bfloat16()
    with trace() as t:
        _linear_kernel[(2, 2)](
            *(x, weight, bias, y, n_rows, n_cols, depth, depth),
            PRECISION="ieee",
            BUG="",
            BLOCK_M=16,
            BLOCK_N=32,
            BLOCK_K=16,
        )
    (launch,) = t.launches
    assert (launch.kernel, launch.grid, launch.n_programs) == ("_linear_kernel", (2, 2, 1), 4)
    got = launch.tensors
    # two tiles of columns read x, two tiles of rows read weight and bias
    assert got["x_ptr"].load.requested_bytes == 2 * x.nbytes
    assert got["weight_ptr"].load.requested_bytes == 2 * weight.nbytes
    assert got["bias_ptr"].load.requested_bytes == 2 * bias.nbytes
    assert got["y_ptr"].store.requested_bytes == y.nbytes
    for name, tensor in {"x_ptr": x, "weight_ptr": weight, "bias_ptr": bias}.items():
        assert got[name].load.unique_bytes == tensor.nbytes
        assert got[name].store.requested_bytes == got[name].store.unique_bytes == 0
    assert t.unique_bytes == x.nbytes + weight.nbytes + bias.nbytes + y.nbytes
    assert t.requested_bytes == 2 * (x.nbytes + weight.nbytes + bias.nbytes) + y.nbytes
    # four programs, three tiles of depth
    assert t.dot_flops == 4 * 3 * 2 * 16 * 32 * 16
    t.assert_written_once()


@pytest.mark.parametrize("offset, stride, sectors", [(0, 1, 2), (1, 1, 3), (0, 8, 16), (4, 16, 16)])
def test_strided_loads_count_every_touched_sector(offset: int, stride: int, sectors: int) -> None:
    # 16 fp32 are two sectors of 32 bytes if they lie together at a multiple of 32 bytes
    x, y = torch.randn(16 * stride + offset)[offset:], torch.empty(16)
    got = traced(lambda: run_copy(x, y, stride=stride))
    assert got["x_ptr"].load.sector_bytes == 32 * sectors
    assert got["x_ptr"].load.requested_bytes == got["x_ptr"].load.unique_bytes == 64


def test_gathered_lanes_count_each_sector_once() -> None:
    x, y = torch.randn(64), torch.empty(32)
    index = torch.tensor([63, 0, 62, 1] * 8)
    got = traced(lambda: _gather_kernel[(1,)](x, index, y, N=32))["x_ptr"].load
    assert (got.sector_bytes, got.unique_bytes, got.requested_bytes) == (64, 16, 128)


def test_access_to_a_neighbouring_tensor_is_out_of_bounds() -> None:
    pool = torch.zeros(60)
    x, y = pool[:20], pool[20:40]
    with pytest.raises(OutOfBounds) as caught:
        traced(lambda: run_copy(x, y, n=24))
    message = str(caught.value)
    assert message.startswith("_copy_kernel, program (1, 0, 0): load of x_ptr outside its view")
    assert "in 4 of 8 active lanes, the first at element 20" in message
    traced(lambda: run_copy(x, y))


def test_access_to_the_gaps_of_a_view_is_out_of_bounds() -> None:
    wide = torch.zeros(4, 16)
    with pytest.raises(OutOfBounds, match="store of y_ptr .* the first at element 12 "):
        traced(lambda: run_copy(torch.zeros(64), wide[:, :12], n=64))
    with pytest.raises(OutOfBounds, match="load of x_ptr .* the first at element 16 "):
        traced(lambda: run_copy(wide[1:2], torch.zeros(64), n=32))
    with pytest.raises(OutOfBounds, match="load of x_ptr .* the first at element -1 "):
        traced(lambda: run_copy(wide.view(-1)[32:], torch.zeros(2), stride=-1))


def test_load_from_an_empty_tensor_is_out_of_bounds() -> None:
    empty, y = torch.empty(0), torch.zeros(16)
    traced(lambda: _copy_kernel[(1,)](empty, empty, 0, 1, N=16))
    with pytest.raises(OutOfBounds, match="load of x_ptr .* in 1 of 1 active lanes"):
        traced(lambda: run_copy(empty, y, n=1))
    with trace() as t:
        run_copy(empty, empty)
    assert t.launches[0].n_programs == 0


def test_address_outside_every_tensor_is_out_of_bounds() -> None:
    x, y = torch.zeros(16), torch.zeros(16)
    with pytest.raises(OutOfBounds, match="load at address 0x[0-9a-f]+, which is in no argument"):
        traced(lambda: run_copy(x, y, stride=2**60))


@pytest.mark.filterwarnings("ignore:tl.make_block_ptr is deprecated")
def test_tuples_descriptors_and_block_pointers_are_traced() -> None:
    x, y = torch.randn(64), torch.empty(64)
    got = traced(lambda: _tuple_kernel[(1,)]((x, y), N=64))
    assert got["tensors.0"].load.unique_bytes == got["tensors.1"].store.unique_bytes == 256
    x, y = torch.randn(5, 8), torch.empty(8, 8)
    descriptor = TensorDescriptor.from_tensor(x, [8, 8])
    got = traced(lambda: _descriptor_kernel[(1,)](descriptor, y, N=8))
    # the padding of a descriptor is not read
    assert got["x_desc"].load.requested_bytes == x.nbytes and not y[5:].any()
    with pytest.raises(OutOfBounds, match="load of x_ptr .* in 24 of 64 active lanes"):
        traced(lambda: _block_pointer_kernel[(1,)](x, y, 8, N=8))


def test_aliased_arguments_count_their_memory_once() -> None:
    x, y = torch.randn(48), torch.empty(32)
    with trace() as t:
        _add_kernel[(2,)](x[:32], x[16:], y, N=16)
    got = t.launches[0].tensors
    assert got["a_ptr"].load.unique_bytes == got["b_ptr"].load.unique_bytes == 128
    assert t.unique_bytes == x.nbytes + y.nbytes and t.requested_bytes == 3 * 128
    with trace() as t:
        _add_kernel[(2,)](y, y, y, N=16)
    assert t.unique_bytes == 2 * y.nbytes  # read once and written once
    with pytest.raises(Race, match=r"program \(0, 0, 0\) loads element \(0,\) of b_ptr, which"):
        traced(lambda: _add_kernel[(2,)](x[:32], x[16:], x[:32], N=16))


def test_expanded_tensors_count_their_memory_once() -> None:
    x, y = torch.randn(1).expand(16), torch.empty(16)
    got = traced(lambda: run_copy(x, y, stride=0))["x_ptr"]
    assert (got.load.requested_bytes, got.load.unique_bytes) == (64, 4)


def test_bytes_of_launches_add_up_and_launches_do_not_race() -> None:
    x, y, z = torch.randn(32), torch.empty(32), torch.empty(32)
    with trace() as t:
        run_copy(x, y)
        run_copy(y, z)  # a program of a later launch may read it
        run_copy(y, x)
    assert len(t.launches) == 3 and t.unique_bytes == 6 * x.nbytes
    assert t.sector_bytes == t.requested_bytes == t.unique_bytes
    t.assert_written_once("y_ptr")


def test_atomics_race_only_with_other_accesses() -> None:
    y, x = torch.zeros(1), torch.zeros(3)
    got = traced(lambda: _count_kernel[(3,)](y, x, HOW=""))["y_ptr"]
    assert y.item() == 3 and got.n_rewritten == 1
    assert (got.load.requested_bytes, got.store.requested_bytes) == (12, 12)
    with pytest.raises(Race, match=r"both store element \(0,\) of y_ptr"):
        traced(lambda: _count_kernel[(3,)](y, x, HOW="store after"))
    with pytest.raises(Race, match=r"\(0, 0, 0\) loads element \(0,\) of y_ptr, .* \(2, 0, 0\)"):
        traced(lambda: _count_kernel[(3,)](y, x, HOW="load after"))


def test_programs_are_named_on_all_axes() -> None:
    y = torch.zeros(1)
    with pytest.raises(
        Race, match=r"programs \(0, 0, 0\) and \(0, 2, 3\) both store element \(0,\)"
    ):
        traced(lambda: _copy_kernel[(2, 3, 4)](y, y, 1, 1, N=1))


def test_one_access_may_reach_several_tensors() -> None:
    a, b, y = torch.randn(16), torch.randn(16), torch.empty(16)
    got = traced(lambda: _select_kernel[(1,)](a, b, y, N=16))
    assert got["a_ptr"].load.unique_bytes == 28 and got["b_ptr"].load.unique_bytes == 32
    assert y[0] == 7 and torch.equal(y[1::2], b[1::2]) and torch.equal(y[2::2], a[2::2])
    with pytest.raises(OutOfBounds, match="load of b_ptr .* in 4 of 8 active lanes"):
        traced(lambda: _select_kernel[(1,)](a, b[:8], y, N=16))


def test_unwritten_elements_are_reported_by_their_index() -> None:
    y = torch.zeros(4, 6)[:, :4].unflatten(1, (2, 2))
    with trace() as t:
        run_copy(torch.zeros(16), y, n=3)
    with pytest.raises(
        AssertionError, match=r"13 elements of y_ptr.* never; the first is \(0, 1, 1"
    ):
        t.assert_written_once()
    with pytest.raises(AssertionError, match="none of 1 launches stores to x_ptr"):
        t.assert_written_once("x_ptr")
    with trace() as t, pytest.raises(AssertionError, match="none of 0 launches stores to anything"):
        t.assert_written_once()


def test_trace_of_chosen_programs_or_of_addresses_alone() -> None:
    x, y = torch.ones(1024), torch.zeros(1024)
    with trace(programs=lambda grid: [(3, 0, 0), (grid[0] - 1, 0, 0)]) as t:
        run_copy(x, y)
    assert y.nonzero().flatten().tolist() == [*range(48, 64), *range(1008, 1024)]
    with pytest.raises(ValueError, match="2 programs of a grid of .64, 1, 1. ran"):
        t.assert_written_once()
    with trace(data=False) as t:
        run_copy(y, x)
    t.assert_written_once()
    assert x.eq(1).all()
    with pytest.raises(ValueError, match="y_ptr is on meta"), trace():
        run_copy(x, y.to("meta"))


def test_meta_tensors_are_traced_without_memory() -> None:
    x, y = torch.empty(2, 2**21, 4096, device="meta")
    with trace(programs=corners, data=False) as t:
        _copy_rows_kernel[(2**21,)](x, y, 4096, BUG="", N=4096)
    got = t.launches[0].tensors["y_ptr"]
    assert (got.n_unwritten, got.first_unwritten) == ((2**21 - 2) * 4096, (1, 0))
    below = r"\(2097151, 0, 0\): load of x_ptr .* the first at element -8589930496 "
    with pytest.raises(OutOfBounds, match=below), trace(programs=corners, data=False):
        _copy_rows_kernel[(2**21,)](x, y, -4096, BUG="", N=4096)


def test_corners_are_the_first_and_last_programs_of_each_axis() -> None:
    assert corners((5, 1, 2)) == [(0, 0, 0), (0, 0, 1), (4, 0, 0), (4, 0, 1)]
    assert corners((1, 1, 1)) == [(0, 0, 0)] and corners((3, 0, 1)) == []


def test_interpret_blocks_nest_and_nested_traces_are_refused() -> None:
    x, y = torch.ones(16), torch.zeros(16)
    with interpret(), trace() as t:
        with interpret():
            run_copy(x, y)
        with pytest.raises(RuntimeError, match="a trace is already active"), trace():
            pass
        with pytest.raises(OutOfBounds):
            run_copy(x, y, n=32)
        run_copy(x, y)
    assert len(t.launches) == 2
    with interpret():
        run_copy(x, y)
    assert len(t.launches) == 2


VIEWS = {
    "scalar": torch.zeros(()),
    "contiguous": torch.zeros(3, 4, 5),
    "transposed": torch.zeros(3, 4, 5).permute(2, 0, 1),
    "qkv": torch.zeros(5, 3, 2, 4)[:, 1],
    "every-other": torch.zeros(7, 6)[1::2, ::3],
    "expanded": torch.zeros(4, 1, 3).expand(4, 5, 3),
    "empty": torch.zeros(3, 0, 2),
    "sliding-window": torch.zeros(20).unfold(0, 6, 2),
    "sliding-with-gaps": torch.zeros(30).as_strided((4, 3), (5, 4)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_elements_of_views_are_ranked_by_offset(name: str) -> None:
    tensor = VIEWS[name]
    every = torch.arange(200).as_strided(tensor.shape, tensor.stride())
    offsets = sorted(set(every.flatten().tolist()))
    view = TensorView(tensor.shape, tensor.stride())
    assert view.n_elements == len(offsets)
    asked = torch.arange(-20, 200).numpy()
    want = [offsets.index(i) if i in offsets else -1 for i in range(-20, 200)]
    assert view.ranks(asked).tolist() == want
    for i, rank in zip(asked, want):
        assert view.holds_all(asked[asked == i]) == (rank >= 0)
        assert rank < 0 or every[view.index(rank)] == i
