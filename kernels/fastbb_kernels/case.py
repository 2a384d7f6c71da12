"""Calls of ops with random tensors, and the calls of model families, for checks and benches."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .ops.folded_norm_linear import fold_norm


class Random:
    """Makes the tensors of a call; on the meta device they have no values."""

    def __init__(
        self, device: torch.device | str, dtype: torch.dtype, seed: int | None = None
    ) -> None:
        """Uses a separate generator if there is a seed, else PyTorch's."""
        self.device, self.dtype = torch.device(device), dtype
        self._from: dict[str, Any] = {"device": self.device}
        if seed is not None:
            self._from["generator"] = torch.Generator(self.device).manual_seed(seed)

    def normal(self, *shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        return (torch.randn(shape, **self._from) * std + mean).to(self.dtype)

    def pixels(self, *shape: int) -> Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, **self._from)

    def weight(self, *shape: int) -> Tensor:
        """Returns weights [out, ...] that keep the magnitude of their input."""
        return self.normal(*shape, std=math.prod(shape[1:]) ** -0.5)

    def norm(self, features: int) -> dict[str, Tensor]:
        """Returns weight and bias of a layer norm, different from their initial 1 and 0."""
        return {
            "norm_weight": self.normal(features, std=0.2, mean=1.0),
            "norm_bias": self.normal(features, std=0.2),
        }

    def mlp(self, features: int) -> dict[str, Tensor]:
        """Returns weights and biases of two linear layers, the hidden one four times as wide."""
        return {
            "fc1_weight": self.weight(4 * features, features),
            "fc1_bias": self.normal(4 * features),
            "fc2_weight": self.weight(features, 4 * features),
            "fc2_bias": self.normal(features),
        }


@dataclass(frozen=True)
class Case:
    """One call of an op.

    Attributes:
        op: its name in `fastbb_kernels`.
        name: model, image size, batch and place, such as `swin_t-224-b64-stage1-qkv`.
        make: makes the keyword arguments of the call.
    """

    op: str
    name: str
    make: Callable[[Random], dict[str, Any]]

    def arguments(
        self, device: torch.device | str, dtype: torch.dtype, seed: int | None = None
    ) -> dict[str, Any]:
        """Makes the keyword arguments of the call, random unless the device is meta.

        Args:
            device: of the tensors.
            dtype: of the tensors.
            seed: makes the values reproducible, and leaves PyTorch's generators unchanged.
        """
        return self.make(Random(device, dtype, seed))

    def __str__(self) -> str:
        return self.name


def folded_norm_linear(
    tokens: Sequence[int], out_features: int, activation: str | None
) -> Callable[[Random], dict[str, Any]]:
    """Returns what makes the arguments of `folded_norm_linear` for tokens [..., C]."""

    def make(random: Random) -> dict[str, Any]:
        norm, weight = random.norm(tokens[-1]), random.weight(out_features, tokens[-1])
        folded = fold_norm(**norm, weight=weight, bias=random.normal(out_features))
        x = random.normal(*tokens, mean=0.5)
        return {"x": x, **folded._asdict(), "activation": activation}

    return make


# image size (height, width) and batches; the first batch is that of the ledger
REAL_INPUTS: tuple[tuple[tuple[int, int], tuple[int, ...]], ...] = (
    ((224, 224), (64, 8, 1)),
    ((384, 384), (8, 64, 1)),
    ((800, 1088), (8, 64, 1)),
)


@dataclass(frozen=True)
class Family:
    """The calls of a family of models, or of one op: `FAMILY` in a file `<name>_cases.py`.

    Attributes:
        small: makes variants of the calls with few pixels and channels, for the interpreter.
        models: names of the models.
        model_cases: makes every distinct call of one forward, from the name of a model, an image
            size of `REAL_INPUTS` and a batch.
        checked_models: names of the models that every run of the tests compiles.
        more_checked: makes further calls that every run compiles.
        more_real: makes further calls at a batch.
    """

    small: Callable[[], Iterable[Case]]
    models: tuple[str, ...] = ()
    model_cases: Callable[[str, tuple[int, int], int], Iterable[Case]] = lambda *_: ()
    checked_models: tuple[str, ...] = ()
    more_checked: Callable[[], Iterable[Case]] = tuple
    more_real: Callable[[int], Iterable[Case]] = lambda batch: ()
