"""Tiny upstream models with random weights, and the same weights loaded into fastbb.

Freshly built models have zero biases, unit norms and near-zero attention logits, under which a
swapped norm, a lost bias or a transposed bias table changes nothing: `randomize_` sets them all.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastbb import AutoBackbone, TimmBackbone, TimmBackboneConfig

STAGES = (0, 1, 2, 3, 4)
TIMM_FIELDS = {"num_channels", "output_stride", "img_size", "freeze_batch_norm_2d"}

# two blocks in the first and the last stage: the shifted block meets large maps and maps that are
# no larger than the window
SWIN = {
    "w7": {"embed_dim": 16, "num_heads": (2, 4, 8, 16), "window_size": 7},
    "w12": {"embed_dim": 16, "num_heads": (2, 4, 8, 16), "window_size": 12},
    "w8": {"embed_dim": 16, "num_heads": (2, 4, 8, 16), "window_size": 8},
    "head_dim16": {"embed_dim": 16, "num_heads": (1, 2, 4, 8), "window_size": 7},
}
SWIN_DEPTHS = (2, 1, 1, 2)

RESNET = {
    "basic": {"layer_type": "basic"},
    "bottleneck": {"layer_type": "bottleneck"},
    "downsample_in_bottleneck": {"layer_type": "bottleneck", "downsample_in_bottleneck": True},
}
# the second layer of a stage is the one without a shortcut convolution
RESNET_DEPTHS = (2, 1, 1, 1)


@dataclass(frozen=True)
class Pair:
    """A model of upstream and one of ours with the same weights.

    Attributes:
        ours: the fastbb backbone, eval(), all stages selected.
        upstream: upstream's module, eval().
        maps: upstream's maps of an image batch, as NCHW, one for each of our out_indices.
    """

    ours: Any
    upstream: Any
    maps: Callable[[Tensor], list[Tensor]]


def randomize_(model: Any, seed: int = 0) -> Any:
    """Sets every parameter and every norm statistic to a seeded random value.

    Args:
        model: any nn.Module; matrices keep unit gain, so that maps stay of order one.
        seed: of a generator of its own; the global one is not touched.

    Returns:
        The model, in eval().
    """
    generator = torch.Generator().manual_seed(seed)

    def normal_(tensor: Tensor, std: float) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * std)

    def uniform_(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if isinstance(module, nn.Linear | nn.Conv2d) and name == "weight":
                    normal_(parameter, parameter[0].numel() ** -0.5)
                elif name == "weight":
                    uniform_(parameter, 0.5, 1.5)
                else:
                    normal_(parameter, 0.3)
            for name, buffer in module.named_buffers(recurse=False):
                if name == "running_mean":
                    normal_(buffer, 0.3)
                elif name == "running_var":
                    uniform_(buffer, 0.5, 2.0)
                elif name == "weight":  # a frozen norm has no parameters
                    uniform_(buffer, 0.5, 1.5)
                elif name == "bias":
                    normal_(buffer, 0.3)
    return model.eval()


def images(height: int, width: int, batch: int = 2, channels: int = 3, seed: int = 1) -> Tensor:
    """Seeded normal pixels, [B, C, H, W], fp32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, height, width, generator=generator)


def hf_swin(variant: str = "w7", **config: Any) -> Any:
    """transformers' SwinBackbone, all stages selected."""
    import transformers

    settings = {"depths": SWIN_DEPTHS, "out_indices": list(STAGES), "drop_path_rate": 0.0}
    config = {**settings, **SWIN[variant], **config}
    return randomize_(transformers.SwinBackbone(transformers.SwinConfig(**config)))


def hf_maskformer_swin(variant: str = "w7", **config: Any) -> Any:
    """transformers' MaskFormerSwinBackbone, all stages selected (it has no stem)."""
    from transformers.models.maskformer import MaskFormerSwinBackbone, MaskFormerSwinConfig

    config = {"depths": SWIN_DEPTHS, "out_indices": list(STAGES[1:]), **SWIN[variant], **config}
    return randomize_(MaskFormerSwinBackbone(MaskFormerSwinConfig(**config)))


def hf_resnet(variant: str = "basic", **config: Any) -> Any:
    """transformers' ResNetBackbone, all stages selected."""
    import transformers

    settings = {
        "depths": RESNET_DEPTHS,
        "embedding_size": 16,
        "hidden_sizes": [16, 32, 48, 64],
        "out_indices": list(STAGES),
    }
    config = {**settings, **RESNET[variant], **config}
    return randomize_(transformers.ResNetBackbone(transformers.ResNetConfig(**config)))


def timm_features(name: str, **options: Any) -> Any:
    """timm's features_only model; its default `out_indices` unless given.

    The test is skipped where this timm has no such model, or no features of it.
    """
    import timm

    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    try:
        model = timm.create_model(name, features_only=True, **options)
    except RuntimeError as error:
        if "features_only not implemented" not in str(error):
            raise
        pytest.skip(f"timm {timm.__version__} has no features of {name}")
    return randomize_(model)


def timm_options(family: str, variant: str) -> tuple[str, dict[str, Any]]:
    """timm's name and constructor options of a variant of `SWIN` or `RESNET`.

    Raises:
        KeyError: timm cannot express it.
    """
    if family == "swin":
        return "swin_tiny_patch4_window7_224", {"depths": SWIN_DEPTHS, **SWIN[variant]}
    name = {"basic": "resnet18", "bottleneck": "resnet50"}[variant]
    return name, {"layers": RESNET_DEPTHS, "channels": (8, 16, 24, 32)}


