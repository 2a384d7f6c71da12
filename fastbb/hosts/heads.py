"""transformers' heads (MaskFormer, UperNet, DETR ...) around pretrained or fast backbones.

transformers 4 loaded the backbone that a head's configuration names. transformers 5 still takes
`backbone=` and `use_pretrained_backbone=True` and leaves the weights random; here they are loaded.
The models are transformers' own, so what they save needs no fastbb. This module needs the extra
`transformers`.

Upstream: transformers 4.49 `utils/backbone_utils.py` (`load_backbone`), 5.x `backbone_utils.py`.
"""

from collections.abc import Mapping
from functools import wraps
from typing import Any, TypeVar

try:
    import transformers
except ImportError as error:
    raise ImportError(
        "fastbb builds heads with transformers, which is not there: "
        "pip install fastbb[transformers]"
    ) from error
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.backbone_utils import BackboneMixin
from transformers.models import maskformer

from fastbb_kernels.warning import warn_caller

from ..backbone.checkpoint import StateDict, load_strict
from ..backbone.configuration import BackboneConfig
from ..backbone.hub import HubOptions
from ..backbone.registry import family_of
from ..models.lookup import pretrained_config
from ..models.timm import TimmBackboneConfig
from ..weights.derived import is_tracing
from .accelerate import accelerate
from .transformers_backbone import TransformersBackbone

Head = TypeVar("Head", bound=PreTrainedModel)

_HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only")
# fields from which transformers' TimmBackbone builds its model
_TIMM_FIELDS = (
    "backbone",
    "num_channels",
    "features_only",
    "freeze_batch_norm_2d",
    "output_stride",
    "out_indices",
    "use_pretrained_backbone",
)


def build(
    head_class: type[Head],
    *,
    backbone: str | None = None,
    use_pretrained_backbone: bool = False,
    use_timm_backbone: bool = False,
    backbone_kwargs: Mapping[str, Any] | None = None,
    backbone_config: BackboneConfig | PreTrainedConfig | dict[str, Any] | None = None,
    **config: Any,
) -> Head:
    """A new head of transformers around a backbone, whose pretrained weights are loaded.

    Args:
        head_class: a model of transformers around a backbone, such as `DetrForObjectDetection`.
        backbone: any name or directory that `AutoBackbone.from_pretrained` takes, or of a family
            that only transformers has.
        use_pretrained_backbone: load the weights of `backbone`, all of them; else only its
            configuration is read.
        use_timm_backbone: `backbone` must be a timm model.
        backbone_kwargs: fields of the backbone's configuration, `{"out_indices": (2, 3, 4)}`, and
            `revision`, `cache_dir`, `token`, `local_files_only`. Without `out_indices` or
            `out_features`: as many of the last stages as the head's default backbone returns.
        backbone_config: of fastbb or transformers, in place of `backbone`. A TimmBackboneConfig
            with `use_pretrained_backbone` has timm's weights loaded.
        config: fields of the head's configuration.

    Returns:
        An instance of exactly `head_class`, in training mode as every fresh model of transformers;
        what is not the backbone's has random weights.

    Raises:
        ValueError: arguments exclude each other, fastbb has no such backbone, transformers cannot
            keep one of its options, or the weights do not fit.
        OSError: there is no such model, or its files are corrupt.
        TypeError: `head_class` is none, or `backbone_kwargs` has what is no field.
    """
    if not (isinstance(head_class, type) and issubclass(head_class, PreTrainedModel)):
        raise TypeError(f"head_class must be a model class of transformers, got {head_class!r}")
    config_class: Any = head_class.config_class
    default: Any = config_class(**config)
    if not hasattr(default, "backbone_config"):
        raise ValueError(
            f"{head_class.__name__} has no backbone: {config_class.__name__} names none"
        )
    named = _configuration(
        backbone,
        use_pretrained_backbone,
        use_timm_backbone,
        backbone_kwargs,
        backbone_config,
        default.backbone_config,
    )
    head = head_class(default if named is None else config_class(backbone_config=named, **config))
    if use_pretrained_backbone:
        _load_backbone(head, str(backbone), _hub_options(backbone_kwargs))
    else:
        _load_timm_backbone(head)
    return head


