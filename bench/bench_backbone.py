"""Times whole backbones in eager mode, beside the library that their weights come from."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastbb import AutoBackbone, SwinConfig, TimmBackbone, TimmBackboneConfig
from fastbb.models.resnet import ResNetConfig

STAGES = ["stage1", "stage2", "stage3", "stage4"]
DTYPES = [torch.float32, torch.bfloat16]


def transformers_model(name: str) -> Any:
    transformers = pytest.importorskip("transformers")
    config = {"swin_t": transformers.SwinConfig, "resnet50": transformers.ResNetConfig}[name]
    return transformers.AutoBackbone.from_config(config(out_features=STAGES))


def fastbb_model(name: str) -> Any:
    config = {"swin_t": SwinConfig, "resnet50": ResNetConfig}[name]
    return AutoBackbone.from_config(config(out_features=STAGES))


def timm_model(name: str) -> Any:
    import timm

    return timm.create_model(TIMM[name], features_only=True)


def fastbb_timm_model(name: str) -> Any:
    n_stages = 4 if name == "swin_t" else 5
    return TimmBackbone(TimmBackboneConfig(TIMM[name], out_indices=list(range(n_stages))))


TIMM = {"swin_t": "swin_tiny_patch4_window7_224", "resnet50": "resnet50"}
PROVIDERS: dict[str, Callable[[str], Any]] = {
    "transformers": transformers_model,
    "fastbb": fastbb_model,
    "timm": timm_model,
    "fastbb-timm": fastbb_timm_model,
}


@pytest.mark.benchmark(group="backbone")
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("batch", [1, 8], ids="b{}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TIMM)
def bench_backbone(time_op, device, name, dtype, batch, provider):
    model = PROVIDERS[provider](name).to(device, dtype).eval()
    pixels = torch.randn(batch, 3, 224, 224, device=device, dtype=dtype)
    with torch.inference_mode():
        time_op(lambda: model(pixels))
