"""Patch embedding: a convolution whose stride is its kernel size, then layer norm; returns NHWC.

Algorithm: every patch is one row of a GEMM; a program holds whole rows and normalizes them, or
without a norm some columns of them.
Bound: memory (read the pixels, write the tokens).
"""

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from .._dispatch import Impl, common_unsupported
from ..op import Op

# a program holds whole rows in registers to normalize them
MAX_CHANNELS = 512


def patch_embed(
    pixel_values: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    *,
    eps: float = 1e-5,
    ceil_mode: bool = False,
    impl: Impl | None = None,
) -> Tensor:
    """Embeds non-overlapping patches.

    Args:
        pixel_values: [B, C_in, H, W] floating point, any strides.
        weight: [C, C_in, p, q] with patches of p x q pixels.
        bias: [C] or None.
        norm_weight: [C], or None for no normalization.
        norm_bias: [C] or None.
        eps: added to the variance.
        ceil_mode: pads an incomplete last patch with zeros at the bottom and at the right, as
            transformers; otherwise its pixels are dropped.
        impl: implementation to use; default: that of `use_impl`.

    Returns:
        [B, h, w, C], dtype of `pixel_values`; h and w are H / p and W / q, rounded down, or up
        with `ceil_mode`.

    Raises:
        ValueError: shapes that do not fit together, or no patch in the image.
        NotImplementedError: `impl="triton"` cannot run this call; the message says why.
    """
    call = PatchEmbed(pixel_values, weight, bias, norm_weight, norm_bias, eps, ceil_mode)
    return _op(call, impl)


class PatchEmbed(NamedTuple):
    """A call of `patch_embed`."""

    pixel_values: Tensor
    weight: Tensor
    bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    eps: float
    ceil_mode: bool

    def check(self) -> None:
        pixel_values, weight, bias, norm_weight, norm_bias, _, ceil_mode = self
        if pixel_values.ndim != 4 or weight.ndim != 4 or pixel_values.shape[1] != weight.shape[1]:
            raise ValueError(
                "patch_embed: weight must be [C, C_in, p, q] for pixel_values [B, C_in, H, W], "
                f"got weight {list(weight.shape)} and pixel_values {list(pixel_values.shape)}"
            )
        for name, tensor in (
            ("bias", bias),
            ("norm_weight", norm_weight),
            ("norm_bias", norm_bias),
        ):
            if tensor is not None and tensor.shape != weight.shape[:1]:
                raise ValueError(
                    f"patch_embed: {name} must be [{weight.shape[0]}], got {list(tensor.shape)}"
                )
        if norm_bias is not None and norm_weight is None:
            raise ValueError("patch_embed: norm_bias needs a norm_weight, got None")
        p, q = (1, 1) if ceil_mode else weight.shape[2:]
        height, width = pixel_values.shape[2:]
        if height < p or width < q:
            raise ValueError(
                f"patch_embed: the image must be at least {p}x{q} pixels, got {height}x{width}"
            )

    def eager(self) -> Tensor:
        pixel_values, weight, bias, norm_weight, norm_bias, eps, ceil_mode = self
        p, q = weight.shape[2:]
        height, width = pixel_values.shape[2:]
        # F.pad copies even where it adds nothing
        if ceil_mode and (height % p or width % q):
            pixel_values = F.pad(pixel_values, (0, -width % q, 0, -height % p))
        x = F.conv2d(pixel_values, weight, bias, stride=(p, q)).permute(0, 2, 3, 1)
        if norm_weight is None:
            return x
        return F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)

    def unsupported(self) -> str | None:
        channels = self.weight.shape[0]
        if self.norm_weight is not None and channels > MAX_CHANNELS:
            return f"needs at most {MAX_CHANNELS} output channels for a norm, got {channels}"
        return common_unsupported(self)

    def n_bytes(self) -> int:
        """Counts the pixels of patches and the weights read once, tokens written once."""
        batch, height, width, channels = self._output_shape()
        p, q = self.weight.shape[2:]
        n_rows, n_cols = (
            min(whole, n_patches * side)
            for whole, n_patches, side in zip(self.pixel_values.shape[2:], (height, width), (p, q))
        )
        n_pixels = self.pixel_values.shape[1] * n_rows * n_cols
        n_elements = batch * (n_pixels + height * width * channels)
        n_elements += sum(tensor.numel() for tensor in self[1:5] if tensor is not None)
        return self.pixel_values.element_size() * n_elements

    def empty_result(self) -> Tensor:
        return self.pixel_values.new_empty(self._output_shape())

    def launch(self) -> Tensor:
        from ..triton_kernels.patch_embed import launch

        return launch(*self[:6], self.empty_result())

    def _output_shape(self) -> tuple[int, int, int, int]:
        batch, _, height, width = self.pixel_values.shape
        channels, _, p, q = self.weight.shape
        if self.ceil_mode:
            return batch, -(-height // p), -(-width // q), channels
        return batch, height // p, width // q, channels


_op = Op("patch_embed", PatchEmbed)
