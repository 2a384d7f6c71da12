"""`fastbb warmup` compiles the kernels of a model before it launches them."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import broken_kernels as broken
import pytest
import torch
from broken_kernels import self_check
from check_interrupts import foreground_signals
from cli_runner import cli_runner
from click.testing import Result
from pretended_device import gpu

from fastbb import AutoBackbone
from fastbb.cli import main, models
from fastbb.inspect import warmup
from fastbb_kernels import precompiling
from fastbb_kernels.architectures import ARCHITECTURES
from fastbb_kernels.precompiling import Compiled, Job, compile_jobs
from fastbb_kernels.self_check import use

MODEL = "nano-swin-digits"
TINY = (MODEL, "--size", "24x32", "--out-indices", "2")


def fastbb_warmup(*arguments: str) -> Result:
    return cli_runner().invoke(main, ["warmup", *arguments])


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Triton's cache, empty at first."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("triton")
        patch.setenv("TRITON_CACHE_DIR", str(folder))
        yield folder


@pytest.fixture(scope="module")
def warmed(cache: Path) -> Result:
    """Result of the first warm-up."""
    return fastbb_warmup(*TINY, "--batch", "1,2", "--arch", "90", "--workers", "2")


def counts(result: Result) -> tuple[int, int, int]:
    """Numbers of binaries: all, compiled, from the cache."""
    found = re.search(r"(\d+) binaries, (\d+) compiled and (\d+) from the cache", result.stdout)
    assert found is not None, result.output
    total, compiled, cached = map(int, found.groups())
    return total, compiled, cached


def test_warmup_compiles_and_prints_a_row_per_kernel(warmed: Result, cache: Path) -> None:
    assert warmed.exit_code == 0, warmed.output
    total, compiled, cached = counts(warmed)
    assert total == compiled >= 5 and cached == 0
    lines = warmed.stdout.splitlines()
    assert lines[0].split() == ["kernel", "binaries", "seconds"]
    rows = [line.split() for line in lines[1:-1]]
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    assert {"patch_embed", "linear_residual", "window_attention"} <= {row[0] for row in rows}
    assert sum(int(row[1]) for row in rows) == total
    assert re.fullmatch(r"sm_90: .*, in \d+\.\d s by 2 processes", lines[-1])
    assert len(list(cache.glob("*/*.cubin"))) == total


def test_second_warmup_takes_every_binary_from_the_cache(warmed: Result) -> None:
    again = fastbb_warmup(*TINY, "--batch", "2,1", "--arch", "90")
    total, _, _ = counts(warmed)
    assert again.exit_code == 0 and counts(again) == (total, 0, total)


FORWARD = """
import sys, torch
from triton import knobs
from fastbb import AutoBackbone
from fastbb_kernels import use_impl
from fastbb_kernels.testing import fake_gpu

hits = []
knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
backbone = AutoBackbone.from_pretrained(sys.argv[1], out_indices=(2,), dtype=torch.bfloat16)
with torch.no_grad(), use_impl("auto"), fake_gpu(90):
    for batch in (1, 2):
        backbone(torch.zeros(batch, 3, 24, 32, dtype=torch.bfloat16))
print(len(hits), sum(hits))
"""


def test_forward_pass_after_warmup_compiles_nothing(warmed: Result) -> None:
    """Runs in a new process, since Triton may hash kernels differently after interpreting them."""
    done = subprocess.run(
        [sys.executable, "-c", FORWARD, MODEL], capture_output=True, text=True, check=True
    )
    n_binaries = counts(warmed)[0]
    assert done.stdout.split() == [str(n_binaries)] * 2


def test_conv3x3_run_by_cudnn_is_not_compiled_but_its_epilogue_is() -> None:
    backbone = AutoBackbone.from_pretrained("nano-resnet-digits", dtype=torch.bfloat16).to("meta")
    for arch in (90, "gfx942"):
        kernels = {job.kernel for job in warmup.launched_by(backbone, [1], (32, 32), arch)}
        assert "conv3x3_bn_act" not in kernels and "bias_act" in kernels
        assert {"conv1x1_bn_act", "stem_conv_bn_relu_pool"} & kernels


def good_jobs() -> list[Job]:
    backbone = AutoBackbone.from_pretrained(MODEL, dtype=torch.bfloat16).to("meta")
    jobs = warmup.launched_by(backbone, [1], (24, 32), 90)
    return [job for job in jobs if job.kernel == "linear_residual"][:2]


def calling(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A job whose launch runs some code in the worker."""
    lines = "".join(f"        {line}\n" for line in code.splitlines())
    module = f"import os, time\nclass _K:\n    def __getitem__(self, grid):\n{lines}kernel = _K()\n"
    (folder / "kernel_of_a_test.py").write_text(module)
    monkeypatch.syspath_prepend(str(folder))
    request = ["kernel_of_a_test", "kernel", [1], {"tuple": []}, {"mapping": {}}]
    return Job("of_a_test", json.dumps(request))


