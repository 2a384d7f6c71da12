"""Errors of whole backbones by our kernels in the interpreter, with and without folded norms.

    python bench/kernel_accuracy.py

Full widths, few blocks, small images, random weights with a few large channels, as trained models
have them. Each error is the root of the mean square of the difference from the same rounded weights
in float64 by transformers, relative to that of the maps. "eager" is transformers in that dtype.
"""

import copy
import tempfile
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor, nn

from fastbb import AutoBackbone
from fastbb_kernels import use_impl
from fastbb_kernels.ops import folded_norm_linear
from fastbb_kernels.testing import interpret

# class of the configuration, and its fields
MODELS: dict[str, tuple[type[transformers.PreTrainedConfig], dict[str, Any]]] = {
    "Swin-T, 1 block a stage": (
        transformers.SwinConfig,
        {"image_size": 64, "depths": [1, 1, 1, 1], "out_indices": [3, 4]},
    ),
    "DINOv2-S, 3 layers": (
        transformers.Dinov2Config,
        {
            "hidden_size": 384,
            "num_attention_heads": 6,
            "num_hidden_layers": 3,
            "image_size": 70,
            "patch_size": 14,
            "out_indices": [1, 3],
        },
    ),
    "ConvNeXt-T, 1 block a stage": (
        transformers.ConvNextConfig,
        {
            "image_size": 64,
            "depths": [1, 1, 1, 1],
            "out_indices": [3, 4],
            "hidden_sizes": [96, 192, 384, 768],
        },
    ),
}
UNFOLDED = 10**9  # features
BLOCKS = ("swin_attention_block", "mlp_block", "convnext_block")  # the parts are compared


@torch.no_grad()
def randomize(model: nn.Module) -> nn.Module:
    """Draws all weights; a few channels of each norm are ten times as large."""
    for name, tensor in model.named_parameters():
        if tensor.ndim == 1 and "norm" in name:
            tensor.normal_(float(name.endswith("weight")), 0.3)
            tensor[torch.randperm(len(tensor))[:3]] *= 10
        elif "lambda" in name or "layer_scale" in name:
            tensor.fill_(0.5)
        elif tensor.ndim == 1:
            tensor.normal_(0, 0.1)
        else:
            tensor.normal_(0, tensor[0].numel() ** -0.5)
    return model


def relative(got: Tensor, exact: Tensor) -> float:
    """Root of the mean square of a difference, relative to that of the exact values."""
    difference = (got.double() - exact).square().mean()
    return (difference / exact.square().mean()).sqrt().item()


@torch.no_grad()
def errors(upstream: nn.Module, dtype: torch.dtype, size: int) -> Iterator[tuple[float, ...]]:
    """Errors of each map: eager, kernels without folded norms, kernels with them."""
    with tempfile.TemporaryDirectory() as folder:
        upstream.save_pretrained(folder)  # pyright: ignore[reportCallIssue] - a model of transformers
        ours = AutoBackbone.from_pretrained(folder).eval().to(dtype)
    low, pixels = copy.deepcopy(upstream).to(dtype), torch.randn(2, 3, size, size).to(dtype)
    eager = low(pixels).feature_maps
    exact = low.double()(pixels.double()).feature_maps
    by_kernels = []
    for most in (UNFOLDED, folded_norm_linear.MOST_UNFOLDED_FEATURES):
        with (
            mock.patch.object(folded_norm_linear, "MOST_UNFOLDED_FEATURES", most),
            use_impl("triton"),
            use_impl("eager", ops=BLOCKS),
            interpret(),
        ):
            by_kernels.append(ours(pixels).feature_maps)
    for maps in zip(exact, eager, *by_kernels):
        yield tuple(relative(got, maps[0]) for got in maps[1:])


def main() -> None:
    print(f"{'':30} {'':14} {'eager':>8} {'unfolded':>9} {'folded':>8}")
    for name, (kind, fields) in MODELS.items():
        torch.manual_seed(0)
        model = randomize(transformers.AutoBackbone.from_config(kind(**fields)).eval())
        for dtype in (torch.bfloat16, torch.float16):
            for index, row in enumerate(errors(model, dtype, fields["image_size"])):
                cells = " ".join(f"{value:9.2e}" for value in row)
                print(f"{name:30} {str(dtype)[6:]:9} map {index} {cells}", flush=True)


if __name__ == "__main__":
    main()