def timm_maps(model: Any, pixel_values: Tensor) -> list[Tensor]:
    """Maps of a features_only model, as NCHW."""
    channels_last = str(getattr(model, "output_fmt", "")).endswith("NHWC")
    return [f.permute(0, 3, 1, 2) if channels_last else f for f in model(pixel_values)]


def torchvision_swin(variant: str = "w7", depths: Sequence[int] = SWIN_DEPTHS) -> Any:
    """torchvision's SwinTransformer."""
    from torchvision.models.swin_transformer import SwinTransformer

    settings = SWIN[variant]
    model = SwinTransformer(
        patch_size=[4, 4],
        embed_dim=settings["embed_dim"],
        depths=list(depths),
        num_heads=list(settings["num_heads"]),
        window_size=[settings["window_size"]] * 2,
        num_classes=2,
    )
    return randomize_(model)


def torchvision_resnet(variant: str = "basic") -> Any:
    """torchvision's ResNet (its widths are fixed).

    Raises:
        KeyError: torchvision cannot express the variant.
    """
    from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

    block = {"basic": BasicBlock, "bottleneck": Bottleneck}[variant]
    return randomize_(ResNet(block, list(RESNET_DEPTHS), num_classes=2))


def torchvision_maps(model: Any, pixel_values: Tensor) -> list[Tensor]:
    """The stem and the four stages of torchvision's Swin or ResNet, as NCHW."""
    x = pixel_values
    if hasattr(model, "layer1"):
        x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
        maps = [x]
        for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
            x = layer(x)
            maps.append(x)
        return maps
    maps = []
    for i, layer in enumerate(model.features):
        x = layer(x)
        if i % 2 == 1 or i == 0:
            maps.append(x.permute(0, 3, 1, 2))
    return maps


def from_hf(upstream: Any, **options: Any) -> Any:
    """Our backbone, loaded from what transformers' `save_pretrained` wrote."""
    with tempfile.TemporaryDirectory() as folder:
        upstream.save_pretrained(folder)
        return AutoBackbone.from_pretrained(folder, **options)


def from_timm(
    name: str,
    upstream: Any,
    out_indices: Sequence[int] | None = None,
    native: bool = True,
    **options: Any,
) -> Any:
    """Our TimmBackbone with the weights of `upstream`, whose keys it has under `_backbone.`.

    Args:
        name: timm's, of the architecture.
        upstream: timm's features_only model.
        out_indices: default: every feature.
        native: False runs timm's own forward.
        options: fields of TimmBackboneConfig; others are timm's constructor's.
    """
    if out_indices is None:
        out_indices = range(len(upstream.feature_info.info))
    fields = {key: options.pop(key) for key in TIMM_FIELDS & options.keys()}
    config = TimmBackboneConfig(
        backbone=name, out_indices=list(out_indices), backbone_kwargs=options, **fields
    )
    ours = TimmBackbone(config, native=native)
    ours.load_state_dict({f"_backbone.{k}": v for k, v in upstream.state_dict().items()})
    return ours.eval()


def hf_pair(upstream: Any) -> Pair:
    """transformers' backbone and ours."""
    return Pair(from_hf(upstream), upstream, lambda x: list(upstream(x).feature_maps))


def timm_pair(name: str, native: bool = True, **options: Any) -> Pair:
    """timm's features_only model and our TimmBackbone, with every feature selected."""
    any_size = {"strict_img_size": False} if name.startswith("swin_") else {}
    upstream = timm_features(name, **any_size, **options)
    ours = from_timm(name, upstream, native=native, **options)
    return Pair(ours, upstream, lambda x: timm_maps(upstream, x))


def torchvision_pair(upstream: Any, name: str | None = None) -> Pair:
    """A torchvision model and our native family with its weights.

    Args:
        upstream: torchvision's model.
        name: torchvision's name of it; None for one of other depths and widths.
    """
    ours = AutoBackbone.from_torchvision(name, upstream, out_indices=STAGES)
    return Pair(ours, upstream, lambda x: torchvision_maps(upstream, x))


def family_pair(family: str, variant: str, source: str) -> Pair:
    """Upstream and ours for one row of the matrix.

    Args:
        family: "swin" or "resnet".
        variant: a key of `SWIN` or `RESNET`.
        source: "hf", "timm" or "torchvision".

    Raises:
        KeyError: the source cannot express the variant.
    """
    if source == "hf":
        return hf_pair({"swin": hf_swin, "resnet": hf_resnet}[family](variant))
    if source == "timm":
        name, options = timm_options(family, variant)
        return timm_pair(name, **options)
    if family == "swin":
        return torchvision_pair(torchvision_swin(variant))
    return torchvision_pair(torchvision_resnet(variant))


def gradients(model: Any, pixel_values: Tensor) -> dict[str, Tensor]:
    """Gradients of the maps' mean squares, by parameter name; without those that have none."""
    model.zero_grad(set_to_none=True)
    torch.stack([(m * m).mean() for m in model(pixel_values).feature_maps]).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def saved_bytes(model: Any, pixel_values: Tensor) -> int:
    """Size of what autograd keeps for the backward of one forward, with repetitions."""
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(pixel_values)
    return sum(sizes)
