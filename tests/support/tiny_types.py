"""Tiny models of transformers of every model type, and models around them."""

from collections.abc import Callable
from typing import Any

import torch
from reference_models import randomize_

VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
PYRAMID = {"hidden_sizes": [8, 16], "depths": [1, 1]}
HGNET = {
    "stem_channels": [3, 8, 8],
    "embedding_size": 8,
    **PYRAMID,
    "stage_in_channels": [8, 16],
    "stage_mid_channels": [8, 8],
    "stage_out_channels": [16, 32],
    "stage_num_blocks": [1, 1],
    "stage_downsample": [False, True],
    "stage_light_block": [False, True],
    "stage_kernel_size": [3, 3],
    "stage_numb_of_layers": [2, 2],
}
HIERA = {
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [1, 2],
    "image_size": [32, 32],
    "masked_unit_size": [4, 4],
    "num_query_pool": 1,
    "masked_unit_attention": [True, False],
    "mlp_ratio": 2.0,
}
PVT = {
    **PYRAMID,
    "num_encoder_blocks": 2,
    "num_attention_heads": [1, 2],
    "sr_ratios": [2, 1],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "mlp_ratios": [2, 2],
}
TEXTNET = {
    "stem_out_channels": 8,
    "hidden_sizes": [8, 8, 16, 16, 16],
    "conv_layer_kernel_sizes": [[[3, 3]], [[3, 3]], [[3, 1]], [[1, 3]]],
    "conv_layer_strides": [[1], [2], [2], [2]],
}
UVDOC = {
    "resnet_head": [[3, 8], [8, 8]],
    "resnet_configs": [[[8, 8, 1, False]], [[8, 8, 1, True]], [[8, 16, 1, True]]],
    "stage_configs": [[[16, 1]], [[16, 2]]],
    "depths": [1, 1],
}
LCNET = {
    "stem_channels": 8,
    "block_configs": [
        *([[3, 8, 8, 1, False]],) * 3,
        [[3, 8, 16, 2, True]],
        [[5, 16, 16, 1, False], [3, 16, 16, 1, True]],
    ],
}
LCNET_V4 = {
    "stem_channels": [3, 8, 8],
    "block_configs": [*([[3, 8, 8, 1, True]],) * 3, [[3, 8, 16, 2, False]]],
}
# fields of each type's configuration; images of 32x32 fit all of them
FIELDS: dict[str, dict[str, Any]] = {
    "beit": VIT,
    "bit": {**PYRAMID, "embedding_size": 8, "num_groups": 2},
    "convnext": {**PYRAMID, "num_stages": 2},
    "convnextv2": {**PYRAMID, "num_stages": 2},
    "dinov2": VIT,
    "dinov2_with_registers": {**VIT, "num_register_tokens": 2},
    "dinov3_convnext": PYRAMID,
    "dinov3_vit": {**VIT, "num_register_tokens": 2},
    "focalnet": {
        "embed_dim": 8,
        "depths": [1, 1],
        "focal_levels": [1, 1],
        "focal_windows": [3, 3],
        "hidden_sizes": [8, 16],
    },
    "hgnet_v2": HGNET,
    "hiera": HIERA,
    "lw_detr_vit": {**VIT, "window_block_indices": [0], "num_windows": 4},
    "maskformer-swin": {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4},
    "pixio": {**VIT, "n_cls_tokens": 2},
    "pp_lcnet": LCNET,
    "pp_lcnet_v3": LCNET,
    "pp_lcnet_v4": LCNET_V4,
    "pvt_v2": PVT,
    "resnet": {**PYRAMID, "embedding_size": 8, "layer_type": "basic"},
    "rf_detr_dinov2": {**VIT, "num_windows": 2},
    "rt_detr_resnet": {**PYRAMID, "embedding_size": 8, "layer_type": "basic"},
    "sapiens2": {**VIT, "num_register_tokens": 2, "num_key_value_heads": 2},
    "swin": {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4},
    "swinv2": {
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [1, 2],
        "window_size": 4,
        "image_size": 32,
    },
    "textnet": TEXTNET,
    "tipsv2_vision_model": {**VIT, "num_register_tokens": 2},
    "uvdoc_backbone": UVDOC,
    "vitdet": {**VIT, "window_block_indices": [0], "window_size": 2, "pretrain_image_size": 32},
    "vitpose_backbone": {**VIT, "image_size": [32, 32], "patch_size": [8, 8]},
}


def config(model_type: str, **fields: Any) -> Any:
    """transformers' configuration of a tiny model."""
    import transformers

    return transformers.CONFIG_MAPPING[model_type](**{**FIELDS[model_type], **fields})


def upstream(model_type: str, **fields: Any) -> Any:
    """transformers' backbone with random weights, in eval()."""
    import transformers

    torch.manual_seed(0)
    return randomize_(transformers.AutoBackbone.from_config(config(model_type, **fields)))


def _transformers(head: str, head_config: str, **fields: Any) -> Any:
    import transformers

    made = getattr(transformers, head_config)(**fields)
    return randomize_(getattr(transformers, head)(made))


DETECTOR = {
    "d_model": 32,
    "decoder_layers": 1,
    "projector_scale_factors": [1.0],
    "num_queries": 4,
    "decoder_self_attention_heads": 2,
    "decoder_cross_attention_heads": 2,
    "group_detr": 1,
    "decoder_n_points": 1,
    "num_labels": 3,
}


def _rt_detr() -> Any:
    stages = {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]}
    backbone = config("rt_detr_resnet", **stages, out_features=["stage2", "stage3", "stage4"])
    return _transformers(
        "RTDetrForObjectDetection",
        "RTDetrConfig",
        backbone_config=backbone,
        encoder_in_channels=[16, 16, 16],
        d_model=32,
        encoder_hidden_dim=32,
        decoder_in_channels=[32, 32, 32],
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_queries=5,
        num_labels=3,
    )


# models whose checkpoints contain a backbone, which all of them hold as transformers' class
AROUND: dict[str, Callable[[], Any]] = {
    "rt_detr": _rt_detr,
    "vitpose": lambda: _transformers(
        "VitPoseForPoseEstimation",
        "VitPoseConfig",
        backbone_config=config("vitpose_backbone", out_indices=[3]),
    ),
    "vitmatte": lambda: _transformers(
        "VitMatteForImageMatting",
        "VitMatteConfig",
        backbone_config=config("vitdet", num_channels=4, out_features=["stage3"]),
        hidden_size=32,
        fusion_hidden_sizes=[32, 16, 8, 8],
    ),
    "lw_detr": lambda: _transformers(
        "LwDetrForObjectDetection",
        "LwDetrConfig",
        backbone_config=config("lw_detr_vit", out_indices=[1, 3]),
        **DETECTOR,
    ),
    "rf_detr": lambda: _transformers(
        "RfDetrForObjectDetection",
        "RfDetrConfig",
        backbone_config=config("rf_detr_dinov2", out_indices=[1, 3]),
        **DETECTOR,
    ),
    "upernet": lambda: _transformers(
        "UperNetForSemanticSegmentation",
        "UperNetConfig",
        backbone_config=config("swinv2", out_features=["stage1", "stage2"]),
        hidden_size=16,
        pool_scales=[1],
        use_auxiliary_head=False,
    ),
    "depth_anything": lambda: _transformers(
        "DepthAnythingForDepthEstimation",
        "DepthAnythingConfig",
        backbone_config=config(
            "dinov2", num_hidden_layers=4, out_indices=[1, 2, 3, 4], reshape_hidden_states=False
        ),
        reassemble_hidden_size=32,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        patch_size=8,
    ),
}
