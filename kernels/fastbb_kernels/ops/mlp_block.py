"""The MLP half of a Swin or ConvNeXt block: norm, two linear layers, layer scale, residual.

Algorithm: y = residual + scale * fc2(activation(fc1(layer_norm(x)))), for some rows at a time;
neither the normalized rows nor the hidden ones are stored. Swin's residual is x. Swin V2 has the
norm after the layers: y = x + layer_norm(fc2(activation(fc1(x)))).
Bound: memory at Swin's first two stages (read x, write y); at more channels re-reading the weights
for every block of rows costs more than it saves, and the separate ops run.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .._activation import Activation, activate, check_activation
from .._dispatch import Architecture, Impl, architecture, common_unsupported
from ..op import Op
from .conv1x1_bn_act import linear
from .layer_norm_linear import LayerNormLinear, layer_norm_linear
from .linear_norm_residual import LinearNormResidual, linear_norm_residual
from .linear_residual import LinearResidual, linear_residual

# most channels that compile without spilling registers
_MOST_CHANNELS: dict[Architecture, int] = {
    80: 192,
    86: 192,
    89: 192,
    90: 256,
    100: 256,
    120: 192,
    "gfx90a": 256,
    "gfx942": 256,
}
# most channels of a ConvNeXt block (one with a residual of its own) with many rows: its programs
# take 64 rows, so that weights are read as often as by the tiles of the separate ops
_MOST_CHANNELS_OF_MANY_ROWS: dict[Architecture, int] = {90: 384, 100: 384}
# about one program per multiprocessor
_MANY_ROWS = 64 * 128
# with fewer, most multiprocessors have nothing to do, and the parts have more programs
_ENOUGH_ROWS = 64 * 32


def mlp_block(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 1e-5,
    activation: Activation = "gelu",
    post_norm: bool = False,
    norm_linear: Callable[..., Tensor] = layer_norm_linear,
    impl: Impl | None = None,
) -> Tensor:
    """Computes `residual + scale * fc2(activation(fc1(layer_norm(x))))`.

    With `post_norm`, it computes `residual + layer_norm(fc2(activation(fc1(x))))`.

    If the kernel of this op cannot run, the ops `layer_norm_linear` and `linear_residual` run
    (`linear` and `linear_norm_residual` with `post_norm`), with the same `impl`. "auto" also takes
    these two on a GPU for less than 2048 rows.

    Args:
        x: [..., C] floating point, any strides.
        norm_weight: [C].
        norm_bias: [C].
        fc1_weight: [F, C].
        fc1_bias: [F] or None.
        fc2_weight: [C, F].
        fc2_bias: [C] or None.
        residual: [..., C], any strides; None: `x`.
        scale: layer scale [C], or None; not with `post_norm`.
        eps: added to the variance.
        activation: name of the activation, or None.
        post_norm: whether the norm comes after the layers, before the residual.
        norm_linear: computes the norm and the first layer where the parts run, by the arguments of
            `layer_norm_linear`.
        impl: implementation to use; default: that of `use_impl`.

    Returns:
        [..., C], dtype of `x`.

    Raises:
        ValueError: shapes that do not fit together, or no such activation.
        NotImplementedError: `impl="triton"` cannot run this call; the message says why.
    """
    call = MlpBlock(
        *(x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias),
        *(residual, scale, eps, activation, post_norm),
    )
    call.check()
    if _op.takes(call, impl):
        return _op.kernel(call)
    residual = x if residual is None else residual
    if post_norm:
        hidden = linear(x, fc1_weight, fc1_bias, activation=activation, impl=impl)
        norm = norm_weight, norm_bias
        return linear_norm_residual(
            hidden, fc2_weight, fc2_bias, *norm, residual, eps=eps, impl=impl
        )
    hidden = norm_linear(*call[:5], eps=eps, activation=activation, impl=impl)
    return linear_residual(hidden, fc2_weight, fc2_bias, residual, scale, impl=impl)


class MlpBlock(NamedTuple):
    """A call of `mlp_block`."""

    x: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor | None
    fc2_weight: Tensor
    fc2_bias: Tensor | None
    residual: Tensor | None
    scale: Tensor | None
    eps: float
    activation: Activation
    post_norm: bool = False

    def check(self) -> None:
        x, fc1_weight = self.x, self.fc1_weight
        if fc1_weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != fc1_weight.shape[1]:
            raise ValueError(
                "mlp_block: fc1_weight must be [F, C] for x [..., C], "
                f"got fc1_weight {list(fc1_weight.shape)} and x {list(x.shape)}"
            )
        F, C = fc1_weight.shape
        shapes: dict[str, tuple[Tensor | None, list[int]]] = {
            "norm_weight": (self.norm_weight, [C]),
            "norm_bias": (self.norm_bias, [C]),
            "fc1_bias": (self.fc1_bias, [F]),
            "fc2_weight": (self.fc2_weight, [C, F]),
            "fc2_bias": (self.fc2_bias, [C]),
            "scale": (self.scale, [C]),
        }
        for name, (tensor, shape) in shapes.items():
            if tensor is not None and list(tensor.shape) != shape:
                raise ValueError(
                    f"mlp_block: {name} must be {shape} for fc1_weight {[F, C]}, "
                    f"got {list(tensor.shape)}"
                )
        if self.residual is not None and self.residual.shape != x.shape:
            raise ValueError(
                f"mlp_block: residual must be {list(x.shape)}, got {list(self.residual.shape)}"
            )
        if self.post_norm and self.scale is not None:
            raise ValueError("mlp_block: scale must be None with post_norm")
        check_activation("mlp_block", self.activation)

    def eager(self) -> Tensor:
        residual = self.x if self.residual is None else self.residual
        if self.post_norm:
            hidden = activate(F.linear(self.x, self.fc1_weight, self.fc1_bias), self.activation)
            layer, norm = (self.fc2_weight, self.fc2_bias), (self.norm_weight, self.norm_bias)
            return LinearNormResidual(hidden, *layer, *norm, residual, self.eps).eager()
        hidden = LayerNormLinear(*self[:5], self.eps, self.activation).eager()
        return LinearResidual(hidden, self.fc2_weight, self.fc2_bias, residual, self.scale).eager()

    def unsupported(self) -> str | None:
        reason = common_unsupported(self)
        if reason is not None:
            return reason
        hidden, channels = self.fc1_weight.shape
        if channels % 32 or hidden % 64:
            return (
                "needs a multiple of 32 channels and of 64 hidden channels, "
                f"got {channels} and {hidden}"
            )
        arch = architecture(self.x.device)
        if arch is None:  # the interpreter has no limits
            return None
        if self.x.dtype == torch.float32:
            return "needs fp16 or bf16: fp32 products spill registers, and are not bound by memory"
        most = _MOST_CHANNELS.get(arch, 0)
        if self.residual is not None and self.x.numel() >= _MANY_ROWS * channels:
            most = _MOST_CHANNELS_OF_MANY_ROWS.get(arch, most)
        if channels > most:
            return f"needs at most {most} channels on {arch}, got {channels}: more spill registers"
        return None

    def pays(self) -> bool:
        """Whether the kernel is expected to be faster than those of the separate ops."""
        has_work = self.x.numel() >= _ENOUGH_ROWS * self.x.shape[-1]
        return has_work or architecture(self.x.device) is None

    def n_bytes(self) -> int:
        """Counts x, residual and parameters read once, y written once."""
        read = (tensor for tensor in self[:9] if tensor is not None)
        n_elements = self.x.numel() + sum(tensor.numel() for tensor in read)
        return self.x.element_size() * n_elements

    def empty_result(self) -> Tensor:
        return self.x.new_empty(self.x.shape)

    def launch(self) -> Tensor:
        from ..triton_kernels.mlp_block import launch

        return launch(*self)


_op = Op("mlp_block", MlpBlock, is_block=True)
