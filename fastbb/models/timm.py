"""Any timm model as a backbone, with timm's stage names, indices and parameters.

Upstream: timm `models/_features.py`; transformers `models/timm_backbone/`.
"""

import copy
import os
from collections.abc import Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastbb_kernels.accuracy import FP32_REL, FP32_REL_FOLDED

from ..backbone.base import Backbone
from ..backbone.checkpoint import (
    LoadingInfo,
    StateDict,
    as_dtype,
    find_prefix,
    load_strict,
    shapes_only,
    strip_prefix,
)
from ..backbone.configuration import BackboneConfig, check_boolean, check_integer, check_size
from ..backbone.hub import ConfigFile, HubOptions, TimmSource, absolute_name, timm_source
from ..backbone.mixin import BackboneType
from ..backbone.registry import FAMILIES, Family, MapsForward, Upstream, register
from ..weights.find_norms import FoldedNorm, FoldReport, find_norms
from ..weights.folded_model import Folding, unfold
from ..weights.recognize import is_batch_norm
from ..weights.watch import is_observed
from .parts import CachedParts, Refused
from .timm_loading import create_features, unknown_model

# arguments of `timm.create_model` beside the rates of dropout
_DECIDE_NO_FEATURE = {"drop_path_rate", "drop_block_rate", "num_classes"}


