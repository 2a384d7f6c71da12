"""Layer norms of returned maps, one for each stage, as transformers' backbones have them."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastbb_kernels import layer_norm_nchw
from fastbb_kernels.warning import warn_caller

from ..backbone.base import Backbone
from ..backbone.checkpoint import LoadingInfo, StateDict
from ..backbone.configuration import BackboneConfig
from .layers import MapLayerNorm
from .parts import Refused, untouched

NORMS = "hidden_states_norms."


class UntrainedNorms(Backbone):
    """A backbone that warns once for each returned stage whose norm a checkpoint lacked."""

    _untrained_norms: frozenset[str] = frozenset()

    def outputs_changed(self) -> None:
        names = [name for name in self.out_features if name in self._untrained_norms]
        if names:
            self._untrained_norms -= set(names)
            warn_caller(
                f"The checkpoint has no norm for {', '.join(names)}: those feature maps are "
                "normalized with weight 1 and bias 0, as transformers does."
            )

    def report_loading(self, name: str, info: LoadingInfo) -> None:
        super().report_loading(name, info)
        norms = [n for n in info.initialized if n.startswith(NORMS)]
        self._untrained_norms = frozenset(norm.split(".")[1] for norm in norms)
        self.outputs_changed()


class StageNorms(UntrainedNorms):
    """A backbone whose returned maps have a layer norm each, and whose last stage has another one.

    All stages have a norm, as `out_indices` may change; those of selected stages are saved. A
    checkpoint of a classifier has none, which is a warning once for each stage that is returned.
    A subclass sets `hidden_states_norms`, empty if maps are returned without a norm.
    """

    config: Any  # with `initializer_range`
    hidden_states_norms: nn.ModuleDict
    # name of the norm after the last stage
    final_norm_name: ClassVar[str]
    # whether norms that are called get maps [B, C, h, w], as a `MapLayerNorm`, not [B, h, w, C]
    norms_take_maps: ClassVar[bool] = False

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__(config)
        self._loads_strictly = True  # torch tells `_load_from_state_dict` so in any case

    @torch.no_grad()
    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        self._loads_strictly = strict
        try:
            return super().load_state_dict(state_dict, strict, assign)
        finally:
            self._loads_strictly = True

    def _load_from_state_dict(
        self, state_dict: StateDict, prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Accepts state dicts of transformers' modules, with the norms of selected stages only."""
        own = self.state_dict()
        optional = [n for n in own if n.startswith((NORMS, f"{self.final_norm_name}."))]
        absent = [name for name in optional if prefix + name not in state_dict]
        # a part of the weights (those of an adapter) leaves the norms as they are
        is_whole = all(prefix + name in state_dict for name in own.keys() - optional)
        if absent and is_whole and self._loads_strictly:
            for name in absent:
                value = torch.ones_like if name.endswith("weight") else torch.zeros_like
                state_dict[prefix + name] = value(own[name])
            untrained = {name.split(".")[1] for name in absent}
            self._untrained_norms = frozenset(untrained & set(self.hidden_states_norms))
            self.outputs_changed()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def feature_map(self, stage: str, hidden_state: Tensor, image_size: tuple[int, int]) -> Tensor:
        if stage not in self.hidden_states_norms:
            return hidden_state
        return self._normed(hidden_state, self.hidden_states_norms[stage])

    def _normed(self, hidden_state: Tensor, norm: nn.Module) -> Tensor:
        """Normalizes [B, C, h, w] over its channels."""
        x = hidden_state.permute(0, 2, 3, 1)
        try:
            found: Any = untouched(norm, nn.LayerNorm, MapLayerNorm)
        except Refused:
            if self.norms_take_maps:
                return norm(hidden_state)
            return norm(x).permute(0, 3, 1, 2)
        return layer_norm_nchw(x, found.weight, found.bias, eps=found.eps)

    def called_norms(self) -> dict[str, str]:
        """The norms of maps that are called, by name, with the reason."""
        called = {}
        for name, norm in self.hidden_states_norms.items():
            try:
                untouched(norm, nn.LayerNorm, MapLayerNorm)
            except Refused as refused:
                called[NORMS + name] = str(refused)
        return called

    @property
    def final_norm(self) -> nn.Module:
        return self.get_submodule(self.final_norm_name)

    def used_weights(self, maps: Sequence[str], final: bool) -> StateDict:
        state = self.state_dict()
        unused = [f"{NORMS}{n}." for n in self.stage_names if n not in maps]
        unused += [] if final else [f"{self.final_norm_name}."]
        return {n: tensor for n, tensor in state.items() if not n.startswith(tuple(unused))}

    def with_norms_of(self, stages: Sequence[str]) -> StateDict:
        """The weights by name, with the norms of these stages only."""
        return {
            name: tensor
            for name, tensor in self.state_dict().items()
            if not name.startswith(NORMS) or name.split(".")[1] in stages
        }

    def init_optional_weights(self) -> None:
        for module in (self.final_norm, *self.hidden_states_norms.values()):
            assert isinstance(module, nn.LayerNorm)
            # not by to_empty, which imports sympy for a meta tensor
            module.weight = nn.Parameter(torch.ones(module.normalized_shape))
            module.bias = nn.Parameter(torch.zeros(module.normalized_shape))
