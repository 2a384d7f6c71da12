"""What the computation of a Swin block needs: its semantics and a typed view of its weights."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastbb_kernels import WindowGeometry


@dataclass(frozen=True)
class SwinBlockSpec:
    """What the computation of a block needs beside its weights.

    Attributes:
        num_heads: attention heads.
        geometry: windows, shift, and whether the roll comes before the padding (timm).
        clamp_shift: do not shift along an axis that one window covers (torchvision, at run time).
        activation: of the MLP.
        drop_path: stochastic depth of the attention branch.
        mlp_drop_path: stochastic depth of the MLP branch (transformers has none there).
        dropout: of both branches.
        attention_dropout: of the attention weights.
    """

    num_heads: int
    geometry: WindowGeometry
    clamp_shift: bool = False
    activation: str = "gelu"
    drop_path: float = 0.0
    mlp_drop_path: float = 0.0
    dropout: float = 0.0
    attention_dropout: float = 0.0

    def geometry_for(self, height: int, width: int) -> WindowGeometry:
        """The windows of a map of height x width tokens."""
        if not self.clamp_shift:
            return self.geometry
        (h, w), (shift_h, shift_w), roll_first = self.geometry
        return WindowGeometry(
            (h, w), (0 if height <= h else shift_h, 0 if width <= w else shift_w), roll_first
        )


class SwinBlockWeights(NamedTuple):
    """What is read off the layers of a block at every call: their tensors, and eps of the norms.

    C channels, N tokens per window, P >= N, F hidden channels.
    """

    norm1_weight: Tensor  # [C]
    norm1_bias: Tensor  # [C]
    norm1_eps: float
    qkv_weight: Tensor  # [3C, C]
    qkv_bias: Tensor | None  # [3C]
    relative_position_bias: Tensor  # [num_heads, N, P]
    proj_weight: Tensor  # [C, C]
    proj_bias: Tensor | None  # [C]
    norm2_weight: Tensor  # [C]
    norm2_bias: Tensor  # [C]
    norm2_eps: float
    fc1_weight: Tensor  # [F, C]
    fc1_bias: Tensor  # [F]
    fc2_weight: Tensor  # [C, F]
    fc2_bias: Tensor  # [C]
    owner: nn.Module | None = None  # what is computed from them is remembered with it

    def tensors(self) -> list[Tensor]:
        """All of them that there are."""
        return [value for value in self if isinstance(value, Tensor)]


class PatchMergingWeights(NamedTuple):
    """What is read off a patch merging at every call."""

    norm_weight: Tensor  # [4C]
    norm_bias: Tensor  # [4C]
    norm_eps: float
    reduction: Tensor  # [2C, 4C]
    bias: Tensor | None  # [2C], which no published Swin has

    @classmethod
    def of(cls, merging: Any) -> "PatchMergingWeights":
        """Those of a module with `norm` and `reduction`, as all libraries name them."""
        norm = merging.norm
        reduction = merging.reduction
        return cls(norm.weight, norm.bias, norm.eps, reduction.weight, reduction.bias)