class TimmBackboneConfig(BackboneConfig):
    """Configuration of a timm model used as a backbone.

    Stage names are timm's and known once the model is built; `out_indices` count from timm's first
    feature (for a ResNet the stem before the pool, for a Swin the first stage).

    Args:
        backbone: timm's name of the architecture, with a tag if weights are wanted.
        num_channels: channels of the input.
        features_only: must be True; exists for compatibility with transformers.
        use_pretrained_backbone: load timm's weights when the backbone is built.
        freeze_batch_norm_2d: replace batch norms by frozen ones.
        output_stride: stride of the last map, for models that can dilate.
        img_size: image size that the model is built with, for models that need one.
        backbone_kwargs: further arguments of `timm.create_model`.
        out_features: names of the stages to return.
        out_indices: indices of the stages to return; default: the last.

    Raises:
        ValueError: a value is of the wrong type or out of range.
    """

    model_type: ClassVar[str] = "timm_backbone"

    def __init__(
        self,
        backbone: str | None = None,
        *,
        num_channels: int = 3,
        features_only: bool = True,
        use_pretrained_backbone: bool = False,
        freeze_batch_norm_2d: bool = False,
        output_stride: int | None = None,
        img_size: int | Sequence[int] | None = None,
        backbone_kwargs: dict[str, Any] | None = None,
        out_features: list[str] | None = None,
        out_indices: Sequence[int] | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__(**unknown)
        if backbone is not None and not isinstance(backbone, str):
            raise ValueError(f"backbone must be the name of a timm model, got {backbone!r}")
        if not features_only:
            raise ValueError(
                "features_only must be True: a backbone returns feature maps, not logits"
            )
        self.backbone = backbone
        self.num_channels = check_integer("num_channels", num_channels)
        self.features_only = True
        self.use_pretrained_backbone = check_boolean(
            "use_pretrained_backbone", use_pretrained_backbone
        )
        self.freeze_batch_norm_2d = check_boolean("freeze_batch_norm_2d", freeze_batch_norm_2d)
        self.output_stride = (
            None if output_stride is None else check_integer("output_stride", output_stride)
        )
        self.img_size = None if img_size is None else check_size("img_size", img_size)
        # arguments with a field of their own are moved to it
        self.backbone_kwargs = dict(backbone_kwargs or {})
        self.num_channels = self.backbone_kwargs.pop("in_chans", self.num_channels)
        self.output_stride = self.backbone_kwargs.pop("output_stride", self.output_stride)
        self.img_size = self.backbone_kwargs.pop("img_size", self.img_size)
        indices = self.backbone_kwargs.pop("out_indices", None)
        if out_features is None and out_indices is None:
            out_indices = indices
        self.set_output_features_output_indices(out_features, out_indices)

    def model_arguments(self) -> dict[str, Any]:
        """Arguments of `timm.create_model`; None selects timm's default."""
        return {
            "in_chans": self.num_channels,
            "output_stride": self.output_stride,
            "img_size": self.img_size,
            **self.backbone_kwargs,
        }

    def deciding_fields(self) -> dict[str, Any]:
        fields = super().deciding_fields()
        del fields["use_pretrained_backbone"], fields["features_only"]
        # the tag names weights, and directories have none
        fields["backbone"] = str(self.backbone).removeprefix("timm/").partition(".")[0]
        fields["backbone_kwargs"] = {
            name: value
            for name, value in fields["backbone_kwargs"].items()
            if not name.endswith("drop_rate") and name not in _DECIDE_NO_FEATURE
        }
        return fields

    def set_output_features_output_indices(
        self, out_features: list[str] | None, out_indices: Sequence[int] | None
    ) -> None:
        if self.stage_names is not None:
            super().set_output_features_output_indices(out_features, out_indices)
            return
        # the stages are not known yet: the values are checked when the model is built
        if out_indices is not None and not isinstance(out_indices, (list, tuple)):
            raise ValueError(f"out_indices must be a list, got {type(out_indices)}")
        if out_features is not None and not isinstance(out_features, list):
            raise ValueError(f"out_features must be a list got {type(out_features)}")
        if out_features is None and out_indices is None:
            out_indices = [-1]
        self._out_features = out_features
        self._out_indices = None if out_indices is None else list(out_indices)


class TimmBackbone(Backbone):
    """A timm model behind the backbone API; maps are always NCHW in shape.

    The state dict is that of timm's features-only module under `_backbone.`. In inference, batch
    norms are folded into convolutions (see `fold_report`), and if a native family computes the same
    maps (Swin, ResNets), its forward runs on timm's parameters.

    Args:
        config: names the model.
        native: False always runs timm's own forward, without folding.

    Raises:
        ValueError: timm does not have the model or an option of it; lists close names.
        OSError: `use_pretrained_backbone` is set and the weights cannot be loaded.
    """

    config_class = TimmBackboneConfig
    config: TimmBackboneConfig
    optional_weights = ("*.num_batches_tracked",)
    unused_weights = ("*.num_batches_tracked", "*relative_position_index", "*.attn_mask")
    _backbone_type = BackboneType.TIMM

    def __init__(self, config: TimmBackboneConfig, *, native: bool = True) -> None:
        super().__init__(config)
        config = self.config  # converted to ours if it was transformers'
        if config.backbone is None:
            raise ValueError(
                "backbone is not set in the config. Please set it to a timm model name."
            )
        source = None
        if config.use_pretrained_backbone:
            source = timm_source(config.backbone)
            if source is None:
                raise ValueError(unknown_model(config.backbone))
            self._origin = absolute_name(config.backbone), HubOptions()
        self._init_from(config, source, HubOptions(), native)

    @torch.inference_mode(False)  # weights made inside inference mode could not be trained later
    def _init_from(
        self,
        config: TimmBackboneConfig,
        source: TimmSource | None,
        hub: HubOptions,
        native: bool,
        last_stage: int | None = None,
    ) -> None:
        name, kwargs = str(config.backbone), config.model_arguments()
        backbone = create_features(name, kwargs, source, hub, last_stage)
        if config.freeze_batch_norm_2d:
            from timm.layers.norm_act import freeze_batch_norm_2d

            backbone = freeze_batch_norm_2d(backbone)
        self._backbone = backbone
        feature_info: Any = self._backbone.feature_info
        info: list[dict[str, Any]] = feature_info.info
        names = [stage["module"] for stage in info]
        # a few models (crossvit) have two stages of one name
        self.stage_names = [
            f"{name}@{i}" if name in names[:i] else name for i, name in enumerate(names)
        ]
        self.num_features = [stage["num_chs"] for stage in info]
        self._built: list[int] = list(feature_info.out_indices)
        config.stage_names = list(self.stage_names)
        config.set_output_features_output_indices(config.out_features, config.out_indices)
        self.native = native

    @property
    def native(self) -> bool:
        """Whether inference may run fastbb's ops instead of timm's modules."""
        return self._native

    @native.setter
    def native(self, native: bool) -> None:
        if hasattr(self, "_folding"):
            self._folding.undo()
        self._native = native
        norms = (
            _find_norms(self._backbone, self.config.num_channels, self.default_size)
            if native
            else []
        )
        self._folding = Folding(self._backbone, norms)

    @property
    def exactness(self) -> float:  # type: ignore[override]  # follows the model
        """Allowed error in fp32: that of native families, or that of models with folded norms."""
        return FP32_REL_FOLDED if self.native_forward() is None else FP32_REL

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width of the images that the model was made for."""
        made_for: Any = getattr(self._backbone, "pretrained_cfg", None) or {}
        size: Any = self.config.img_size or made_for.get("input_size", (3, *self.usual_size))[1:]
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    @property
    def fold_report(self) -> FoldReport:
        """The convolution that each batch norm is folded into, or the reason why it is not."""
        return self._folding.report

    def forward_stages(
        self,
        pixel_values: Tensor,
        wanted: Sequence[str],
        attentions: list[Tensor] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        if attentions is not None:
            raise ValueError("Cannot output attentions for timm backbones at the moment")
        if not wanted:
            return {}
        indices = [self.stage_names.index(name) for name in wanted]
        absent = [name for name, index in zip(wanted, indices) if index not in self._built]
        if absent:
            raise ValueError(
                f"stage {absent[-1]!r} is not there: timm has no feature for it, or the checkpoint "
                f"was saved without it; there are {[self.stage_names[i] for i in self._built]}"
            )
        forward = self.native_forward() if self.native and not self.training else None
        run, few = forward or self._timm_forward, forward is not None
        try:
            maps = self._folding.run(run, pixel_values, indices, few=few)
        except AssertionError as error:  # timm refuses an input so
            raise ValueError(
                f"timm's {self.config.backbone!r} does not take pixel_values of shape "
                f"{list(pixel_values.shape)}: {error}"
            ) from error
        return dict(zip(wanted, maps))

    def without_weights(self) -> "TimmBackbone":
        config = TimmBackboneConfig.from_dict(self.config.to_dict(), use_pretrained_backbone=False)

        def build() -> TimmBackbone:
            other = self.from_config(config)
            if other._built != self._built:  # a checkpoint may end with the last selected stage
                other._init_from(other.config, None, HubOptions(), True, self._built[-1])
            return other

        try:
            with shapes_only():
                return build()
        except RuntimeError:  # before 1.0.21 timm computes with the tensors of some models
            with torch.random.fork_rng(devices=[]):
                return build()

    def native_forward(self) -> MapsForward | None:
        """The forward of a native family on timm's layers, or None."""
        if torch.compiler.is_compiling():  # in the graph, which guards the values that it reads
            modules = self._backbone.modules()
            if any(is_observed(module) or module.training for module in modules):
                return None
            return _native_forward(self._backbone)
        kept = CachedParts.of(self)
        if kept is None:
            forward = _native_forward(self._backbone)
            if forward is None:
                return None
            kept = CachedParts(self, forward, read=self._backbone)
        # hooks and dropout only run in timm's own forward
        return None if kept.is_observed() or kept.trains() else kept.value

    def _timm_forward(self, pixel_values: Tensor, indices: list[int]) -> list[Tensor]:
        """Runs timm's forward up to the last of `indices` and returns their maps."""
        from timm.models._features import FeatureGetterNet, FeatureListNet

        backbone = self._backbone
        checkpointing = self.training and self.gradient_checkpointing
        positions = [self._built.index(index) for index in indices]
        if type(backbone) is FeatureListNet and not checkpointing:
            maps = _run_children(backbone, pixel_values, positions[-1])
            maps = [maps[position] for position in positions]
        elif type(backbone) is FeatureGetterNet:
            maps = backbone.model.forward_intermediates(  # type: ignore[union-attr, operator]
                pixel_values,
                indices=indices,
                norm=backbone.norm,
                output_fmt=backbone.output_fmt,
                intermediates_only=True,
                stop_early=True,
            )
        else:
            maps = backbone(pixel_values)
            maps = [maps[position] for position in positions]
        if getattr(backbone, "output_fmt", "NCHW") == "NHWC":
            maps = [x.permute(0, 3, 1, 2) for x in maps]
        return maps

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None
    ) -> None:
        self._set_timm_checkpointing(True)
        super().gradient_checkpointing_enable(gradient_checkpointing_kwargs)

    def gradient_checkpointing_disable(self) -> None:
        super().gradient_checkpointing_disable()
        self._set_timm_checkpointing(False)

    def _set_timm_checkpointing(self, enable: bool) -> None:
        for module in (self._backbone, getattr(self._backbone, "model", None)):
            switch: Any = getattr(module, "set_grad_checkpointing", None)
            if switch is not None:
                switch(enable)
                return
        raise ValueError(f"timm's {self.config.backbone!r} has no gradient checkpointing")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        config: BackboneConfig | ConfigFile | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        output_loading_info: bool = False,
        attn_implementation: str | None = None,
        native: bool = True,
        **overrides: Any,
    ) -> Any:
        """Loads a timm model by name, from timm's format, or from a directory saved by fastbb.

        Args:
            pretrained_model_name_or_path: `resnet50`, `resnet50.a1_in1k`, `timm/resnet50.a1_in1k`,
                a Hub repository or a directory.
            native: False always runs timm's own forward.
            overrides: fields of TimmBackboneConfig; other names go to `timm.create_model`.

        The other arguments and errors are those of `Backbone.from_pretrained`.
        """
        name = str(pretrained_model_name_or_path)
        hub = HubOptions(revision, cache_dir, token, local_files_only)
        file = config if isinstance(config, ConfigFile) else None
        source = timm_source(pretrained_model_name_or_path, hub, file and file.values)
        overrides = _fields(overrides)
        if source is None:
            if config is None:
                config = file = ConfigFile.read(name, hub)
            if file is not None and "backbone_kwargs" in overrides:
                saved = file.backbone.get("backbone_kwargs") or {}
                overrides["backbone_kwargs"] = {**saved, **overrides["backbone_kwargs"]}
            backbone, info = super().from_pretrained(
                name,
                config=config,
                dtype=dtype or torch_dtype,
                device=device,
                revision=revision,
                cache_dir=cache_dir,
                token=token,
                local_files_only=local_files_only,
                output_loading_info=True,
                **overrides,
            )
            backbone.native = native
        else:
            if config is None or file is not None:
                kwargs = {**source.model_args, **overrides.pop("backbone_kwargs", {})}
                own = TimmBackboneConfig(source.architecture, backbone_kwargs=kwargs, **overrides)
            else:
                own = cls.own_config(config)
                own = TimmBackboneConfig.from_dict(own.to_dict(), **overrides)
            backbone, info = cls.__new__(cls), LoadingInfo()
            Backbone.__init__(backbone, own)
            backbone._init_from(own, source, hub, native)
            dtype = as_dtype(dtype or torch_dtype)
            backbone = backbone.to(device=device, dtype=dtype).eval()
            backbone._origin = absolute_name(name), hub.without_secret()
        return (backbone, info) if output_loading_info else backbone

    @classmethod
    def from_state_dict(
        cls,
        config: BackboneConfig,
        state: StateDict,
        *,
        name: str = "the checkpoint",
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
    ) -> tuple["TimmBackbone", LoadingInfo]:
        # not on the meta device, where timm's buffers that are not saved would stay
        assert isinstance(config, TimmBackboneConfig)
        config.use_pretrained_backbone = False
        backbone = cls(config)
        expected = list(backbone._backbone.state_dict())
        prefix = find_prefix(state, expected, f"timm {config.backbone!r}")
        found, outside = strip_prefix(state, prefix)
        last_stage = max((i % len(backbone.stage_names) for i in backbone.out_indices), default=0)
        needed = [key for key in expected if not key.endswith("num_batches_tracked")]
        if not found.keys() >= set(needed) and last_stage < backbone._built[-1]:
            # transformers does not save the stages after the last selected one
            backbone._init_from(config, None, HubOptions(), True, last_stage)
        initialized, unused = load_strict(
            backbone._backbone,
            found,
            what=f"{cls.__name__} from {name!r}",
            optional=cls.optional_weights,
            unused=cls.unused_weights,
            dtype=as_dtype(dtype),
            device=device,
        )
        info = LoadingInfo(prefix, sorted(outside + unused), initialized)
        # moves the buffers that are not saved too
        backbone = backbone.to(device=device, dtype=backbone.dtype).eval()
        backbone.report_loading(name, info)
        return backbone, info


