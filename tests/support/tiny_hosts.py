"""Tiny models of other libraries for `accelerate`, and checks of what ran in them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference_models import images, randomize_
from tolerance import assert_equals_upstream
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastbb import AccelerateReport, accelerate
from fastbb.hosts.replacement import replacement_of

# for `pytestmark`: tests in which ours is never wrong, and never falls back with a warning
NO_ACCELERATE_WARNING = pytest.mark.filterwarnings(
    "error::fastbb.hosts.accelerate.AccelerateWarning"
)
PIXELS = images(32, 32)
HEAD = 1e-4  # allowed of a result that has passed a head
SWIN: dict[str, Any] = {
    "image_size": 32,
    "embed_dim": 8,
    "depths": [2, 1],
    "num_heads": [1, 2],
    "window_size": 4,
}


def swin_classifier(**config: Any) -> Any:
    import transformers

    settings = {**SWIN, "drop_path_rate": 0.0, "num_labels": 3, **config}
    return randomize_(transformers.SwinForImageClassification(transformers.SwinConfig(**settings)))


def swin_backbone(**config: Any) -> Any:
    import transformers

    settings = {**SWIN, "drop_path_rate": 0.0, "out_indices": [0, 1, 2], **config}
    return randomize_(transformers.SwinBackbone(transformers.SwinConfig(**settings)))


def maskformer_swin(**config: Any) -> Any:
    from transformers.models.maskformer import MaskFormerSwinBackbone, MaskFormerSwinConfig

    settings = {**SWIN, "drop_path_rate": 0.0, "out_indices": [1, 2], **config}
    return randomize_(MaskFormerSwinBackbone(MaskFormerSwinConfig(**settings)))


def resnet_backbone(**config: Any) -> Any:
    import transformers

    settings = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 1]}
    settings = {**settings, "out_indices": [0, 1, 2], **config}
    return randomize_(transformers.ResNetBackbone(transformers.ResNetConfig(**settings)))


def timm_resnet(**options: Any) -> Any:
    import timm

    shape = {"layers": (2, 1, 1, 1), "channels": (8, 8, 16, 16), "num_classes": 3}
    return randomize_(timm.create_model("resnet18", **{**shape, **options}))


def torchvision_swin(**options: Any) -> Any:
    from torchvision.models.swin_transformer import SwinTransformer

    shape: dict[str, Any] = {"patch_size": [4, 4], "embed_dim": 8, "depths": [2, 1]}
    shape = {**shape, "num_heads": [1, 2], "window_size": [4, 4], "num_classes": 3}
    shape["stochastic_depth_prob"] = 0.0
    return randomize_(SwinTransformer(**{**shape, **options}))


def dinov2_backbone(**config: Any) -> Any:
    from vit_models import hf_vit

    return hf_vit("dinov2", image_size=32, patch_size=8, out_indices=[0, 2], **config)


def timm_vit(**options: Any) -> Any:
    import timm

    shape: dict[str, Any] = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    shape |= {"img_size": 32, "dynamic_img_size": True, "dynamic_img_pad": True}
    shape |= {"num_classes": 3, "init_values": 1.0, **options}
    return randomize_(timm.create_model("vit_tiny_patch16_224", **shape))


HOSTS: dict[str, Callable[..., Any]] = {
    make.__name__: make
    for make in (
        *(swin_classifier, swin_backbone, maskformer_swin),
        *(resnet_backbone, timm_resnet, torchvision_swin, dinov2_backbone, timm_vit),
    )
}


def accelerated(make: Callable[[], Any], **options: Any) -> tuple[Any, Any, AccelerateReport]:
    """Returns a host, upstream's model with the same weights, and the report."""
    model, twin = make(), make()
    return model, twin, accelerate(model, **{"mode": "eager", **options})


def twin_of(make: Callable[[], Any], model: Any) -> Any:
    """Returns upstream's own model with copies of the current weights of a host."""
    twin = make().to(next(model.parameters()).dtype)
    twin.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
    return twin.train(model.training)


def block_of(model: nn.Module) -> Any:
    """Returns the first block."""
    kinds = ("SwinLayer", "Dinov2Layer", "BottleNeckLayer", "Block")
    return next(m for m in model.modules() if type(m).__name__.endswith(kinds))


def tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


@torch.no_grad()
def infer(model: Any, pixels: Tensor = PIXELS, **options: Any) -> list[Tensor]:
    """Returns the tensors of a host's result for pixels in its dtype."""
    found = tensors(model(pixels.to(next(model.parameters()).dtype), **options))
    assert found
    return found


def assert_bit_equal(got: list[Tensor], want: list[Tensor]) -> None:
    assert len(got) == len(want)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, want))


def assert_close(got: list[Tensor], want: list[Tensor]) -> None:
    assert_equals_upstream(got, want, rel=HEAD)


def assert_ours_ran(report: AccelerateReport) -> None:
    """Checks that every replaced module ran our forward, or is inside one that did."""
    runs = {runs for _, _, runs, _ in report.rows()}
    assert "fastbb" in runs and runs <= {"fastbb", "-"}, str(report)


def has_run_ours(model: Any) -> bool:
    """Whether every replaced module ran our forward; for copies, which have no report."""
    found = [replacement_of(module) for module in model.modules()]
    choices = [choice for own in found if own for choice in own.choices.values()]
    return any(choice.ours for choice in choices) and not any(own.off for own in found if own)


def reasons_of(report: AccelerateReport) -> set[str]:
    """Reasons why modules ran upstream's forward or were left alone."""
    return {why for _, _, runs, why in report.rows() if runs == "upstream"}