@pytest.mark.usefixtures("cache")
def test_kernel_that_does_not_compile_is_reported_and_exits_with_1(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken_job, good = good_jobs()
    request = json.loads(broken_job.request)
    request[4]["mapping"]["BLOCK_N"] = 48  # no power of 2
    jobs = [Job("broken", json.dumps(request)), good]
    monkeypatch.setattr(warmup, "launched_by", lambda *_: jobs)
    result = fastbb_warmup(*TINY, "--arch", "90", "--workers", "1")
    assert result.exit_code == 1, result.output
    assert counts(result) == (2, 1, 0) or counts(result) == (2, 0, 1)
    assert ", 1 failed, in " in result.stdout
    (problem,) = [line for line in result.stdout.splitlines() if line.startswith("broken: ")]
    assert problem.startswith("broken: arange's range must be a power of 2 (_linear_residual_fwd")
    assert "on sm_90" in problem


@pytest.mark.usefixtures("cache")
def test_worker_that_dies_is_reported_and_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dying = calling("os.kill(os.getpid(), 9)", tmp_path, monkeypatch)
    first, second, third = compile_jobs([dying, *good_jobs()], 90, 1)
    assert first.problem == "the process that compiled it ended by signal 9, SIGKILL"
    assert first.kernel == "of_a_test" and second.problem is third.problem is None


def test_an_interruption_ends_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pid_file = tmp_path / "pid"
    code = f"open({str(pid_file)!r} + '~', 'w').write(str(os.getpid()))\n"
    code += f"os.rename({str(pid_file)!r} + '~', {str(pid_file)!r})\ntime.sleep(300)"
    slow = calling(code, tmp_path, monkeypatch)
    monkeypatch.setattr(warmup, "launched_by", lambda *_: [slow])

    def interrupt() -> None:
        while not pid_file.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), 2)

    thread = threading.Thread(target=interrupt)
    with foreground_signals():
        thread.start()
        result = fastbb_warmup(*TINY, "--arch", "90")
        thread.join()
    assert result.exit_code == 130 and "interrupted" in result.stderr
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


def test_text_printed_by_a_compiler_is_not_taken_for_a_reply(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = calling('print("hello")\nreturn lambda: None', tmp_path, monkeypatch)
    (compiled,) = compile_jobs([job], 90, 1)
    assert compiled.problem is None and not compiled.cached


def test_arguments_survive_the_encoding_for_a_worker() -> None:
    tensor = torch.empty(99, dtype=torch.bfloat16, device="meta")[3:].as_strided((4, 2), (5, 0), 3)
    values = (tensor, 1e-5, float("inf"), None, True, 7, "relu", (0.1, (tensor,)))
    text = json.dumps(precompiling._encoded(values))
    got = precompiling._decoded(json.loads(text))
    assert got[1:7] == values[1:7] and got[7][0] == 0.1
    for copy in (got[0], got[7][1][0]):
        assert (copy.shape, copy.stride(), copy.dtype) == ((4, 2), (5, 0), torch.bfloat16)
        assert copy.data_ptr() % 16 == tensor.data_ptr() % 16 != 0
    with pytest.raises(TypeError, match="of type dtype cannot be handed to a worker"):
        precompiling._encoded((torch.float32,))


# on a GPU


def on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, folder: Path, arch: Any = 90, **launches: Any
) -> Result:
    """Runs the command on a pretended GPU: nothing compiles, forward passes run on the CPU."""
    forward = warmup.forward

    def on_it(*arguments: Any) -> Any:
        with gpu(**launches), use(self_check(folder)):
            return forward(*arguments)

    monkeypatch.setattr(warmup, "gpu_here", lambda: (torch.device("cpu"), arch))
    monkeypatch.setattr(
        warmup, "compile_jobs", lambda *_: iter([Compiled("patch_embed", 1.0, True)])
    )
    monkeypatch.setattr(warmup, "forward", on_it)
    return fastbb_warmup(*TINY, "--batch", "2,1,2")


