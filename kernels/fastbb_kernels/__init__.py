"""Ops of vision backbones. `__all__` is the public API; each op is one file in `ops/`."""

from typing import TYPE_CHECKING

from ._activation import ACTIVATIONS
from ._dispatch import Impl, KernelWarning, use_impl
from ._window_geometry import WindowGeometry, relative_position_index
from .op import find_op, op_names
from .ops.bias_act import bias_act
from .ops.bottleneck_tail import bottleneck_tail
from .ops.conv1x1_bn_act import conv1x1_bn_act
from .ops.conv1x1_dual import conv1x1_dual
from .ops.conv3x3_bn_act import conv3x3_bn_act
from .ops.conv_bn_act import conv_bn_act, conv_op
from .ops.depthwise_conv_bn_act import depthwise_conv_bn_act
from .ops.folded_norm_linear import fold_norm, folded_norm_linear
from .ops.layer_norm_linear import layer_norm_linear
from .ops.layer_norm_nchw import layer_norm_nchw
from .ops.linear_residual import linear_residual
from .ops.mlp_block import mlp_block
from .ops.patch_embed import patch_embed
from .ops.patch_merging import patch_merging
from .ops.stem_conv_bn_relu_pool import stem_conv_bn_relu_pool
from .ops.swin_attention_block import swin_attention_block
from .ops.window_attention import window_attention, window_attention_weights

__all__ = [
    "ACTIVATIONS",
    "Impl",
    "KernelWarning",
    "WindowGeometry",
    "bias_act",
    "bottleneck_tail",
    "conv1x1_bn_act",
    "conv1x1_dual",
    "conv3x3_bn_act",
    "conv_bn_act",
    "conv_op",
    "depthwise_conv_bn_act",
    "fold_norm",
    "folded_norm_linear",
    "layer_norm_linear",
    "layer_norm_nchw",
    "linear_residual",
    "mlp_block",
    "patch_embed",
    "patch_merging",
    "relative_position_index",
    "stem_conv_bn_relu_pool",
    "swin_attention_block",
    "use_impl",
    "window_attention",
    "window_attention_weights",
]


if not TYPE_CHECKING:  # type checkers know the names above, and an op in its own module

    def __getattr__(name):
        """Imports an op of `ops/` that has no line above."""
        if name in op_names():
            return find_op(name).call
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
