"""Settings of an engine, and its tools: clock, cache, candidates, progress."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from fastbb_kernels._dispatch import launches_on
from fastbb_kernels.result_cache import ResultCache

from ..backbone.configuration import check_choice
from .measuring import Clock
from .trial import Candidate, Report, tuning_bar

Mode = Literal["auto", "eager", "compile", "openvino", "triton", "triton+compile"]
Precision = Literal["fp32", "tf32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def torch_dtype(precision: str) -> torch.dtype:
    """The dtype of weights in a precision; "tf32" is fp32 with other products."""
    return DTYPES.get(precision, torch.float32)


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype as a precision, or torch's own."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    return names.get(dtype, str(dtype).removeprefix("torch."))


class EngineWarning(UserWarning):
    """A prepared backbone does not run as requested; the maps are still right."""


@dataclass(frozen=True)
class Settings:
    """Arguments of `prepare`, checked."""

    mode: Mode = "auto"
    precision: Precision | None = None
    cuda_graph: bool | Literal["auto"] = "auto"
    expected_images: int | None = None

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, get_args(Mode))
        if self.precision is not None:
            check_choice("precision", self.precision, get_args(Precision))
        check_choice("cuda_graph", self.cuda_graph, ("auto", True, False))
        expected = self.expected_images
        is_count = isinstance(expected, int) and not isinstance(expected, bool) and expected >= 0
        if expected is not None and not is_count:
            raise ValueError(
                f"expected_images must be a number of images, at least 0, or None, got {expected!r}"
            )

    def check_device(self, device: torch.device, what: str) -> None:
        """Refuses settings that a device cannot run.

        Args:
            device: of the weights.
            what: "backbone" or "model", for the message.

        Raises:
            ValueError: they need a GPU, an NVIDIA one, or a CPU.
        """
        is_gpu = device.type == "cuda"
        if self.mode == "openvino" and device.type != "cpu":
            raise ValueError(
                f"mode='openvino' needs a CPU, the {what} is on {device}; "
                "move it with .to('cpu'), or take mode='auto'"
            )
        if self.mode.startswith("triton") and not launches_on(device):
            raise ValueError(
                f"mode={self.mode!r} needs a CUDA or ROCm device, the {what} is on {device}; "
                "move it with .to('cuda'), or take mode='auto'"
            )
        if self.precision == "tf32" and (not is_gpu or torch.version.hip):
            raise ValueError(
                f"precision='tf32' needs an NVIDIA GPU, the {what} is on {device}; take 'fp32'"
            )
        if self.cuda_graph is True and not is_gpu:
            raise ValueError(f"cuda_graph=True needs a GPU, the {what} is on {device}; take 'auto'")


@dataclass
class Tools:
    """Tools with which an engine measures and remembers; tests replace them.

    Attributes:
        clock: times a call; default: the wall clock around the device's work.
        cache: of measured choices; default: the user's, of this machine.
        candidates: ways to run that are measured beside the engine's own.
        budget_s: seconds for one measured choice; a candidate that was begun is finished.
        progress: shows what is going on; default: a bar on a terminal.
    """

    clock: Clock | None = None
    cache: ResultCache | None = None
    candidates: Sequence[Candidate] = ()
    budget_s: float = 20.0
    progress: Callable[[int], Report] = tuning_bar
