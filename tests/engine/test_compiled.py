"""Backbones compiled by torch.compile, and batches cut into chunks of the compiled size."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference_models import hf_pair, hf_resnet, images
from tolerance import assert_equals_upstream
from torch import Tensor
from torch._dynamo.utils import counters

from fastbb.engine import cpu
from fastbb.engine.compiled import compile_maps, in_chunks, local_inductor_options, own_code
from fastbb.engine.computation import BackboneMaps
from fastbb.engine.cpu import even_part, has_arithmetic
from fastbb.engine.memory import tensor_memory
from fastbb_kernels import machine

N = 4


class Calls:
    """A run of two maps that records the number of images of each call."""

    def __init__(self, only: int | None = None) -> None:
        self.sizes: list[int] = []
        self.only = only

    def __call__(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        assert self.only in (None, len(pixel_values))
        self.sizes.append(len(pixel_values))
        return two_maps(pixel_values)


def two_maps(pixel_values: Tensor) -> tuple[Tensor, ...]:
    return pixel_values + 1, pixel_values[:, :1, ::2]


def numbered(batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Images that are all different."""
    return torch.arange(batch * 3 * 4 * 4).reshape(batch, 3, 4, 4).to(dtype)


# chunks


@pytest.mark.parametrize(
    ("batch", "compiled", "eager"),
    [
        (0, [], [0]),
        (1, [], [1]),  # less than half
        (2, [4], []),  # filled up
        (3, [4], []),
        (4, [4], []),
        (5, [4], [1]),
        (6, [4, 4], []),
        (8, [4, 4], []),
        (13, [4, 4, 4], [1]),
        (15, [4, 4, 4, 4], []),
    ],
    ids=str,
)
def test_the_last_chunk_is_padded_or_runs_eager(
    batch: int, compiled: list[int], eager: list[int]
) -> None:
    run, other = Calls(only=N), Calls()
    maps = in_chunks(run, N, other)(numbered(batch))
    assert (run.sizes, other.sizes) == (compiled, eager)
    for got, want in zip(maps, two_maps(numbered(batch))):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("batch", "sizes"), [(0, [0]), (3, [3]), (4, [4]), (9, [4, 4, 1])], ids=str
)
def test_the_last_chunk_may_be_smaller(batch: int, sizes: list[int]) -> None:
    run = Calls()
    maps = in_chunks(run, N)(numbered(batch))
    assert run.sizes == sizes
    for got, want in zip(maps, two_maps(numbered(batch))):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_padding_keeps_dtype_and_pixels(dtype: torch.dtype) -> None:
    pixels = numbered(3, dtype)
    before = pixels.clone()
    (got, _) = in_chunks(Calls(only=N), N, Calls())(pixels)
    assert got.dtype == dtype and torch.equal(got, before + 1) and torch.equal(pixels, before)


# number of images at once


def images_at_once(run: Callable[[Tensor], Any], images: Tensor) -> int:
    batch = len(images)
    return batch if batch < 2 else even_part(batch, tensor_memory(run, images[:1]).largest)


