"""`interpret()`: language constructs that Python or Triton's interpreter treats differently."""
# pyright: reportArgumentType=false, reportCallIssue=false
# a launch passes plain values for constexpr parameters, and options of the compiler

from collections import namedtuple
from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastbb_kernels.testing import interpret

Pair = namedtuple("Pair", ["x_ptr", "offset"])


@pytest.fixture(autouse=True)
def interpreted() -> Iterator[None]:
    with interpret():
        yield


@triton.jit
def _logic_kernel(a_ptr, b_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(a_ptr + i), tl.load(b_ptr + i)
    # of whole tiles, whose truth value Python would need
    y = (a > 0 and b > 0) or not (a < b)
    tl.store(y_ptr + i, y)


def test_and_or_not_of_tiles_are_elementwise() -> None:
    a, b = torch.randn(64), torch.randn(64)
    y = torch.empty(64, dtype=torch.bool)
    _logic_kernel[(1,)](a, b, y, N=64)
    assert torch.equal(y, ((a > 0) & (b > 0)) | ~(a < b))


@triton.jit
def _short_circuit_kernel(y_ptr, N: tl.constexpr, x_ptr=None):
    # evaluating the right side would raise an error
    if x_ptr is not None and tl.load(x_ptr) > 0:
        tl.store(y_ptr, 2.0)
    if not N > 3 or x_ptr is None:
        tl.store(y_ptr, 1.0)


def test_and_or_not_of_constants_short_circuit() -> None:
    y = torch.zeros(1)
    _short_circuit_kernel[(1,)](y, N=4)
    assert y.item() == 1


@triton.jit
def _extremes_kernel(x_ptr, y_ptr, i_ptr, M: tl.constexpr, N: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(x_ptr + m[:, None] * N + n[None, :])
    largest, at = tl.max(x, 1, return_indices=True)
    tl.store(y_ptr + m, largest)
    tl.store(i_ptr + m, at)
    tl.store(y_ptr + M, tl.min(x))
    tl.store(y_ptr + M + 1, tl.max(x - tl.min(x, 1, keep_dims=True)))
    tl.store(i_ptr + M, tl.argmin(tl.min(x, 0), 0))


def test_argmax_takes_the_first_of_equal_values_and_ignores_nan() -> None:
    x = torch.randint(-4, 4, (8, 32)).float()
    y, i = torch.empty(10), torch.empty(9, dtype=torch.int32)
    for skipped in (0, 1):
        if skipped:
            x[:, 0] = float("nan")
        rest = x[:, skipped:]
        _extremes_kernel[(1,)](x, y, i, M=8, N=32)
        assert torch.equal(y[:8], rest.amax(1))
        assert torch.equal(i[:8].long(), rest.argmax(1) + skipped)
        assert y[8] == rest.min() and i[8] == rest.amin(0).argmin() + skipped
        assert y[9] == (rest - rest.amin(1, keepdim=True)).max()


@triton.jit
def _welford_combine(mean_a, m2_a, n_a, mean_b, m2_b, n_b):
    n = n_a + n_b
    delta = mean_b - mean_a
    return mean_a + delta * n_b / n, m2_a + m2_b + delta * delta * n_a * n_b / n, n


@triton.jit
def _variance_kernel(x_ptr, y_ptr, M: tl.constexpr, N: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(x_ptr + m[:, None] * N + n[None, :])
    _, m2, count = tl.reduce((x, x * 0, x * 0 + 1), 1, _welford_combine)
    tl.store(y_ptr + m, m2 / count)


def test_reduce_with_a_custom_combine_function_equals_torch() -> None:
    x, y = torch.randn(16, 128) + 5, torch.empty(16)
    _variance_kernel[(1,)](x, y, M=16, N=128)
    torch.testing.assert_close(y, x.var(1, correction=0))


@triton.jit
def _sums_kernel(x_ptr, total_ptr, running_ptr, AXIS: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i[:, None] * N + i[None, :])
    tl.store(total_ptr + i, tl.sum(x, AXIS))
    tl.store(running_ptr + i[:, None] * N + i[None, :], tl.cumsum(x, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32], ids=str)
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_sum_and_cumsum_equal_torch(axis: int, dtype: torch.dtype) -> None:
    x = torch.randint(-9, 9, (16, 16)).to(dtype)
    total, running = torch.empty(16, dtype=dtype), torch.empty(16, 16, dtype=dtype)
    _sums_kernel[(1,)](x, total, running, AXIS=axis, N=16)
    assert torch.equal(total, x.sum(axis).to(dtype)) and torch.equal(running, x.cumsum(1).to(dtype))


@triton.jit
def _fp16_sum_kernel(x_ptr, y_ptr, N: tl.constexpr):
    tl.store(y_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, N)), 0))


def test_sums_of_fp16_round_at_each_step() -> None:
    # 2048 + 1 is not in fp16; numpy would add in fp32 and round once
    x = torch.ones(2048, dtype=torch.float16)
    x[0] = x[1] = 2048
    y = torch.empty(1, dtype=torch.float16)
    _fp16_sum_kernel[(1,)](x, y, N=2048)
    tree = x
    while tree.numel() > 1:
        tree = tree[0::2] + tree[1::2]
    assert y.item() == tree.item() != x.float().sum().half().item()


