"""Tiny random models of timm, torchvision and segmentation-models-pytorch."""

from typing import Any

import segmentation_models_pytorch as smp
import timm
from host_matrix import Host, host
from reference_models import images, randomize_, torchvision_swin
from torch import nn
from torchvision.models import resnet as tv_resnet
from torchvision.models import segmentation as tv_segmentation
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FCOS, FasterRCNN, KeypointRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection._utils import overwrite_eps
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

TIMM_SWIN = "swin_tiny_patch4_window7_224"
SWIN_DEPTHS = (2, 1, 1, 2)
TIMM_SWIN_SIZES: dict[str, Any] = {
    "embed_dim": 16,
    "depths": SWIN_DEPTHS,
    "num_heads": (2, 4, 8, 16),
}
TIMM_RESNET_SIZES: dict[str, Any] = {"layers": (2, 1, 1, 1), "channels": (8, 16, 24, 32)}
RESNET_BLOCKS, RESNET18_BLOCKS = 5, 8


# --- timm


def timm_model(name: str, **settings: Any) -> nn.Module:
    return randomize_(timm.create_model(name, pretrained=False, **settings))


def timm_swin(**settings: Any) -> nn.Module:
    return timm_model(TIMM_SWIN, img_size=(72, 60), **TIMM_SWIN_SIZES, **settings)


def timm_swin_parts(prefix: str) -> tuple[str, ...]:
    """Names of blocks and mergings; a stage of timm starts with its merging."""
    names = []
    for stage, depth in enumerate(SWIN_DEPTHS):
        names += [f"{prefix}{stage}.downsample"] if stage else []
        names += [f"{prefix}{stage}.blocks.{i}" for i in range(depth)]
    return tuple(names)


@host
def timm_resnet18() -> Host:
    model = timm_model("resnet18", num_classes=5, **TIMM_RESNET_SIZES)
    return Host(model, (images(70, 61),), ("",), RESNET_BLOCKS)


@host
def timm_resnet50d() -> Host:
    model = timm_model("resnet50d", num_classes=5, **TIMM_RESNET_SIZES)
    return Host(model, (images(70, 61),), ("",), RESNET_BLOCKS)


@host
def timm_swin_classifier() -> Host:
    model = timm_swin(num_classes=5)
    return Host(model, (images(72, 60),), timm_swin_parts("layers."), head="smooth")


def timm_convnext(**settings: Any) -> Host:
    sizes = {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 24), "num_classes": 5}
    model = timm_model("convnext_tiny", **sizes, **settings)
    parts = tuple(
        f"stages.{b}"
        for b in ("0.blocks.0", "1.blocks.0", "2.blocks.0", "2.blocks.1", "3.blocks.0")
    )
    return Host(model, (images(70, 61),), parts, head="smooth")


@host
def timm_convnext_classifier() -> Host:
    return timm_convnext()


@host
def timm_convnext_of_1x1_convolutions_with_grn() -> Host:
    return timm_convnext(conv_mlp=True, use_grn=True, ls_init_value=None)


@host
def timm_resnet_features() -> Host:
    model = timm_model("resnet50", features_only=True, **TIMM_RESNET_SIZES)
    return Host(model, (images(70, 61),), ("",), RESNET_BLOCKS)


@host
def timm_swin_features() -> Host:
    model = timm_swin(features_only=True)
    return Host(model, (images(72, 60),), timm_swin_parts("layers_"), head="smooth")


@host
def timm_resnet_forward_features() -> Host:
    model = timm_model("resnet50", num_classes=5, **TIMM_RESNET_SIZES)
    return Host(model, (images(70, 61),), ("",), RESNET_BLOCKS, method="forward_features")


@host
def timm_swin_forward_features() -> Host:
    parts = timm_swin_parts("layers.")
    return Host(timm_swin(), (images(72, 60),), parts, head="smooth", method="forward_features")


@host
def timm_resnet_forward_intermediates() -> Host:
    model = timm_model("resnet50", num_classes=5, **TIMM_RESNET_SIZES)
    return Host(model, (images(70, 61),), ("",), RESNET_BLOCKS, method="forward_intermediates")


@host
def timm_swin_forward_intermediates() -> Host:
    parts = timm_swin_parts("layers.")
    return Host(
        timm_swin(), (images(72, 60),), parts, head="smooth", method="forward_intermediates"
    )


def timm_folded(name: str, **settings: Any) -> Host:
    """Model that is only folded; its tolerance is 1e-4."""
    return Host(timm_model(name, **settings), (images(70, 61),), ("",), rel=1e-4)


@host
def timm_mobilenetv3() -> Host:
    return timm_folded("mobilenetv3_small_050")


@host
def timm_efficientnet_features() -> Host:
    return timm_folded("test_efficientnet", features_only=True)


@host
def timm_mobilenetv3_features() -> Host:
    return timm_folded("mobilenetv3_small_050", features_only=True)


@host
def timm_regnet() -> Host:
    return timm_folded("regnetx_002")


# --- torchvision


def resnet(block: Any = tv_resnet.Bottleneck, **settings: Any) -> tv_resnet.ResNet:
    """torchvision's ResNet; widths are fixed, depths are not."""
    return tv_resnet.ResNet(block, [2, 1, 1, 1], num_classes=5, **settings)


@host
def torchvision_resnet18() -> Host:
    return Host(randomize_(resnet(tv_resnet.BasicBlock)), (images(70, 61),), ("",), RESNET_BLOCKS)


@host
def torchvision_resnet50() -> Host:
    return Host(randomize_(resnet()), (images(70, 61),), ("",), RESNET_BLOCKS)