def test_each_batch_runs_once_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = on_a_gpu(monkeypatch, tmp_path)
    assert result.exit_code == 0, result.output
    ran = [line for line in result.stdout.splitlines() if line.startswith("batch ")]
    assert [line.split(":")[0] for line in ran] == ["batch 1", "batch 2"]
    assert "one forward pass, checks included, in " in ran[0]
    assert list(tmp_path.iterdir())  # results of the checks are stored


def test_gpu_that_is_not_compiled_for_only_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = on_a_gpu(monkeypatch, tmp_path, arch=103)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "nothing was compiled for sm_103 in advance: its first runs do"
    assert [line.split(":")[0] for line in lines[1:]] == ["batch 1", "batch 2"]


def test_unsupported_gpu_exits_with_2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr(
        warmup, "Machine", SimpleNamespace(of=lambda device: SimpleNamespace(capability="7.5"))
    )
    result = fastbb_warmup(MODEL)
    assert result.exit_code == 2
    assert "nothing to compile for this GPU: needs an NVIDIA GPU of compute" in result.stderr


def test_kernel_that_fails_its_check_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = on_a_gpu(monkeypatch, tmp_path, patch_embed=broken.nan("patch_embed"))
    assert result.exit_code == 1, result.output
    assert "batch 1: fastbb's kernel of patch_embed is off" in result.stdout


@torch.no_grad()
def test_batch_that_does_not_run_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = AutoBackbone.from_pretrained(MODEL)

    def no_memory(pixel_values: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("no 2 GiB")

    monkeypatch.setattr(backbone, "feature_maps", no_memory)
    batch, _, problem = warmup.forward(backbone, (3, 24, 32))
    assert (batch, problem) == (3, "out of memory: no 2 GiB")


# without one, and wrong arguments


def test_no_gpu_and_no_arch_exits_with_2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = fastbb_warmup(MODEL)
    assert result.exit_code == 2
    assert result.stderr == (
        "fastbb: no GPU here to compile for: name one by --arch, such as --arch 90\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nano-swin-digit", "--arch", "90"), "Did you mean nano-swin-digits"),
        (("--batch", "10000000000000", *TINY, "--arch", "90"), "no GPU runs 10000000000000 images"),
        ((MODEL, "--arch", "75"), "'75' is not one of '80', '86', '89', '90'"),
        ((MODEL, "--batch", "1,0"), "wanted numbers of images such as 1,8,64, got '1,0'"),
        ((MODEL, "--batch", "many"), "wanted numbers of images such as 1,8,64, got 'many'"),
        ((MODEL, "--size", "0"), "wanted height x width in pixels, such as 224x224, got '0x0'"),
        ((MODEL, "--size", "2x"), "wanted height x width in pixels, such as 224x224, got '2x'"),
        ((MODEL, "--precision", "fp8"), "'fp8' is not one of 'fp32', 'bf16', 'fp16'"),
        ((MODEL, "--workers", "0"), "0 is not in the range x>=1"),
        ((MODEL, "--arch", "90", "--out-indices", "9"), "out_indices must be valid indices"),
    ],
    ids=lambda value: " ".join(value[1:]) if isinstance(value, tuple) else "",
)
def test_wrong_arguments_exit_with_2(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = fastbb_warmup(*arguments)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())


def test_a_cache_that_cannot_be_written_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    result = fastbb_warmup(*TINY, "--arch", "90")
    assert result.exit_code == 6, result.output
    assert result.stderr == (
        f"fastbb: cannot write Triton's cache {tmp_path / 'file' / 'cache'}: Not a directory; make "
        "it writable, or set TRITON_CACHE_DIR to a directory that is\n"
    )
    assert not result.stdout


def test_arch_option_lists_every_architecture() -> None:
    assert tuple(map(str, ARCHITECTURES)) == models.ARCHITECTURES


def test_report_of_a_model_without_our_kernels_says_so() -> None:
    report = warmup.Warmth(90, (), 0.0, 1, ())
    assert str(report) == (
        "nothing to compile for sm_90: the model launches none of fastbb's kernels"
    )
