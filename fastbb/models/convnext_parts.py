"""The parts that the forward of ConvNeXt takes, and builders of them for the models of libraries.

Builders find and check layers once. Tensors, eps and the settings of convolutions are read at every
call.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from .layers import DropPath, cuts_patches
from .parts import Refused, activation_of

TRANSFORMERS_GRN_EPS = 1e-6


class LayerNames(NamedTuple):
    """Names of the layers of a block in transformers."""

    conv: str
    norm: str
    fc1: str
    act: str
    fc2: str
    scale: str


TRANSFORMERS_NAMES = LayerNames(
    "dwconv", "layernorm", "pwconv1", "act", "pwconv2", "layer_scale_parameter"
)
DINOV3_NAMES = LayerNames(
    *("depthwise_conv", "layer_norm", "pointwise_conv1", "activation_fn", "pointwise_conv2"),
    scale="gamma",
)


@dataclass(frozen=True)
class ConvNextBlockParts:
    """The layers of a block.

    Attributes:
        owner: the block; derived weights are cached for it.
        conv: depthwise convolution.
        norm: of its result, over the channels.
        fc1: first layer of the MLP, linear or a 1x1 convolution.
        fc2: second layer of the MLP, of the same kind.
        activation: between them.
        grn: global response normalization before `fc2`, with `weight` and `bias` of F elements, or
            None.
        grn_eps: added to the mean of its norms.
        scale_name: attribute of the owner with the layer scale [C], or None.
        drop_path: stochastic depth of the branch, or None where none can be in training.
    """

    owner: nn.Module
    conv: nn.Conv2d
    norm: nn.LayerNorm
    fc1: nn.Linear | nn.Conv2d
    fc2: nn.Linear | nn.Conv2d
    activation: str
    grn: Any = None
    grn_eps: float = TRANSFORMERS_GRN_EPS
    scale_name: str | None = None
    drop_path: nn.Module | None = None

    def scale(self) -> Tensor | None:
        """Reads the layer scale for a call."""
        return None if self.scale_name is None else getattr(self.owner, self.scale_name)

    def drop_rate(self) -> float:
        """Reads the rate of stochastic depth for a call; 0 in inference."""
        path = self.drop_path
        return path.drop_prob if isinstance(path, DropPath) and path.training else 0.0


def matrix(layer: nn.Linear | nn.Conv2d) -> Tensor:
    """The weight [C_out, C] of a linear layer or a 1x1 convolution."""
    return layer.weight if layer.weight.ndim == 2 else layer.weight.flatten(1)


class PatchParts(NamedTuple):
    """A convolution of patches and a layer norm of maps: the stem, or a downsampling.

    Attributes:
        conv: whose kernel is its stride.
        norm: over the channels.
        norm_first: whether the norm is before the convolution (a downsampling).
    """

    conv: nn.Conv2d
    norm: nn.LayerNorm
    norm_first: bool

    def layers(self) -> tuple[nn.Module, nn.Module]:
        """The layers in the order of their calls, both of maps [B, C, H, W]."""
        return (self.norm, self.conv) if self.norm_first else (self.conv, self.norm)


# what is before the blocks of a stage; modules are called one after the other
Before = PatchParts | tuple[nn.Module, ...]


class ConvNextStageParts(NamedTuple):
    """A stage.

    Attributes:
        before: the downsampling.
        blocks: in order of depth; a module is called, and may stand for several blocks.
    """

    before: Before
    blocks: tuple[ConvNextBlockParts | nn.Module, ...]


class ConvNextParts(NamedTuple):
    """A ConvNeXt.

    Attributes:
        stem: before all stages; empty where the first stage has it.
        stages: in order of depth.
        has_stem: whether map 0 is the result of the stem; otherwise it is the first stage.
    """

    stem: Before
    stages: tuple[ConvNextStageParts, ...]
    has_stem: bool = True


def check_block(parts: ConvNextBlockParts) -> ConvNextBlockParts:
    """Returns the parts of a block whose layers the ops cover.

    Raises:
        Refused: the ops do not cover them.
    """
    if any(layer.bias is None for layer in (parts.conv, parts.fc1, parts.fc2)):
        raise Refused("a layer of it has no bias")
    channels = parts.conv.out_channels
    shapes = [tuple(matrix(layer).shape) for layer in (parts.fc1, parts.fc2)]
    if shapes[0] != shapes[1][::-1] or shapes[1][0] != channels:
        raise Refused("its MLP has other shapes")
    return parts


# --- the layers of other libraries


def transformers_block(block: Any) -> ConvNextBlockParts:
    """Reads a ConvNextLayer, ConvNextV2Layer or DINOv3ConvNextLayer.

    Raises:
        Refused: the ops do not cover the module. The other builders raise it too.
    """
    names = DINOV3_NAMES if hasattr(block, DINOV3_NAMES.conv) else TRANSFORMERS_NAMES
    conv, norm, fc1, act, fc2 = (getattr(block, name) for name in names[:5])
    scale = getattr(block, names.scale, None)
    return read_block(
        block,
        (conv, norm, fc1, fc2),
        activation=act,
        grn=getattr(block, "grn", None),
        scale_name=None if scale is None else names.scale,
    )


def transformers_parts(backbone: Any) -> ConvNextParts:
    """Reads transformers' ConvNextBackbone, ConvNextV2Backbone or DINOv3ConvNextBackbone."""
    stem: Before = ()
    if hasattr(backbone, "embeddings"):
        embeddings = backbone.embeddings
        stem = read_patches(embeddings.patch_embeddings, embeddings.layernorm)
        stages, before_name = backbone.encoder.stages, "downsampling_layer"
    else:
        stages, before_name = backbone.model.stages, "downsample_layers"
    read = []
    for stage in stages:
        layers = getattr(stage, before_name)
        before = read_patches(*layers) if len(layers) else ()
        read.append(ConvNextStageParts(before, tuple(map(transformers_block, stage.layers))))
    return ConvNextParts(stem, tuple(read))