@host
def torchvision_swin_classifier() -> Host:
    names = []
    for stage, depth in enumerate(SWIN_DEPTHS):
        names += [f"features.{2 * stage}"] if stage else []
        names += [f"features.{2 * stage + 1}.{i}" for i in range(depth)]
    return Host(
        torchvision_swin(depths=SWIN_DEPTHS), (images(70, 61),), tuple(names), head="smooth"
    )


def detector(cls: Any, eps: float | None = None, **settings: Any) -> Host:
    """Detector with frozen norms and first layers, as pretrained; those of COCO set eps to 0."""
    body = resnet(norm_layer=FrozenBatchNorm2d)
    for module in (body.conv1, body.layer1):
        module.requires_grad_(False)
    levels, more = [1, 2, 3, 4], None
    if cls in (RetinaNet, FCOS):
        levels, more = [2, 3, 4], LastLevelP6P7(32, 32)
    layers = {f"layer{level}": str(level) for level in levels}
    channels = [128 * 2**level for level in levels]
    backbone = BackboneWithFPN(body, layers, channels, 32, more)
    model = randomize_(cls(backbone, min_size=64, max_size=96, **settings))
    if eps is not None:
        overwrite_eps(model, eps)
        norms: list[Any] = [m for m in body.modules() if isinstance(m, FrozenBatchNorm2d)]
        for norm in norms:  # so small that an eps is seen
            norm.running_var *= 1e-4
            norm.weight *= 1e-2
    pixels = images(70, 61).sigmoid()
    inputs = ([pixels[0], pixels[1, :, :50]],)  # of two sizes
    return Host(model, inputs, ("backbone.body",), RESNET_BLOCKS, "discrete")


def two_stage(cls: Any, eps: float | None = None, **settings: Any) -> Host:
    return detector(
        cls,
        eps,
        box_head=TwoMLPHead(32 * 7 * 7, 32),
        box_predictor=FastRCNNPredictor(32, 4),
        box_score_thresh=0.0,
        box_detections_per_img=5,
        rpn_post_nms_top_n_test=20,
        **settings,
    )


def one_stage(cls: Any, eps: float | None = None) -> Host:
    few = {"score_thresh": 0.0, "detections_per_img": 5, "topk_candidates": 20}
    return detector(cls, eps, num_classes=4, **few)


@host
def torchvision_fasterrcnn() -> Host:
    return two_stage(FasterRCNN)


@host
def torchvision_fasterrcnn_eps_0() -> Host:
    return two_stage(FasterRCNN, eps=0.0)


@host
def torchvision_maskrcnn() -> Host:
    head, predictor = MaskRCNNHeads(32, (16, 16), 1), MaskRCNNPredictor(16, 16, 4)
    return two_stage(MaskRCNN, eps=0.0, mask_head=head, mask_predictor=predictor)


@host
def torchvision_keypointrcnn() -> Host:
    head, predictor = KeypointRCNNHeads(32, (16, 16)), KeypointRCNNPredictor(16, 3)
    return two_stage(KeypointRCNN, eps=0.0, keypoint_head=head, keypoint_predictor=predictor)


@host
def torchvision_retinanet() -> Host:
    return one_stage(RetinaNet, eps=0.0)


@host
def torchvision_fcos() -> Host:
    return one_stage(FCOS)


def dilated(cls: Any, head: nn.Module) -> Host:
    body = resnet(replace_stride_with_dilation=[False, True, True])
    backbone = IntermediateLayerGetter(body, {"layer4": "out", "layer3": "aux"})
    model = cls(backbone, head, FCNHead(1024, 3))
    return Host(randomize_(model), (images(45, 37),), ("backbone",), RESNET_BLOCKS, "smooth")


@host
def torchvision_deeplabv3() -> Host:
    return dilated(tv_segmentation.DeepLabV3, DeepLabHead(2048, 3, atrous_rates=(2,)))


@host
def torchvision_fcn() -> Host:
    return dilated(tv_segmentation.FCN, FCNHead(2048, 3))


# --- segmentation-models-pytorch: sizes are multiples of 32

UNET = {"encoder_weights": None, "decoder_channels": (32, 16, 16, 8, 8), "classes": 3}
SMP_SWIN: dict[str, Any] = {"img_size": (64, 96), **TIMM_SWIN_SIZES}


@host
def smp_unet_resnet18() -> Host:
    model = smp.Unet("resnet18", **UNET)
    return Host(randomize_(model), (images(64, 96),), ("encoder",), RESNET18_BLOCKS, "smooth")


@host
def smp_unet_swin() -> Host:
    model = smp.Unet(f"tu-{TIMM_SWIN}", **UNET, **SMP_SWIN)
    parts = timm_swin_parts("encoder.model.layers_")
    frozen = ("encoder",)
    return Host(randomize_(model), (images(64, 96),), parts, head="smooth", frozen=frozen)


@host
def smp_encoder_resnet18() -> Host:
    encoder = smp.encoders.get_encoder("resnet18", weights=None)
    return Host(randomize_(encoder), (images(64, 96),), ("",), RESNET18_BLOCKS)


@host
def smp_encoder_timm_resnet() -> Host:
    encoder = smp.encoders.get_encoder("tu-resnet50", weights=None, **TIMM_RESNET_SIZES)
    return Host(randomize_(encoder), (images(64, 96),), ("",), RESNET_BLOCKS)


@host
def smp_encoder_swin() -> Host:
    encoder = smp.encoders.get_encoder(f"tu-{TIMM_SWIN}", weights=None, **SMP_SWIN)
    parts = timm_swin_parts("model.layers_")
    return Host(randomize_(encoder), (images(64, 96),), parts, head="smooth")
