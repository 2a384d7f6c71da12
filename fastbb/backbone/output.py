"""The output of a backbone."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, overload

from torch import Tensor
from torch.utils._pytree import register_pytree_node


class BackboneOutput(OrderedDict[str, Any]):
    """The output of a backbone, read by attribute, key or tuple index as transformers' class.

    Attributes:
        feature_maps: tuple of [B, C, h, w], one for each of `out_features`, in order of depth.
            Strides may be channels-last.
        hidden_states: tuple of [B, C, h, w], one for each of `stage_names`, or None.
        attentions: tuple of [B * nW, num_heads, N, N], one for each stage, or None.
        cls_tokens: tuple of [B, C], one for each of `out_features`, or None.
    """

    def __init__(
        self,
        feature_maps: tuple[Tensor, ...] | Mapping[str, Any] | None = None,
        hidden_states: tuple[Tensor | None, ...] | None = None,
        attentions: tuple[Tensor, ...] | None = None,
        cls_tokens: tuple[Tensor, ...] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(feature_maps, Mapping):  # libraries rebuild a dictionary of tensors so
            self.update(feature_maps)
            return
        for name, value in (
            ("feature_maps", feature_maps),
            ("hidden_states", hidden_states),
            ("attentions", attentions),
            ("cls_tokens", cls_tokens),
        ):
            if value is not None:
                self[name] = value

    @property
    def feature_maps(self) -> tuple[Tensor, ...]:
        return super().__getitem__("feature_maps")

    @property
    def hidden_states(self) -> tuple[Tensor | None, ...] | None:
        return self.get("hidden_states")

    @property
    def attentions(self) -> tuple[Tensor, ...] | None:
        return self.get("attentions")

    @property
    def cls_tokens(self) -> tuple[Tensor, ...] | None:
        return self.get("cls_tokens")

    @overload
    def __getitem__(self, key: str) -> Any: ...
    @overload
    def __getitem__(self, key: int | slice) -> Any: ...
    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            return super().__getitem__(key)
        return self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        """The values that are not None."""
        return tuple(self.values())


def _flatten(output: BackboneOutput) -> tuple[list[Any], list[str]]:
    return list(output.values()), list(output.keys())


def _unflatten(values: Iterable[Any], names: list[str]) -> BackboneOutput:
    return BackboneOutput(**dict(zip(names, values)))


# torch.export and functorch need this to see the tensors inside
register_pytree_node(
    BackboneOutput,
    _flatten,
    _unflatten,  # type: ignore[arg-type]  # the context is the names _flatten returned
    serialized_type_name="fastbb.BackboneOutput",
)
