"""The last stage of a backbone as its own library gives it: after the final norm."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class FinalNorm:
    """What a family states about the end of its model, from which image embeddings are computed."""

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
        """The backbone, over the same parameters, as its library's model with a head computes it.

        transformers' SwinModel shifts other windows than its SwinBackbone.
        """
        return self

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