def read_block(
    block: nn.Module,
    layers: tuple[Any, Any, Any, Any],
    activation: nn.Module,
    grn: Any,
    scale_name: str | None,
) -> ConvNextBlockParts:
    """Builds the parts of a block of a library after a check that the ops cover its layers.

    Args:
        block: their owner.
        layers: depthwise convolution, norm and both layers of the MLP.
        activation: of the MLP.
        grn: global response normalization, or None.
        scale_name: see `ConvNextBlockParts`.
    """
    conv, norm, fc1, fc2 = layers
    is_map = isinstance(fc1, nn.Conv2d)  # the MLP is made of 1x1 convolutions
    check_norm(norm, of_maps=is_map)
    if type(conv) is not nn.Conv2d:
        raise Refused(f"its depthwise convolution is a {type(conv).__name__}")
    for layer in (fc1, fc2):
        if type(layer) is not (nn.Conv2d if is_map else nn.Linear):
            raise Refused(f"a layer of its MLP is a {type(layer).__name__}")
        if isinstance(layer, nn.Conv2d) and (
            layer.kernel_size != (1, 1) or not cuts_patches(layer)
        ):
            raise Refused("its MLP has convolutions of several pixels")
    if grn is not None and type(grn).__name__ not in ("ConvNextV2GRN", "GlobalResponseNorm"):
        raise Refused(f"a {type(grn).__name__} is inside it")
    return check_block(
        ConvNextBlockParts(
            block,
            *(conv, norm, fc1, fc2),
            activation=activation_of(activation),
            grn=grn,
            grn_eps=getattr(grn, "eps", TRANSFORMERS_GRN_EPS),
            scale_name=scale_name,
        )
    )


def read_patches(first: Any, second: Any) -> PatchParts:
    """Reads a convolution of patches and a norm of maps, in either order."""
    norm_first = not isinstance(first, nn.Conv2d)
    norm, conv = (first, second) if norm_first else (second, first)
    check_norm(norm, of_maps=True)
    if type(conv) is not nn.Conv2d or not cuts_patches(conv):
        raise Refused("its convolution does not cut patches")
    return PatchParts(conv, norm, norm_first)


def check_norm(norm: Any, of_maps: bool) -> None:
    """Raises `Refused` unless a module is a layer norm over the last axis, or channels of maps."""
    layout = getattr(norm, "data_format", None)  # of transformers' own class
    if layout is None:
        layout = "channels_first" if type(norm).__name__ == "LayerNorm2d" else "channels_last"
    known = type(norm).__name__.endswith(("LayerNorm", "LayerNorm2d"))
    if not (isinstance(norm, nn.LayerNorm) and known and (layout == "channels_first") is of_maps):
        raise Refused(f"a {type(norm).__name__} is one of its norms")
    if norm.weight is None or norm.bias is None:
        raise Refused("a norm of it has no weight or bias")
