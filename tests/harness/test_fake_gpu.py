"""`fake_gpu`: production launches compile for an architecture without its GPU."""
# Triton types constants as `tl.constexpr`, and callers pass numbers
# pyright: reportArgumentType=false

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.driver import driver
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

from fastbb_kernels import _dispatch
from fastbb_kernels.architectures import ARCHITECTURES
from fastbb_kernels.pretend_gpu import LaunchError, fake_gpu
from fastbb_kernels.recorder import Recording, record_launches
from fastbb_kernels.testing.interpreter import interpret


@triton.jit
def _scale_fwd_kernel(x_ptr, y_ptr, n_elements, SCALE: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n_elements
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    tl.store(y_ptr + offsets, SCALE * x, mask=mask)


@triton.jit
def _gram_fwd_kernel(x_ptr, y_ptr, n_columns, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """y = x @ x.T for x [BLOCK, n_columns]; loads in flight occupy shared memory."""
    rows, k = tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    y = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, n_columns, BLOCK_K):
        x = tl.load(x_ptr + rows[:, None] * n_columns + start + k[None, :])
        y = tl.dot(x, tl.trans(x), y)
    tl.store(y_ptr + rows[:, None] * BLOCK + rows[None, :], y)


def scale(x: Tensor, block: int = 128, **options) -> Tensor:
    y = torch.full_like(x, 7.0)
    grid = (triton.cdiv(x.numel(), block),)
    _scale_fwd_kernel[grid](x, y, x.numel(), SCALE=2.0, BLOCK=block, **options)
    return y


def gram(**options) -> None:
    x = torch.empty(64, 1024, dtype=torch.bfloat16, device="meta")
    y = torch.empty(64, 64, device="meta")
    _gram_fwd_kernel[(1,)](x, y, 1024, BLOCK=64, BLOCK_K=128, **options)


def hashes(recording: Recording) -> list[str]:
    return [launch.kernel.hash for launch in recording.launches if launch.kernel]


@pytest.mark.parametrize("arch", ARCHITECTURES, ids=str)
def test_a_launch_compiles_for_the_architecture(arch: int | str) -> None:
    with fake_gpu(arch) as gpu:
        assert _dispatch.architecture(torch.device("cpu")) == arch
        scale(torch.empty(1000, device="meta"), num_warps=2)
    (launch,) = gpu.launches
    (kernel,) = gpu.kernels
    assert launch.kernel is kernel
    assert (launch.name, launch.grid, launch.num_warps) == ("_scale_fwd_kernel", (8, 1, 1), 2)
    assert launch.constexprs == {"SCALE": 2.0, "BLOCK": 128}
    assert launch.tensors["y_ptr"].shape == (1000,)
    assert (launch.shared, launch.num_stages) == (0, kernel.metadata.num_stages)
    assert kernel.metadata.target == ARCHITECTURES[arch].target
    if isinstance(arch, int):
        assert f".target sm_{arch}" in kernel.asm["ptx"]
        assert kernel.asm["cubin"].startswith(b"\x7fELF")
    else:
        assert f"--{arch}" in kernel.asm["amdgcn"]


def test_alignment_divisibility_and_dtype_decide_the_binary() -> None:
    x = torch.empty(129)
    with fake_gpu(80) as gpu:
        scale(x[:128])
        scale(torch.empty(128, device="meta"))
        scale(x[:112])
        scale(x[1:])
        scale(x[:127])
        scale(x[:128].half())
    aligned, on_meta, other_multiple_of_16, *others = hashes(gpu)
    assert aligned == on_meta == other_multiple_of_16
    assert len({aligned, *others}) == 4, "misaligned, an odd size, another dtype"
    assert [kernel.hash for kernel in gpu.kernels] == [aligned, *others]


def test_fake_gpu_runs_no_kernel_and_does_not_initialise_cuda(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def touch_cuda() -> None:
        raise AssertionError("torch.cuda was initialised")

    monkeypatch.setattr(torch.cuda, "_lazy_init", touch_cuda)
    x = torch.ones(128)
    with fake_gpu(80):
        y = scale(x)
    assert y.eq(7.0).all(), "the launcher's own fill"


def test_second_block_reuses_the_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(128)
    archs = (80, 90, "gfx942")
    for arch in archs:
        with fake_gpu(arch):
            scale(x)

    def compile_again(*args, **kwargs) -> None:
        raise AssertionError("compiled twice")

    monkeypatch.setattr(JITFunction, "_do_compile", compile_again)
    for arch in archs:
        with fake_gpu(arch) as gpu:
            scale(x)
        assert gpu.kernels[0].metadata.target.arch == arch, "each has its own cache"


def test_triton_warmup_compiles_without_a_launch() -> None:
    with fake_gpu(80) as gpu:
        kernel = _scale_fwd_kernel.warmup(torch.float32, torch.float32, 128, 2.0, 128, grid=(1,))
    assert kernel is not None
    assert kernel.metadata.target.arch == 80
    assert gpu.launches == []


def test_a_kernel_that_needs_too_much_shared_memory_is_refused_as_on_the_device() -> None:
    tile = 64 * 128 * 2
    with fake_gpu(80) as gpu:
        gram(num_stages=8)
    assert gpu.launches[0].shared == 7 * tile, "the eighth is being multiplied"
    with fake_gpu(86) as gpu:
        for _ in range(2):  # the second launch finds the kernel in the cache
            message = r"shared memory of _gram_fwd_kernel on sm_86, Required: 114688, .*: 101376"
            with pytest.raises(OutOfResources, match=message):
                gram(num_stages=8)
    assert gpu.launches == []


def test_too_many_threads_are_refused_as_on_the_device() -> None:
    message = "threads of _scale_fwd_kernel on gfx942, Required: 2048, Hardware limit: 1024"
    with fake_gpu("gfx942"), pytest.raises((OutOfResources, LaunchError), match=message):
        scale(torch.empty(4096), num_warps=32)


def test_compile_error_names_the_kernel() -> None:
    message = r"(?s)_scale_fwd_kernel on sm_90 \(.*test_fake_gpu\): Comp.*must be a power of 2"
    with fake_gpu(90), pytest.raises(LaunchError, match=message):
        scale(torch.empty(128), block=100)


def test_wrong_argument_error_names_the_kernel() -> None:
    with fake_gpu(90), pytest.raises(LaunchError, match="_scale_fwd_kernel on sm_90.*blocks"):
        scale(torch.empty(128), blocks=3)


def test_errors_inside_the_block_restore_triton() -> None:
    run, active = JITFunction.run, driver._active
    with pytest.raises(ZeroDivisionError), fake_gpu(90):
        _ = 1 / 0
    assert (JITFunction.run, driver._active) == (run, active)
    assert not _dispatch.launches_directly()
    with pytest.raises(ValueError, match="got 'sm_90'"), fake_gpu("sm_90"):
        pass


@pytest.mark.parametrize("outer", [fake_gpu, record_launches])
def test_nested_blocks_are_refused(outer) -> None:
    message = "do not nest: leave the outer block first"
    with outer(90) as recording:
        with pytest.raises(RuntimeError, match=message), fake_gpu(80):
            pass
        scale(torch.empty(128))
    assert recording.architecture.name == 90
    assert len(recording.launches) == 1, "the outer block goes on"
    with interpret(), pytest.raises(RuntimeError, match=message), fake_gpu(80):
        pass


def test_an_autotuned_kernel_is_refused_by_name() -> None:
    configs = [triton.Config({"BLOCK": block}) for block in (64, 128)]
    tuned = triton.autotune(configs, key=["n_elements"])(_scale_fwd_kernel)
    x = torch.empty(128)
    with fake_gpu(80), pytest.raises(NotImplementedError, match="_scale_fwd_kernel: an autotuner"):
        tuned[(1,)](x, x, 128, SCALE=2.0)
