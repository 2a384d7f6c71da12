"""Stages and channels of a backbone, with the names of transformers 5.23."""

import enum
import sys
from collections.abc import Sequence
from typing import Any, ClassVar


class BackboneType(enum.Enum):
    """The library whose stage names and indices a backbone uses."""

    TIMM = "timm"
    TRANSFORMERS = "transformers"


class BackboneMixin:
    """Stages and channels of a backbone, read from its `config`."""

    has_attentions: bool = True
    config: Any
    stage_names: list[str]
    num_features: list[int]

    @property
    def backbone_type(self) -> enum.Enum:
        """`BackboneType`; transformers' own enum where transformers is imported."""
        # a module that fails half-way through its import stays in sys.modules without the name
        theirs = getattr(
            sys.modules.get("transformers.backbone_utils"), "BackboneType", BackboneType
        )
        return theirs(self._backbone_type.value)

    _backbone_type: ClassVar[BackboneType] = BackboneType.TRANSFORMERS

    @property
    def out_features(self) -> list[str]:
        """Names of the stages whose feature maps are returned; assign to change them."""
        return self.config.out_features

    @out_features.setter
    def out_features(self, out_features: list[str] | None) -> None:
        self.config.out_features = out_features
        self.outputs_changed()

    @property
    def out_indices(self) -> list[int]:
        """Indices into `stage_names` of the feature maps returned; assign to change them."""
        return self.config.out_indices

    @out_indices.setter
    def out_indices(self, out_indices: Sequence[int] | None) -> None:
        self.config.out_indices = out_indices
        self.outputs_changed()

    def outputs_changed(self) -> None:
        """Reacts to a new selection of stages on the backbone."""

    @property
    def out_feature_channels(self) -> dict[str, int]:
        """Channels of every stage, by name."""
        return dict(zip(self.stage_names, self.num_features))

    @property
    def channels(self) -> list[int]:
        """Channels of each returned feature map."""
        return [self.out_feature_channels[name] for name in self.out_features]

    def forward_with_filtered_kwargs(self, *args: Any, **kwargs: Any) -> Any:
        """Calls `forward` without the arguments that this backbone does not accept."""
        if not self.has_attentions:
            kwargs.pop("output_attentions", None)
        if self._backbone_type is BackboneType.TIMM:
            known = ("pixel_values", "output_hidden_states", "output_attentions", "return_dict")
            kwargs = {name: value for name, value in kwargs.items() if name in known}
        return self(*args, **kwargs)  # type: ignore[operator]  # the class mixed into is callable