def _find_norms(backbone: nn.Module, channels: int, size: tuple[int, int]) -> list[FoldedNorm]:
    """Finds the convolution of each batch norm of a timm model."""
    parameters = list(backbone.parameters())
    if not parameters or not any(is_batch_norm(module) for module in backbone.modules()):
        return []
    like = parameters[0]
    shape = 1, channels, *size
    pixels = torch.empty(shape, dtype=like.dtype, device=like.device)
    try:
        return find_norms(backbone, pixels)
    except Exception as error:  # the model may fail on the meta device and run elsewhere
        reason = f"the model does not run on the meta device: {error}"
        names = [name for name, module in backbone.named_modules() if is_batch_norm(module)]
        return [FoldedNorm(name, refused=reason) for name in names]


def _fields(overrides: dict[str, Any]) -> dict[str, Any]:
    """Moves overrides that are not fields of the configuration into `backbone_kwargs`."""
    known = signature(TimmBackboneConfig.__init__).parameters.keys() - {"unknown"}
    fields = {name: value for name, value in overrides.items() if name in known}
    kwargs = {name: value for name, value in overrides.items() if name not in known}
    if kwargs:
        fields["backbone_kwargs"] = {**(fields.get("backbone_kwargs") or {}), **kwargs}
    return fields


def _native_forward(features: nn.Module) -> MapsForward | None:
    """The forward of the native family that covers a features-only module, or None."""
    for family in FAMILIES:
        if family.timm_parts is None or family.maps is None:
            continue
        try:
            return partial(family.maps, family.timm_parts(features))
        except Refused:
            pass
    return None