class MaskFormerConfig(transformers.MaskFormerConfig):
    """transformers' MaskFormerConfig with the arguments of transformers 4 that name a backbone.

    Files that it saves hold the named backbone's configuration, and nothing that transformers'
    class does not know. Weights are loaded by `fastbb.MaskFormerForInstanceSegmentation` alone.

    Args:
        backbone: any name or directory that `AutoBackbone.from_pretrained` takes.
        use_pretrained_backbone: have its weights loaded when the model is built.
        use_timm_backbone: `backbone` must be a timm model.
        backbone_kwargs: as for `build`, which says which stages are returned without it.
        backbone_config: of fastbb or transformers, in place of `backbone`.
        fields: of transformers' class.

    Raises:
        ValueError: arguments exclude each other, or there is no such kind of backbone.
        OSError: there is no such model.
    """

    def __init__(
        self,
        *,
        backbone: str | None = None,
        use_pretrained_backbone: bool = False,
        use_timm_backbone: bool = False,
        backbone_kwargs: Mapping[str, Any] | None = None,
        backbone_config: BackboneConfig | PreTrainedConfig | dict[str, Any] | None = None,
        **fields: Any,
    ) -> None:
        named = _configuration(
            backbone,
            use_pretrained_backbone,
            use_timm_backbone,
            backbone_kwargs,
            backbone_config,
            transformers.MaskFormerConfig(**fields).backbone_config,
        )
        super().__init__(backbone_config=named, **fields)
        self.backbone = backbone
        self.use_pretrained_backbone = use_pretrained_backbone
        self.use_timm_backbone = use_timm_backbone
        self.backbone_kwargs = dict(backbone_kwargs or {})

    def to_dict(self) -> dict[str, Any]:
        """The fields of transformers' class."""
        values = super().to_dict()
        for name in _NAMING:
            values.pop(name, None)
        return values


_NAMING = ("backbone", "use_pretrained_backbone", "use_timm_backbone", "backbone_kwargs")


class MaskFormerForInstanceSegmentation:
    """Builds transformers' model of that name, with the backbone that its configuration names."""

    def __new__(
        cls, config: transformers.MaskFormerConfig
    ) -> transformers.MaskFormerForInstanceSegmentation:
        """Builds the model.

        Args:
            config: of fastbb or transformers.
        """
        head = transformers.MaskFormerForInstanceSegmentation(config)
        if getattr(config, "use_pretrained_backbone", False):
            _load_backbone(head, config.backbone, _hub_options(config.backbone_kwargs))
        else:
            _load_timm_backbone(head)
        if len(head.model.pixel_level_module.encoder.channels) < 2:
            warn_caller(
                "transformers' MaskFormer cannot run on a single feature map: give its backbone "
                "more, such as `out_indices=[1, 2, 3, 4]`"
            )
        return head

    @classmethod
    def from_pretrained(
        cls, *args: Any, **kwargs: Any
    ) -> transformers.MaskFormerForInstanceSegmentation:
        """transformers' own: all weights come from the saved model."""
        return transformers.MaskFormerForInstanceSegmentation.from_pretrained(*args, **kwargs)


# --- which backbone


def _configuration(
    backbone: str | None,
    use_pretrained_backbone: bool,
    use_timm_backbone: bool,
    backbone_kwargs: Mapping[str, Any] | None,
    backbone_config: Any,
    default: Any,
) -> Any:
    """transformers' configuration of the backbone that the arguments name, or None.

    Args:
        default: configuration of the head's default backbone; says which stages the head needs.
    """
    options = {"use_timm_backbone": use_timm_backbone, "backbone_kwargs": backbone_kwargs}
    for name, value in {"backbone": backbone, **options}.items():
        if value and backbone_config is not None:
            raise ValueError(f"You can't specify both `{name}` and `backbone_config`.")
    for name, value in {"use_pretrained_backbone": use_pretrained_backbone, **options}.items():
        if value and backbone is None:
            raise ValueError(f"`backbone` must name a model if `{name}` is set")
    if backbone is None:
        return _upstream_config(backbone_config)
    kwargs = {k: v for k, v in (backbone_kwargs or {}).items() if k not in _HUB_OPTIONS}
    config = pretrained_config(backbone, HubOptions(**_hub_options(backbone_kwargs)))
    is_timm = isinstance(config, TimmBackboneConfig)
    if use_timm_backbone and not is_timm:
        raise ValueError(
            f"{backbone!r} is a {config.model_type} of transformers, not a timm model: "
            "leave use_timm_backbone out"
        )
    if is_timm and "in_chans" in kwargs:  # timm's name of it
        kwargs["num_channels"] = kwargs.pop("in_chans")
    asked = _asked_of(config, default)
    if "out_features" in kwargs:
        asked.pop("out_indices", None)
    asked |= kwargs
    named = _upstream_config(type(config).from_dict(config.to_dict(), **asked))
    for name in ("img_size", "always_partition"):  # options that OmDet-Turbo passes to timm
        if is_timm and hasattr(default, name):
            setattr(named, name, getattr(default, name))
    return named


