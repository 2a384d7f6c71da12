"""The MLP half of a Swin block: norm, two linear layers with an activation between, residual.

Algorithm: y = x + fc2(activation(fc1(layer_norm(x)))), for some rows at a time, so that neither the
normalized rows nor the hidden ones exist in memory.
Bound: memory at Swin's first two stages (read x, write y); at more channels re-reading the weights
for every block of rows costs more than it saves, and the separate ops run.
"""

import torch
from torch import Tensor

from .._activation import Activation, check_activation
from .._dispatch import (
    Architecture,
    Impl,
    architecture,
    common_unsupported,
    launches_directly,
    use_block,
)
from ..launching import launches
from .layer_norm_linear import layer_norm_linear, layer_norm_linear_eager
from .linear_residual import linear_residual, linear_residual_eager

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


def swin_mlp_block(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    eps: float = 1e-5,
    activation: Activation = "gelu",
    impl: Impl | None = None,
) -> Tensor:
    """Computes `x + fc2(activation(fc1(layer_norm(x))))`.

    Where its own kernel does not run, the two ops `layer_norm_linear` and `linear_residual` do,
    each by the same `impl`.

    Args:
        x: [..., C] floating point, any strides.
        norm_weight: [C].
        norm_bias: [C].
        fc1_weight: [F, C].
        fc1_bias: [F] or None.
        fc2_weight: [C, F].
        fc2_bias: [C] or None.
        eps: added to the variance.
        activation: name of the activation, or None.
        impl: implementation to use; default: that of `use_impl`.

    Returns:
        [..., C], dtype of `x`.

    Raises:
        ValueError: shapes that do not fit together, or no such activation.
        NotImplementedError: `impl="triton"` cannot run this call; the message says why.
    """
    tensors = (x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    _check(*tensors, activation)
    unsupported = swin_mlp_block_unsupported(*tensors, eps=eps, activation=activation)
    if use_block("swin_mlp_block", impl, unsupported, x):
        run = _launch if launches_directly() else _swin_mlp_block
        return run(*tensors, eps, activation)
    hidden = layer_norm_linear(
        x,
        norm_weight,
        norm_bias,
        fc1_weight,
        fc1_bias,
        eps=eps,
        activation=activation,
        impl=impl,
    )
    return linear_residual(hidden, fc2_weight, fc2_bias, x, impl=impl)


def swin_mlp_block_eager(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    eps: float = 1e-5,
    activation: Activation = "gelu",
) -> Tensor:
    hidden = layer_norm_linear_eager(
        x, norm_weight, norm_bias, fc1_weight, fc1_bias, eps=eps, activation=activation
    )
    return linear_residual_eager(hidden, fc2_weight, fc2_bias, x)


def swin_mlp_block_unsupported(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    eps: float = 1e-5,
    activation: Activation = "gelu",
) -> str | None:
    """Why the block's own kernel cannot run this call, or None."""
    reason = common_unsupported(
        x,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        fc1_weight=fc1_weight,
        fc1_bias=fc1_bias,
        fc2_weight=fc2_weight,
        fc2_bias=fc2_bias,
    )
    if reason is not None:
        return reason
    hidden, channels = fc1_weight.shape
    if channels % 32 or hidden % 64:
        return (
            "needs a multiple of 32 channels and of 64 hidden channels, "
            f"got {channels} and {hidden}"
        )
    arch = architecture(x.device)
    if arch is None:  # the interpreter runs anything
        return None
    if x.dtype == torch.float32:
        return "needs fp16 or bf16: fp32 products spill registers, and are not bound by memory"
    most = _MOST_CHANNELS.get(arch, 0)
    if channels > most:
        return f"needs at most {most} channels on {arch}, got {channels}: more spill registers"
    return None


def swin_mlp_block_n_bytes(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    eps: float = 1e-5,
    activation: Activation = "gelu",
) -> int:
    """Bytes of a call: x and the parameters read once, y written once."""
    parameters = (norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    n_elements = 2 * x.numel()
    n_elements += sum(parameter.numel() for parameter in parameters if parameter is not None)
    return x.element_size() * n_elements


def _check(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    activation: Activation,
) -> None:
    if fc1_weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != fc1_weight.shape[1]:
        raise ValueError(
            "swin_mlp_block: fc1_weight must be [F, C] for x [..., C], "
            f"got fc1_weight {list(fc1_weight.shape)} and x {list(x.shape)}"
        )
    F, C = fc1_weight.shape
    shapes: dict[str, tuple[Tensor | None, list[int]]] = {
        "norm_weight": (norm_weight, [C]),
        "norm_bias": (norm_bias, [C]),
        "fc1_bias": (fc1_bias, [F]),
        "fc2_weight": (fc2_weight, [C, F]),
        "fc2_bias": (fc2_bias, [C]),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor is not None and list(tensor.shape) != shape:
            raise ValueError(
                f"swin_mlp_block: {name} must be {shape} for fc1_weight {[F, C]}, "
                f"got {list(tensor.shape)}"
            )
    check_activation("swin_mlp_block", activation)


@torch.library.custom_op("fastbb::swin_mlp_block", mutates_args=())
def _swin_mlp_block(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    eps: float,
    activation: str | None,
) -> Tensor:
    y = swin_mlp_block_eager(
        x,
        norm_weight,
        norm_bias,
        fc1_weight,
        fc1_bias,
        fc2_weight,
        fc2_bias,
        eps=eps,
        activation=activation,
    )
    return y.contiguous()


@_swin_mlp_block.register_fake
def _(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


@launches(_swin_mlp_block)
def _launch(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    eps: float,
    activation: str | None,
) -> Tensor:
    from ..triton_kernels.swin_mlp_block import launch

    return launch(
        x,
        norm_weight,
        norm_bias,
        fc1_weight,
        fc1_bias,
        fc2_weight,
        fc2_bias,
        eps,
        activation,
    )