def _run_children(backbone: nn.Module, x: Tensor, last: int) -> list[Tensor]:
    """Runs timm's FeatureListNet up to stage `last`."""
    maps: list[Tensor] = []
    return_layers: dict[str, str] = backbone.return_layers  # type: ignore[assignment]
    for name, module in backbone.named_children():
        x = module(x)
        if name in return_layers:
            taken = x
            if isinstance(x, (tuple, list)):
                taken = torch.cat(x, 1) if backbone.concat else x[0]  # type: ignore[arg-type]
            maps.append(taken)
        if len(maps) > last:
            break
    return maps


def _upstream(backbone: TimmBackbone) -> Upstream:
    module = copy.deepcopy(backbone._backbone)
    unfold(module)
    positions = [backbone._built.index(stage) for stage in _stages(backbone)]
    return _as_upstream(backbone, module, positions)


def _timm_upstream(backbone: TimmBackbone, size: tuple[int, int]) -> Upstream:
    """timm's model with the selected maps only, as timm builds it: without what follows them."""
    stages = _stages(backbone)
    in_order = sorted(set(stages))
    config = backbone.config
    name, kwargs = str(config.backbone), config.model_arguments()
    module = create_features(name, kwargs, None, HubOptions(), stages=in_order)
    whole = copy.deepcopy(backbone._backbone)
    unfold(whole)
    own = whole.state_dict()
    if missing := module.state_dict().keys() - own.keys():
        raise ValueError(f"timm names its weights otherwise without later stages: {min(missing)}")
    module.load_state_dict({name: own[name] for name in module.state_dict()})
    return _as_upstream(backbone, module.eval(), [in_order.index(stage) for stage in stages])


def _stages(backbone: TimmBackbone) -> list[int]:
    """Indices of the selected stages in timm's model."""
    return [index % len(backbone.stage_names) for index in backbone.out_indices]


def _as_upstream(backbone: TimmBackbone, module: nn.Module, positions: list[int]) -> Upstream:
    import timm

    def maps(module: nn.Module, pixel_values: Tensor) -> list[Tensor]:
        found: Any = module(pixel_values)
        if getattr(module, "output_fmt", "NCHW") == "NHWC":
            found = [x.permute(0, 3, 1, 2) for x in found]
        return [found[position] for position in positions]

    return Upstream(f"timm {timm.__version__}, {backbone.config.backbone}", module, maps)


register(
    Family(
        backbone=TimmBackbone,
        configs=(TimmBackboneConfig,),
        upstream=_upstream,
        timm_upstream=_timm_upstream,
    )
)