def _hub_options(backbone_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (backbone_kwargs or {}).items() if name in _HUB_OPTIONS}


def _asked_of(config: Any, default: Any) -> dict[str, Any]:
    """Converts options that a head sets on its default backbone to fields of another config."""
    if default is None:
        return {}
    count = len(default.out_indices)
    if not isinstance(config, TimmBackboneConfig):
        return {"out_indices": list(range(len(config.stage_names)))[1:][-count:]}  # 0 is the stem
    asked: dict[str, Any] = {"out_indices": list(range(-count, 0))}  # only timm knows how many
    if default.model_type == config.model_type:
        for name in ("num_channels", "output_stride"):  # a DETR's `dilation` is a stride
            asked[name] = getattr(default, name)
    return asked


def _upstream_config(config: Any) -> Any:
    """Converts a configuration of fastbb to transformers'; returns others unchanged."""
    if not isinstance(config, BackboneConfig):
        return config
    known = transformers.CONFIG_MAPPING
    if config.model_type not in known:
        raise ValueError(f"transformers has no backbone {config.model_type!r} for its heads")
    values = config.to_dict()
    if isinstance(config, TimmBackboneConfig):
        lost = [*config.backbone_kwargs, *(["img_size"] if config.img_size else [])]
        lost += ["out_features"] if config.out_indices is None else []
        if lost:
            raise ValueError(
                f"transformers' TimmBackbone cannot keep {', '.join(lost)} of {config.backbone!r}; "
                f"it has {', '.join(_TIMM_FIELDS)}"
            )
        values = {name: values[name] for name in ("model_type", *_TIMM_FIELDS)}
    for name in ("dtype", "torch_dtype"):  # as above
        values.pop(name, None)
    return known[values.pop("model_type")].from_dict(values)


# --- its weights


def _load_timm_backbone(head: PreTrainedModel) -> None:
    """Loads timm's weights if the backbone's configuration asks for them."""
    config: Any = head.config
    backbone: Any = getattr(config, "backbone_config", None)
    if getattr(backbone, "use_pretrained_backbone", False):
        _load_backbone(head, backbone.backbone, {})


def _load_backbone(head: PreTrainedModel, name: str, hub: dict[str, Any]) -> None:
    """Loads all weights of a checkpoint into the backbone inside a head, or raises."""
    backbone, config, is_wrapped = _backbone_of(head)
    state = _weights(name, config, hub)
    if not is_wrapped:
        state = {key.removeprefix("_backbone."): tensor for key, tensor in state.items()}
    expected = backbone.state_dict()  # without stages and norms that the head does not use
    like = next(p for p in backbone.parameters() if p.is_floating_point())
    load_strict(
        backbone,
        {key: tensor for key, tensor in state.items() if key in expected},
        what=f"the backbone of {type(head).__name__}",
        optional=("*.num_batches_tracked",),
        dtype=like.dtype,
        device=like.device,
    )


def _weights(name: str, config: Any, hub: dict[str, Any]) -> StateDict:
    """The tensors of a backbone in a checkpoint, by the names transformers has in memory.

    Args:
        config: of transformers.
    """
    # the class knows its type; the instance may hold that of the one it was made from
    model_type = type(config).model_type
    options: dict[str, Any] = {"native": False} if model_type == "timm_backbone" else {}
    family, own = family_of(model_type)
    config = own.from_dict({**config.to_dict(), "model_type": model_type})
    backbone = family.backbone.from_pretrained(name, config=config, **hub, **options)
    if isinstance(backbone, TransformersBackbone):
        return backbone.model.state_dict()
    # MaskFormer's Swin has the names of files in memory too
    is_maskformers = model_type == "maskformer-swin"
    return backbone.to_checkpoint_names() if is_maskformers else backbone.state_dict()