@triton.jit
def _arguments_kernel(pair, y_ptr, flag, nothing, TYPE: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(pair.x_ptr + i + pair.offset)
    if flag and nothing is None:
        x = -x
    tl.store(y_ptr + i, x.to(TYPE))


def test_tuple_none_dtype_and_constexpr_arguments_are_passed() -> None:
    x, y = torch.randn(40), torch.empty(32, dtype=torch.float16)
    _arguments_kernel[lambda meta: (meta["N"] // 32,)](
        Pair(x, 8), y, True, None, TYPE=tl.float16, N=32, num_warps=2
    )
    assert torch.equal(y, -x[8:].half())
    with pytest.raises(TypeError, match="missing a required argument: 'nothing'"):
        _arguments_kernel[(1,)](Pair(x, 8), y, True, TYPE=tl.float16, N=32)


@triton.jit
def _descriptor_kernel(x_desc, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = x_desc.load([tl.program_id(0) * N, 0])
    tl.store(y_ptr + (tl.program_id(0) * N + i[:, None]) * N + i[None, :], x)


@triton.jit
def _block_pointer_kernel(x_ptr, y_ptr, n_rows, n_cols, N: tl.constexpr):
    x = tl.make_block_ptr(x_ptr, (n_rows, n_cols), (n_cols, 1), (0, 0), (N, N), (1, 0))
    y = tl.make_block_ptr(y_ptr, (N, N), (N, 1), (0, 0), (N, N), (1, 0))
    tl.store(y, tl.load(x, boundary_check=(0, 1), padding_option="zero"))


@pytest.mark.filterwarnings("ignore:tl.make_block_ptr is deprecated")
def test_descriptors_and_block_pointers_pad_with_zeros() -> None:
    x, y = torch.randn(5, 8), torch.empty(16, 8)
    padded = torch.zeros(16, 8)
    padded[:5] = x
    _descriptor_kernel[(2,)](TensorDescriptor.from_tensor(x, [8, 8]), y, N=8)
    assert torch.equal(y, padded)
    _block_pointer_kernel[(1,)](x[:, :7].contiguous(), y, 5, 7, N=8)
    assert torch.equal(y[:5, :7], x[:, :7]) and not y[5:8].any() and not y[:5, 7].any()


@triton.jit
def _atomic_kernel(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.atomic_add(y_ptr + i % 4, tl.load(x_ptr + tl.program_id(0) * N + i))


def test_atomic_adds_of_all_programs_add_up() -> None:
    x, y = torch.randint(0, 9, (3, 16)).float(), torch.zeros(4)
    _atomic_kernel[(3,)](x, y, N=16)
    assert torch.equal(y, x.view(-1, 4).sum(0))


@triton.jit
def _loop_kernel(x_ptr, y_ptr, n, STEP: tl.constexpr):
    i = tl.arange(0, STEP)
    acc = tl.zeros([STEP], tl.float32)
    for start in range(0, n, STEP):
        acc += tl.load(x_ptr + start + i, mask=start + i < n, other=0.0)
    for _ in tl.static_range(2):  # pyright: ignore[reportGeneralTypeIssues] - the compiler iterates
        acc *= 2
    left = n
    while left > STEP:
        left -= STEP
    tl.store(y_ptr + i, acc + left)


def test_for_static_range_and_while_loops_equal_python() -> None:
    x, y = torch.randn(40), torch.empty(16)
    _loop_kernel[(1,)](x, y, 40, STEP=16)
    want = 4 * torch.cat([x, torch.zeros(8)]).view(3, 16).sum(0) + 8
    torch.testing.assert_close(y, want)


def kernel_around(factor: tl.constexpr) -> triton.JITFunction:
    @triton.jit
    def _captured_kernel(x_ptr):
        tl.store(x_ptr, tl.load(x_ptr) * factor)

    return _captured_kernel


def scaled(kernel: triton.JITFunction) -> float:
    x: Tensor = torch.ones(1)
    kernel[(1,)](x)
    return x.item()


def test_kernels_read_constexprs_of_their_closure() -> None:
    twice, thrice = kernel_around(tl.constexpr(2)), kernel_around(tl.constexpr(3))
    assert (scaled(twice), scaled(thrice), scaled(twice)) == (2, 3, 2)


@triton.heuristics({"EVEN": lambda args: args["n"] % 16 == 0})
@triton.jit
def _heuristic_kernel(y_ptr, n, EVEN: tl.constexpr):
    tl.store(y_ptr, 1.0 if EVEN else 0.0)


@pytest.mark.parametrize("n", [32, 33])
def test_heuristics_set_the_constexpr(n: int) -> None:
    y = torch.empty(1)
    _heuristic_kernel[(1,)](y, n)
    assert y.item() == (n == 32)


@triton.jit
def _broadcast_pointer_kernel(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(tl.broadcast_to((x_ptr + i)[None, :], (N, N)))
    tl.store(tl.broadcast_to(y_ptr + i[:, None], (N, N)), x, mask=i[None, :] == 3)


def test_broadcast_pointers_load_the_same_element() -> None:
    x, y = torch.randn(8), torch.empty(8)
    _broadcast_pointer_kernel[(1,)](x, y, N=8)
    assert torch.equal(y, x[3].expand(8))
