"""Small models under the names that README.md and docs/ use, for the loopback Hub.

Models of transformers have one block a stage, and the channels of the real ones. A timm name says
what is built, so timm's models have their full size. All weights are random.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hub_server import HubServer
from reference_models import randomize_

DEPTHS = [1, 1, 1, 1]
# as transformers 4 wrote it
PROCESSOR = {
    "feature_extractor_type": "ViTFeatureExtractor",
    "do_normalize": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
    "size": 224,
}


def swin_classifier() -> Any:
    import transformers

    return transformers.SwinForImageClassification(transformers.SwinConfig(depths=DEPTHS))


def resnet_classifier() -> Any:
    import transformers

    return transformers.ResNetForImageClassification(transformers.ResNetConfig(depths=DEPTHS))


def head_around_a_swin(name: str) -> Callable[[], Any]:
    """A maker of transformers' head `<name>ForInstanceSegmentation` or its like, made small."""

    def make() -> Any:
        import transformers

        stages: dict[str, Any] = {"out_features": [f"stage{n}" for n in range(1, 5)]}
        backbone = transformers.SwinConfig(depths=DEPTHS, **stages)
        if name == "MaskFormerForInstanceSegmentation":
            small = {"d_model": 32, "decoder_layers": 1, "decoder_ffn_dim": 32}
            decoder = {"model_type": "detr", "encoder_layers": 1, "num_queries": 5, **small}
            config: Any = transformers.MaskFormerConfig(
                backbone_config=backbone,
                decoder_config=decoder,
                fpn_feature_size=32,
                mask_feature_size=32,
            )
        else:
            config = transformers.Mask2FormerConfig(
                backbone_config=backbone,
                feature_size=32,
                mask_feature_size=32,
                hidden_dim=32,
                encoder_feedforward_dim=32,
                encoder_layers=1,
                dim_feedforward=32,
                decoder_layers=2,
                num_attention_heads=2,
                num_queries=5,
            )
        return getattr(transformers, name)(config)

    return make


def timm_model(name: str) -> Callable[[], Any]:
    def make() -> Any:
        import timm

        return timm.create_model(name)

    return make


# repository -> what makes its model, and the names that pages write for it
MODELS: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "microsoft/swin-tiny-patch4-window7-224": (swin_classifier, ()),
    "microsoft/resnet-50": (resnet_classifier, ()),
    "facebook/maskformer-swin-tiny-coco": (
        head_around_a_swin("MaskFormerForInstanceSegmentation"),
        (),
    ),
    "facebook/mask2former-swin-tiny-coco-instance": (
        head_around_a_swin("Mask2FormerForUniversalSegmentation"),
        (),
    ),
    "timm/resnet50.a1_in1k": (timm_model("resnet50"), ("resnet50", "resnet50.a1_in1k")),
    "timm/efficientnet_b0.ra_in1k": (timm_model("efficientnet_b0"), ("efficientnet_b0",)),
}


def publish(hub: HubServer, page: str, folder: Callable[[str], Path]) -> None:
    """Serves the models whose names stand in quotes in the text of a page.

    Args:
        hub: serves them.
        page: text of the page.
        folder: makes a directory of a name, for the files.
    """
    for repository, (make, names) in MODELS.items():
        if not any(f'"{name}"' in page for name in (repository, *names)):
            continue
        files = folder(repository.split("/")[1])
        model = randomize_(make())
        if repository.startswith("timm/"):
            import timm

            timm.models.save_for_hf(model, str(files), safe_serialization=True)
        else:
            model.save_pretrained(files)
            (files / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
        hub.add_repo(repository, files)
