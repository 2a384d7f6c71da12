"""Layers that families share: patches, norms of maps, convolutions with norms, stochastic depth."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastbb_kernels import ACTIVATIONS, Impl, conv_bn_act, layer_norm_linear
from fastbb_kernels._activation import Activation
from fastbb_kernels._dispatch import is_plainly_eager
from fastbb_kernels.onednn import packed_conv, packs
from fastbb_kernels.ops.folded_norm_linear import fold_norm, folds_norm, run_folded

from ..weights.derived import derive_if_kept, is_tracing, is_transformed
from ..weights.folded_weights import (
    autocasts,
    folded,
    folded_packed,
    geometry,
    runs_folded,
    runs_packed,
)
from .parts import NativeModule


def drop_path(x: Tensor, rate: float, training: bool = True) -> Tensor:
    """Drops whole samples of a residual branch (stochastic depth, Huang et al. 2016).

    Args:
        x: [B, ...].
        rate: probability of dropping a sample; the others are scaled up.
        training: False returns `x` as it is.
    """
    if rate == 0.0 or not training:
        return x
    keep = 1.0 - rate
    shape = (x.shape[0],) + (1,) * (x.ndim - 1)
    return x.div(keep) * (keep + torch.rand(shape, dtype=x.dtype, device=x.device)).floor_()


class DropPath(NativeModule):
    """Stochastic depth: drops whole samples of a residual branch."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        return drop_path(x, self.drop_prob, self.training)

    def extra_repr(self) -> str:
        return f"p={self.drop_prob}"


class MapLayerNorm(NativeModule, nn.LayerNorm):
    """Layer norm over the channels of a map [B, C, H, W]."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    dropout: float,
    attentions: list[Tensor] | None,
) -> Tensor:
    """Attention of all tokens to all tokens.

    Args:
        q: queries [B, num_heads, N, head_dim].
        k: keys of the same shape.
        v: values of the same shape.
        bias: [1, num_heads, N, N], added to the scores, or None.
        dropout: of the attention weights.
        attentions: list to append these [B, num_heads, N, N] to, or None.

    Returns:
        [B, N, C].
    """
    if attentions is None:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    else:
        scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
        scores = scores if bias is None else scores + bias
        attention = F.dropout(F.softmax(scores, dim=-1), dropout)
        attentions.append(attention)
        y = attention.to(v.dtype) @ v
    return y.transpose(1, 2).flatten(2)


def cuts_patches(projection: nn.Conv2d) -> bool:
    """Whether a convolution computes non-overlapping patches without padding, as `patch_embed`."""
    settings = (
        projection.stride,
        projection.padding,
        projection.dilation,
        projection.groups,
        projection.padding_mode,
    )
    return settings == (projection.kernel_size, (0, 0), (1, 1), 1, "zeros")


def runs_packed_linears(x: Tensor, weight: Tensor, tensors: Sequence[Tensor]) -> bool:
    """Whether a call may multiply by packed weights: it is eager inference on a CPU.

    Args:
        x: input of the call.
        weight: one of the weights that would be packed.
        tensors: all parameters that the call reads.
    """
    if is_tracing() or type(x) is not Tensor or is_transformed(x):
        return False
    if not is_plainly_eager(x, None) or x.device.type != "cpu" or not x.numel():
        return False
    if not packs(x.dtype) or autocasts("cpu"):
        return False
    if weight.dtype != x.dtype or weight.is_inference():
        return False  # tensors derived from inference tensors could not be cached
    return not torch.is_grad_enabled() or not (
        x.requires_grad or any(tensor.requires_grad for tensor in tensors)
    )


def scaled_linear(
    weight: Tensor, bias: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias of a linear layer with the layer scale [out] after it."""
    if scale is None:
        return weight, bias
    exact = scale.double()
    weight = (exact[:, None] * weight).to(weight.dtype)
    return weight, None if bias is None else (exact * bias).to(bias.dtype)


def is_foldable(norm: nn.Module | None) -> bool:
    """Whether a module is exactly a batch norm, or a frozen one of any library."""
    return type(norm) is nn.BatchNorm2d or type(norm).__name__.endswith("FrozenBatchNorm2d")


class ConvNorm(NamedTuple):
    """A convolution and the batch norm after it."""

    conv: nn.Conv2d
    norm: nn.Module

    def __call__(
        self,
        x: Tensor,
        activation: str | None = None,
        residual: Tensor | None = None,
        hidden: bool = False,
    ) -> Tensor:
        """Convolves, normalizes, adds the residual and activates, in one op in inference.

        Args:
            x: [B, C_in, H, W].
            activation: name of the activation, or None.
            residual: [B, C, h, w], added before the activation, or None.
            hidden: whether only another convolution reads the result, see `packed_conv`.

        Returns:
            [B, C, h, w].
        """
        conv = self.conv
        if not runs_folded(conv, self.norm, x):
            x = self.norm(conv(x))
            x = x if residual is None else x + residual
            return x if activation is None else ACTIVATIONS[activation](x)
        options = {**geometry(conv), "activation": activation}
        if not runs_packed(conv, x) or (residual is not None and conv.groups > 1):
            return conv_bn_act(x, *folded(conv, self.norm), residual=residual, **options)
        x = x.contiguous(memory_format=torch.channels_last)
        if residual is not None:
            residual = residual.contiguous(memory_format=torch.channels_last)
        packed, bias = folded_packed(conv, self.norm, x)
        return packed_conv(x, packed, bias, residual=residual, hidden=hidden, **options)


# modules whose weights could not be folded for lack of memory
_without_memory: WeakSet[nn.Module] = WeakSet()


def norm_linear(owner: nn.Module, name: str) -> Callable[..., Tensor]:
    """Makes `layer_norm_linear` for one layer, which folds the norm for inference on a GPU.

    The folded weight is a copy in memory. If there is none left for it at the first call, the norms
    of the module are not folded.

    Args:
        owner: module that folded weights are cached for.
        name: of the layer inside it.
    """
    key = f"{name} with its norm"

    def run(
        x: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        eps: float,
        activation: Activation = None,
        impl: Impl | None = None,
    ) -> Tensor:
        tensors = norm_weight, norm_bias, weight, bias
        options: Any = {"eps": eps, "activation": activation}
        # in a compiled graph the weight would be folded in every call
        plain = impl is not None or torch.compiler.is_compiling()
        if not plain and folds_norm(x, *tensors, **options):
            sources = [tensor for tensor in tensors if tensor is not None]
            folded = None
            if owner not in _without_memory:
                try:
                    folded = derive_if_kept(owner, key, fold_norm, *sources)
                except torch.OutOfMemoryError:
                    _without_memory.add(owner)  # another try would fail as slowly
            if folded is None and x.is_cuda and torch.cuda.is_current_stream_capturing():
                folded = fold_norm(*sources)  # the graph computes it, as other derived weights
            if folded is not None:
                return run_folded(x, folded, **options)
        return layer_norm_linear(x, *tensors, **options, impl=impl)

    return run
