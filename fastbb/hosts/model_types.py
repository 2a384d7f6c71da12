"""The model types of transformers' AutoBackbone, and plain vision models that load beside them."""

from dataclasses import dataclass
from typing import Literal

OLDEST = "5.9"  # transformers that the extra asks for


@dataclass(frozen=True)
class ModelType:
    """A model type of transformers.

    Attributes:
        backbone: class of transformers that computes its maps; of a model that is no backbone
            there, the class whose hidden states are the maps.
        example: a checkpoint on the Hub, which may be a model that contains the backbone.
        since: first version of transformers that has the class, if it is later than `OLDEST`.
        size: "fixed" where images must have the size of the configuration.
    """

    backbone: str
    example: str
    since: str = OLDEST
    size: Literal["any", "fixed"] = "any"


# Source: MODEL_FOR_BACKBONE_MAPPING_NAMES of transformers 5.23 and of the wheels before it.
BACKBONE_TYPES = {
    "beit": ModelType("BeitBackbone", "microsoft/beit-base-patch16-224-pt22k"),
    "bit": ModelType("BitBackbone", "google/bit-50"),
    "convnext": ModelType("ConvNextBackbone", "facebook/convnext-tiny-224"),
    "convnextv2": ModelType("ConvNextV2Backbone", "facebook/convnextv2-tiny-1k-224"),
    "dinat": ModelType("DinatBackbone", "shi-labs/dinat-mini-in1k-224"),
    "dinov2": ModelType("Dinov2Backbone", "facebook/dinov2-base"),
    "dinov2_with_registers": ModelType(
        "Dinov2WithRegistersBackbone", "facebook/dinov2-with-registers-base"
    ),
    "dinov3_convnext": ModelType(
        "DINOv3ConvNextBackbone", "facebook/dinov3-convnext-tiny-pretrain-lvd1689m"
    ),
    "dinov3_vit": ModelType("DINOv3ViTBackbone", "facebook/dinov3-vits16-pretrain-lvd1689m"),
    "focalnet": ModelType("FocalNetBackbone", "microsoft/focalnet-tiny"),
    "hgnet_v2": ModelType("HGNetV2Backbone", "ustc-community/hgnet-v2"),
    "hiera": ModelType("HieraBackbone", "facebook/hiera-base-224-hf", size="fixed"),
    "lw_detr_vit": ModelType("LwDetrViTBackbone", "AnnaZhang/lwdetr_small_60e_coco"),
    "maskformer-swin": ModelType("MaskFormerSwinBackbone", "facebook/maskformer-swin-base-ade"),
    "pixio": ModelType("PixioBackbone", "facebook/pixio-vith16"),
    "pp_lcnet": ModelType("PPLCNetBackbone", "PaddlePaddle/PP-LCNet_x1_0_doc_ori_safetensors"),
    "pp_lcnet_v3": ModelType("PPLCNetV3Backbone", "PaddlePaddle/PP-OCRv5_mobile_det_safetensors"),
    "pp_lcnet_v4": ModelType(
        "PPLCNetV4Backbone", "PaddlePaddle/PP-OCRv6_medium_det_safetensors", since="5.10"
    ),
    "pvt_v2": ModelType("PvtV2Backbone", "OpenGVLab/pvt_v2_b0"),
    "resnet": ModelType("ResNetBackbone", "microsoft/resnet-50"),
    "rf_detr_dinov2": ModelType("RfDetrDinov2Backbone", "Roboflow/rf-detr-base"),
    "rt_detr_resnet": ModelType("RTDetrResNetBackbone", "PekingU/rtdetr_r50vd"),
    "sapiens2": ModelType("Sapiens2Backbone", "facebook/sapiens2-pretrain-0.4b", since="5.10"),
    "swin": ModelType("SwinBackbone", "microsoft/swin-tiny-patch4-window7-224"),
    "swinv2": ModelType("Swinv2Backbone", "microsoft/swinv2-tiny-patch4-window8-256"),
    "textnet": ModelType("TextNetBackbone", "czczup/textnet-base"),
    "timm_backbone": ModelType("TimmBackbone", "timm/resnet50.a1_in1k"),
    "tipsv2": ModelType("Tipsv2VisionBackbone", "google/tipsv2-b14", since="5.14"),
    "tipsv2_vision_model": ModelType("Tipsv2VisionBackbone", "google/tipsv2-b14", since="5.14"),
    "uvdoc_backbone": ModelType("UVDocBackbone", "PaddlePaddle/UVDoc_safetensors"),
    "vitdet": ModelType("VitDetBackbone", "hustvl/vitmatte-small-composition-1k"),
    "vitpose_backbone": ModelType(
        "VitPoseBackbone", "usyd-community/vitpose-base-simple", size="fixed"
    ),
}

# Vision models and towers of transformers that are no AutoBackbone there.
PLAIN_TYPES = {
    "vit": ModelType("ViTModel", "google/vit-base-patch16-224"),
    "deit": ModelType("DeiTModel", "facebook/deit-base-distilled-patch16-224"),
    "clip_vision_model": ModelType("CLIPVisionModel", "openai/clip-vit-base-patch32"),
    "siglip_vision_model": ModelType("SiglipVisionModel", "google/siglip-base-patch16-224"),
}
