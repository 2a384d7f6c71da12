"""The last stage of a backbone as its own library gives it: after the final norm."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .checkpoint import StateDict


class FinalNorm:
    """The end of a family's model, from which image embeddings are computed."""

    # whether the model's own library has the last stage as tokens; of a CNN it is a map
    has_tokens: ClassVar[bool] = False
    # tokens before those of the patches: the class token, which is the first, and registers
    n_prefix_tokens: int = 0
    # whether the model projects embeddings to a space that images share with text
    has_projection: bool = False

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm after the last stage, or None if the model has none."""
        return None

    @property
    def norms_tokens(self) -> bool:
        """Whether the final norm is of tokens, and not only of what is pooled from them."""
        return True

    def final_state(self, hidden_state: Tensor) -> Tensor:
        """Normalizes the hidden state of the last stage by the final norm.

        Args:
            hidden_state: [B, C, h, w], or of a ViT tokens [B, N, C].
        """
        return hidden_state

    def embedding_of(self, final_state: Tensor) -> Tensor:
        """Computes the image embedding [B, D] from what `final_state` returns."""
        return final_state.float().mean((2, 3))

    def tokens_of(self, state: Tensor) -> Tensor:
        """The tokens [B, N, C] of the last stage, before or after the final norm."""
        return state.flatten(2).transpose(1, 2)

    def patch_mean_of(self, state: Tensor) -> Tensor:
        """The fp32 mean [B, C] of the tokens of patches, before or after the final norm."""
        return state.float().mean((2, 3))

    def projection_of(self, final_state: Tensor) -> Tensor:
        """Projects images [B, D] to the space of text, from what `final_state` returns."""
        raise NotImplementedError(f"{type(self).__name__} must define projection_of")

    def with_library_windows(self: Any) -> Any:
        """Returns a backbone over the same modules that cuts windows as the library's full model.

        transformers' SwinModel shifts no windows of a map whose height or width one window covers;
        its SwinBackbone does.
        """
        return self

    def used_weights(self: Any, maps: Sequence[str], final: bool) -> StateDict:
        """The weights by name, without norms that some features do not use.

        Args:
            maps: stages of the feature maps that are used.
            final: whether the final norm is used.
        """
        return self.state_dict()

    @property
    def lacks_final_norm(self) -> bool:
        """Whether the final norm has its initial values, ones and zeros, which no training leaves.

        Backbones that were trained or saved without a head have such a norm.
        """
        norm = self.final_norm
        weight, bias = (getattr(norm, name, None) for name in ("weight", "bias"))
        if not isinstance(weight, Tensor):
            return False
        zeros = bias is None or not bool(torch.count_nonzero(bias))
        return zeros and bool((weight == 1).all())