def _backbone_of(head: PreTrainedModel) -> tuple[Any, Any, bool]:
    """Returns the backbone inside a head, its configuration, and whether it is transformers'.

    DETR and its relatives hold timm's module without the wrapper.
    """
    modules: list[Any] = list(head.modules())
    for module in modules:
        if isinstance(module, BackboneMixin):
            backbone: Any = module
            # not that of the head: a MaskFormer's Swin has another type, with more norms
            return backbone, backbone.config, True
    for module in modules:
        if hasattr(module, "feature_info"):
            config: Any = head.config
            return module, config.backbone_config, False
    raise ValueError(f"{type(head).__name__} has no backbone that fastbb knows how to find")


# --- fast backbones in heads that transformers builds


def register() -> None:
    """Has transformers build fast backbones into its heads: all types that fastbb computes itself.

    They are Swin, MaskFormer's Swin, ResNet, DINOv2 (also with registers), DINOv3 (ViT and
    ConvNeXt), BEiT, ConvNeXt, ConvNeXt V2 and timm.

    From now on, `transformers.AutoBackbone`, and every head that uses it in `from_pretrained` or
    `from_config`, builds transformers' own module, which is accelerated (`fastbb.accelerate`) at
    its first call outside training. Parameters, state dicts
    and saved files stay transformers'. DETR and its relatives take timm's module out of the
    backbone: accelerate those models themselves. A second call changes nothing.
    """
    if _BEFORE:
        return
    for config_class, adapter in _ADAPTERS.items():
        _BEFORE[config_class] = _registered().get(config_class)
        transformers.AutoBackbone.register(config_class, adapter, exist_ok=True)


def unregister() -> None:
    """Undoes `register`; backbones that were built stay as they are."""
    for config_class, before in _BEFORE.items():
        if _registered().get(config_class) is not _ADAPTERS[config_class]:
            continue  # another class has been registered since
        if before is None:
            del _registered()[config_class]
        else:
            _registered()[config_class] = before
    _BEFORE.clear()


def _adapter(upstream: Any) -> Any:
    """Makes a subclass of `upstream` that is accelerated at its first call outside training.

    Only then are all weights loaded, and the norms of a DETR replaced.
    """

    @wraps(upstream.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.training or is_tracing():
            return upstream.forward(self, *args, **kwargs)
        self.__class__ = upstream
        accelerate(self)
        return self.forward(*args, **kwargs)

    members = {
        "forward": forward,
        "__module__": __name__,
        "waits_for_fastbb": upstream,
        # transformers does not convert names of old files for classes of other packages
        "is_custom_code": classmethod(lambda cls: False),
    }
    return type(upstream.__name__, (upstream,), members)


# named, as pickles of models need before their first call
BeitBackbone = _adapter(transformers.BeitBackbone)
ConvNextBackbone = _adapter(transformers.ConvNextBackbone)
ConvNextV2Backbone = _adapter(transformers.ConvNextV2Backbone)
DINOv3ConvNextBackbone = _adapter(transformers.DINOv3ConvNextBackbone)
DINOv3ViTBackbone = _adapter(transformers.DINOv3ViTBackbone)
Dinov2Backbone = _adapter(transformers.Dinov2Backbone)
Dinov2WithRegistersBackbone = _adapter(transformers.Dinov2WithRegistersBackbone)
MaskFormerSwinBackbone = _adapter(maskformer.MaskFormerSwinBackbone)
ResNetBackbone = _adapter(transformers.ResNetBackbone)
SwinBackbone = _adapter(transformers.SwinBackbone)
TimmBackbone = _adapter(transformers.TimmBackbone)
_ADAPTERS = {
    adapter.config_class: adapter
    for adapter in (
        BeitBackbone,
        ConvNextBackbone,
        ConvNextV2Backbone,
        DINOv3ConvNextBackbone,
        DINOv3ViTBackbone,
        Dinov2Backbone,
        Dinov2WithRegistersBackbone,
        MaskFormerSwinBackbone,
        ResNetBackbone,
        SwinBackbone,
        TimmBackbone,
    )
}
_BEFORE: dict[Any, Any] = {}  # class registered for each configuration before, or None


def _registered() -> dict[Any, Any]:
    mapping: Any = transformers.AutoBackbone._model_mapping
    return mapping._extra_content  # there is no public way to remove an entry