def test_parts_keep_every_tensor_below_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "KEPT_BYTES", 3 * 1000)
    sizes: list[int] = []

    def run(pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Makes an intermediate tensor of 1000 bytes per image, and a small result."""
        sizes.append(len(pixel_values))
        return (F.pad(pixel_values, (0, 240))[:, :1] * 2,)

    batches = [(0, 0), (1, 1), (2, 2), (3, 3), (4, 2), (5, 3), (7, 3), (8, 3), (16, 3)]
    for batch, at_once in batches:
        assert images_at_once(run, torch.ones(batch, 10)) == at_once
    assert sizes == [1, 1] * (len(batches) - 2)  # one image where there is a question


@pytest.mark.parametrize(
    ("kept", "batch", "at_once"),
    [(6, 8, 4), (7, 8, 4), (5, 12, 4), (1, 3, 1), (0, 3, 1), (99, 9, 9)],
)
def test_parts_are_about_equal_and_of_at_least_one_image(
    kept: int, batch: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "KEPT_BYTES", 40 * kept)
    assert images_at_once(lambda x: (x + 1,), torch.ones(batch, 10)) == at_once


# arithmetic of a CPU


@pytest.fixture
def cpuinfo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Replaces /proc/cpuinfo by a text, or removes it."""
    file = tmp_path / "cpuinfo"
    monkeypatch.setattr(machine, "_CPU_INFO", file)

    def report(text: str) -> None:
        file.write_text(text)
        machine.cpu_flags.cache_clear()

    machine.cpu_flags.cache_clear()
    yield report
    machine.cpu_flags.cache_clear()


@pytest.mark.parametrize(
    ("line", "bf16", "fp16"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16", True, False),
        ("flags : amx_bf16 avx512_fp16", True, True),
        ("Features\t: fp asimd asimdhp bf16", True, True),
        ("flags : avx2 avx512f avx512bw avx512_vnni f16c", False, False),
        ("bugs : bf16 asimdhp", False, False),
        ("", False, False),
    ],
)
def test_has_arithmetic_follows_the_cpu_flags(
    line: str, bf16: bool, fp16: bool, cpuinfo: Callable[[str], None]
) -> None:
    cpuinfo(f"processor : 0\nmodel name : some CPU\n{line}\n\nprocessor : 1\n")
    assert has_arithmetic(torch.bfloat16) == bf16 and has_arithmetic(torch.float16) == fp16
    assert has_arithmetic(torch.float32) and has_arithmetic(torch.float64)


def test_has_no_bf16_arithmetic_without_cpu_flags(cpuinfo: Any) -> None:
    assert machine.cpu_flags() == frozenset()
    assert not has_arithmetic(torch.bfloat16) and has_arithmetic(torch.float32)


# the compiler


def test_own_code_copies_a_function_with_its_code_object() -> None:
    def function(x: int, y: int = 2, *, z: int = 3) -> tuple[int, ...]:
        return x, y, z, N

    one, other = own_code(function), own_code(function)
    assert one(1) == function(1) and other(1, z=0) == function(1, z=0)
    assert len({function.__code__.__hash__(), id(one.__code__), id(other.__code__)}) == 3


def test_compiler_options_are_restored_after_the_block() -> None:
    from torch._inductor import config

    before = config.freezing
    with local_inductor_options():
        assert config.freezing
    assert config.freezing == before


@torch.no_grad()
def test_inductor_equals_upstream_for_every_batch() -> None:
    """One compiled shape; other batch sizes are cut into chunks, padded, or run eager."""
    upstream = hf_resnet(depths=(1,), hidden_sizes=[16], out_indices=[0, 1])
    pair = hf_pair(upstream)
    n_graphs = counters["stats"]["unique_graphs"]
    # the example may have another memory layout than later pixels
    laid_out = images(64, 64, N).contiguous(memory_format=torch.channels_last)
    run = compile_maps(BackboneMaps(pair.ours), laid_out)
    assert counters["stats"]["unique_graphs"] == n_graphs + 1
    for seed in range(2):
        pixels = images(64, 64, N, seed=seed)
        assert_equals_upstream(run(pixels), pair.maps(pixels))
        laid_out = pixels.contiguous(memory_format=torch.channels_last)
        assert_equals_upstream(run(laid_out), pair.maps(pixels))
    with torch.inference_mode():
        assert_equals_upstream(run(images(64, 64, N)), pair.maps(images(64, 64, N)))
    chunked = in_chunks(run, N, lambda x: pair.ours(x).feature_maps)
    for batch in (1, 3, 5, 7):
        pixels = images(64, 64, batch)
        assert_equals_upstream(chunked(pixels), pair.maps(pixels))
    assert counters["stats"]["unique_graphs"] == n_graphs + 1

    prepared = pair.ours.prepare("compile", example=(3, 64, 64))
    for batch in (3, 2, 4, 1):
        pixels = images(64, 64, batch)
        assert_equals_upstream(prepared(pixels).feature_maps, pair.maps(pixels))
    assert {row.runs for row in prepared.explain().rows} == {"compile, 3 images at once"}
    assert counters["stats"]["unique_graphs"] == n_graphs + 2
