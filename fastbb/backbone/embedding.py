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

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm after the last stage, or None if the model has none."""
        return None

    def final_map(self, hidden_state: Tensor) -> Tensor:
        """Normalizes the hidden state [B, C, h, w] of the last stage by the final norm."""
        return hidden_state

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
