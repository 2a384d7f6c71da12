"""The backbone API that all families share, with the names of transformers 5.23."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from fastbb_kernels.accuracy import FP32_REL

from ..weights.derived import RemembersDerived
from ..weights.folded_weights import autocasts
from .checkpoint import (
    LoadingInfo,
    StateDict,
    as_dtype,
    find_prefix,
    load_strict,
    read_state_dict,
    save_state_dict,
    shapes_only,
    strip_prefix,
)
from .checkpointing import GradientCheckpointing
from .configuration import BackboneConfig
from .embedding import FinalNorm
from .hub import ConfigFile, HubOptions, absolute_name
from .mixin import BackboneMixin
from .output import BackboneOutput

if TYPE_CHECKING:
    from ..engine.engine import Engine
    from ..engine.explanation import Explanation
    from ..inspect.verify import VerifyReport

logger = logging.getLogger(__name__)

Module = TypeVar("Module", bound="Backbone")


class Backbone(BackboneMixin, FinalNorm, GradientCheckpointing, RemembersDerived):
    """Base of the families.

    A family implements `forward_stages`, `feature_map` and the names of its weights. This class
    implements loading, saving, the choice of outputs and the checks of the input.
    """

    config_class: ClassVar[type[BackboneConfig]]
    main_input_name: ClassVar[str] = "pixel_values"
    # patterns of names that a checkpoint may lack, and of names in it that are not loaded
    optional_weights: ClassVar[tuple[str, ...]] = ()
    unused_weights: ClassVar[tuple[str, ...]] = ()
    # arguments of `forward` that only this family has
    forward_options: ClassVar[tuple[str, ...]] = ()
    # allowed error in fp32, relative to the largest magnitude of a map
    exactness: float = FP32_REL
    # height and width of images where the configuration names none
    usual_size: ClassVar[tuple[int, int]] = (224, 224)
    # chooses how a prepared backbone runs; None if it is not prepared
    _engine: "Engine | None" = None
    # name and options of the checkpoint, where its image processor is
    _origin: tuple[str, HubOptions] | None = None

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = self.own_config(config)

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles take: not the cached parts, which are of these very layers."""
        return {name: v for name, v in vars(self).items() if name != "_cached_parts"}

    def forward_stages(
        self,
        pixel_values: Tensor,
        wanted: Sequence[str],
        attentions: list[Tensor] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Runs the backbone up to the last wanted stage.

        Args:
            pixel_values: [B, C, H, W], checked.
            wanted: names of stages, in order of depth.
            attentions: list to which the attention weights of each stage are appended, or None.
            kwargs: options of the family.

        Returns:
            The hidden state of each wanted stage, before the norm that `feature_map` applies: a map
            [B, C, h, w], or of a ViT tokens [B, N, C].
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward_stages")

    def feature_map(self, stage: str, hidden_state: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Computes the returned map [B, C, h, w] from the hidden state of a stage.

        Args:
            stage: its name.
            hidden_state: of `forward_stages`.
            image_size: height and width of the pixels.
        """
        return hidden_state

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | Sequence[int] | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Computes feature maps, running no stage beyond the last one asked for.

        Args:
            pixel_values: [B, C, H, W] of any floating dtype, on the device of the weights. They are
                converted to the dtype of the weights, except under torch.autocast. B may be 0.
            output_hidden_states: also return the hidden state of every stage; with a list of
                indices, the other stages are None.
            output_attentions: also return the attention weights of the last block of each stage.
            return_dict: False returns a tuple.
            kwargs: options of the family. Others are ignored, as in transformers: processors
                return `pixel_mask`, for example.

        Returns:
            BackboneOutput, or a tuple of its values.

        Raises:
            ValueError: the input is not what the backbone takes.
        """
        pixel_values = self._checked(pixel_values)
        config = self.config
        hidden: bool | Sequence[int] = (
            config.output_hidden_states if output_hidden_states is None else output_hidden_states
        )
        if not isinstance(hidden, Sequence):
            hidden = bool(hidden)
        if output_attentions is None:
            output_attentions = config.output_attentions
        attentions: list[Tensor] | None = [] if output_attentions and self.has_attentions else None

        wanted = (
            self.stage_names if hidden is not False or attentions is not None else self.out_features
        )
        only_maps = hidden is False and attentions is None
        if self._engine is not None and only_maps and not self._takes(kwargs):
            output = BackboneOutput(self._engine(pixel_values))
        else:
            stages = self.forward_stages(pixel_values, wanted, attentions, **kwargs)
            output = BackboneOutput(
                self.returned_maps(stages, pixel_values),
                None if hidden is False else self._hidden_states(stages, hidden),
                None if attentions is None else tuple(attentions),
            )
        if return_dict is None:
            return_dict = config.return_dict
        return output if return_dict else output.to_tuple()

    def feature_maps(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Computes the maps [B, C, h, w] of `out_features` op by op, from checked [B, C, H, W]."""
        stages = self.forward_stages(pixel_values, self.out_features)
        return self.returned_maps(stages, pixel_values)

    def returned_maps(self, stages: dict[str, Tensor], pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Computes the maps of `out_features` from the hidden states of stages."""
        height, width = pixel_values.shape[2:]
        return tuple(
            self.feature_map(name, stages[name], (height, width)) for name in self.out_features
        )

    def called_modules(self) -> dict[str, str]:
        """The modules that run layer by layer, by name, with the reason: hooks, or other layers.

        Reasons of other layers end in `PUT_INTO_IT`.

        The name "" stands for the backbone itself.
        """
        return {}

    def _takes(self, kwargs: dict[str, Any]) -> bool:
        """Whether one of these arguments changes the result of the family's forward."""
        return any(kwargs.get(name) for name in self.forward_options)

    def _hidden_states(
        self, stages: dict[str, Tensor], selected: bool | Sequence[int]
    ) -> tuple[Tensor | None, ...]:
        states = tuple(stages[name] for name in self.stage_names)
        if isinstance(selected, bool):
            return states
        outside = [i for i in selected if i not in range(-len(states), len(states))]
        if outside:
            raise ValueError(
                f"output_hidden_states must be True, False or indices of the {len(states)} stages, "
                f"got {list(selected)}"
            )
        keep = {index % len(states) for index in selected}
        return tuple(state if i in keep else None for i, state in enumerate(states))

    def _checked(self, pixel_values: Any) -> Tensor:
        """Checks the input of `forward` and converts it to the dtype of the weights.

        Raises:
            ValueError: the input is not what the backbone takes.
        """
        if not isinstance(pixel_values, Tensor) or pixel_values.ndim != 4:
            is_tensor = isinstance(pixel_values, Tensor)
            got = list(pixel_values.shape) if is_tensor else type(pixel_values).__name__
            raise ValueError(
                f"pixel_values must be a tensor [batch, channels, height, width], got {got}; "
                "AutoImageProcessor makes one from images, and `x[None]` from a single one"
            )
        _, channels, height, width = pixel_values.shape
        if channels != self.config.num_channels:
            raise ValueError(
                "Make sure that the channel dimension of the pixel values match with the one set "
                f"in the configuration. Expected {self.config.num_channels} channels in "
                f"dimension 1, got pixel_values of shape {list(pixel_values.shape)}."
            )
        if height == 0 or width == 0:
            raise ValueError(f"pixel_values must have pixels, got shape {list(pixel_values.shape)}")
        weight = self._first_weight()
        if pixel_values.device != weight.device:
            raise ValueError(
                f"pixel_values are on {pixel_values.device}, the weights on {weight.device}; "
                "move one of them with .to(...)"
            )
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"pixel_values are {pixel_values.dtype}, the weights {weight.dtype}; rescale and "
                f"normalize them as AutoImageProcessor does, or convert with .to({weight.dtype})"
            )
        forced = self._engine is not None and self._engine.settings.precision is not None
        return in_dtype(pixel_values, weight.dtype, forced)

    def prepare(
        self: Module,
        mode: str = "auto",
        precision: str | None = None,
        example: Tensor | Sequence[int] | None = None,
        cuda_graph: bool | str = "auto",
        expected_images: int | None = None,
    ) -> Module:
        """Returns a backbone for inference that computes the same maps in the fastest checked way.

        The backbone runs eagerly where the fast way cannot be used (a gradient is needed, weights
        changed, an error occurred), and `explain()` says why. Hidden states and attentions are
        always computed eagerly. Changes of weights, layers and hooks after a compilation are
        noticed. Compiling or converting for over 3 s is announced by the logger "fastbb".

        Args:
            mode: "auto" measures on a GPU what is fastest, and compiles on a CPU where that pays;
                "eager" is PyTorch op by op, "triton" our kernels, "compile" torch.compile over the
                whole backbone, "triton+compile" torch.compile around our kernels, "openvino"
                OpenVINO over the whole backbone on a CPU (extra `openvino`).
            precision: "fp32", "tf32" (NVIDIA), "bf16" or "fp16" converts a copy of the weights;
                the default is the precision of the weights, which are then shared. Maps have the
                dtype of the weights, pixels may have any floating dtype.
            example: pixels [B, C, H, W], or their (B, H, W), to prepare for now. Default: the first
                pixels of a call.
            cuda_graph: replay a recorded graph; "auto": on a GPU, where it takes at most a quarter
                of the free memory.
            expected_images: number of images to come; decides whether compiling pays.

        Returns:
            A backbone of the same class.

        Raises:
            ValueError: an argument has another value, the device does not support it, or the
                backbone is in training mode.
        """
        from ..engine.prepare import prepare

        return prepare(self, mode, precision, example, cuda_graph, expected_images)

    def explain(self) -> "Explanation":
        """How each shape of input so far runs, and why; a table at a prompt or when printed."""
        from ..engine.prepare import explain

        return explain(self)

    def verify(
        self, reference: str | nn.Module = "auto", inputs: Tensor | Sequence[Tensor] | None = None
    ) -> "VerifyReport":
        """Compares every feature map with that of the model's own library.

        Args:
            reference: "auto" is upstream's own model where its library is installed, else our
                eager model in float64; or a module that returns the same maps.
            inputs: pixels [B, C, H, W]; default: random ones of the model's size and of another.

        Returns:
            A table of measured and allowed errors; `passed` is whether all errors are allowed.
        """
        from ..inspect.verify import verify

        return verify(self, reference, inputs)

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width of the images that the model was made for."""
        size = getattr(self.config, "image_size", None) or self.usual_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the weights."""
        return self._first_weight().dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self._first_weight().device

    def _first_weight(self) -> nn.Parameter:
        return next(p for p in self.parameters() if p.is_floating_point())

    @classmethod
    def from_checkpoint_names(
        cls, state: StateDict, backbone: nn.Module
    ) -> tuple[StateDict, str, list[str]]:
        """Finds the backbone in a checkpoint and renames its tensors to the backbone's names.

        Args:
            state: names and tensors of a whole checkpoint, of a backbone or a model around one.
            backbone: a backbone of this class, possibly on the meta device.

        Returns:
            The renamed tensors, the prefix they were found under, the names of all others. Here:
            those of the state dict, wherever in the checkpoint they are.

        Raises:
            ValueError: the backbone is not in the checkpoint.
        """
        what = cls.__name__.removesuffix("Backbone")
        prefix = find_prefix(state, backbone.state_dict(), what)
        found, outside = strip_prefix(state, prefix)
        return found, prefix, outside

    def to_checkpoint_names(self) -> StateDict:
        """The tensors to save, by the names of transformers' checkpoints."""
        return self.state_dict()

    @classmethod
    def own_config(cls, config: Any) -> Any:
        """Returns a configuration of this family, converted if it is transformers' own.

        Raises:
            ValueError: it is another family's.
        """
        if isinstance(config, cls.config_class):
            return config
        own = cls.config_classes().get(getattr(config, "model_type", ""))
        if own is None or isinstance(config, BackboneConfig):
            raise ValueError(
                f"{cls.__name__} needs a {cls.config_class.__name__}, "
                f"got {type(config).__name__}; AutoBackbone.from_config chooses the class by itself"
            )
        return own.from_dict(config.to_dict())

    @classmethod
    def config_classes(cls) -> dict[str, type[BackboneConfig]]:
        """Configuration classes by `model_type`; subclasses have other semantics."""
        return {c.model_type: c for c in (cls.config_class, *cls.config_class.__subclasses__())}

    @classmethod
    def from_config(cls: type[Module], config: BackboneConfig) -> Module:
        """Builds a backbone with random weights; the configuration is copied."""
        own = cls.own_config(config)
        return cls(type(own).from_dict(own.to_dict()))

    @classmethod
    def from_pretrained(
        cls: type[Module],
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
        **overrides: Any,
    ) -> Any:
        """Loads a backbone, in eval mode.

        Args:
            pretrained_model_name_or_path: local directory, bundled model or Hub repository, of a
                backbone or of a model that contains one.
            config: replaces config.json; or a `ConfigFile`, which is not read again.
            dtype: of the weights; default (or "auto"): that of the checkpoint.
            torch_dtype: transformers' older name of `dtype`.
            device: of the weights; default: CPU.
            revision: branch, tag or commit on the Hub.
            cache_dir: cache of downloads.
            token: access token for the Hub.
            local_files_only: do not ask the Hub.
            output_loading_info: return (backbone, LoadingInfo).
            attn_implementation: accepted for compatibility with transformers and ignored.
            overrides: fields of the configuration, such as `out_indices` or `out_features`.

        Raises:
            OSError: the model does not exist, or its files are corrupt.
            ValueError: the weights do not fit, or the configuration is another model's.
            TypeError: an override is not a field of the configuration.
        """
        hub = HubOptions(revision, cache_dir, token, local_files_only)
        own: BackboneConfig
        if config is None:
            config = ConfigFile.read(pretrained_model_name_or_path, hub)
        if isinstance(config, ConfigFile):
            values = config.backbone
            known = cls.config_classes()
            model_type = values.get("model_type")
            if model_type not in known:
                raise ValueError(
                    f"{cls.__name__} loads model_type {' or '.join(known)}, but "
                    f"{str(pretrained_model_name_or_path)!r} is {model_type!r}; "
                    "AutoBackbone.from_pretrained chooses the class by itself"
                )
            own = known[model_type].from_dict(values, **overrides)
        else:
            own = cls.own_config(config)
            own = type(own).from_dict(own.to_dict(), **overrides)
        backbone, info = cls.from_state_dict(
            own,
            read_state_dict(pretrained_model_name_or_path, hub),
            name=str(pretrained_model_name_or_path),
            dtype=dtype or torch_dtype,
            device=device,
        )
        backbone._origin = absolute_name(pretrained_model_name_or_path), hub.without_secret()
        return (backbone, info) if output_loading_info else backbone

    @classmethod
    @torch.inference_mode(False)  # weights loaded inside inference mode could not be trained later
    def from_state_dict(
        cls: type[Module],
        config: BackboneConfig,
        state: StateDict,
        *,
        name: str = "the checkpoint",
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
    ) -> tuple[Module, LoadingInfo]:
        """Builds a backbone of a configuration with the tensors of a checkpoint.

        Args:
            config: of the backbone.
            state: tensors of the checkpoint, by its own names.
            name: of the checkpoint, for messages.
            dtype: of the weights; default (or "auto"): that of the checkpoint.
            device: of the weights; default: CPU.

        Raises:
            ValueError: the weights do not fit; lists what is missing, unknown or misshapen.
        """
        with shapes_only():
            backbone = cls(config)
        found, prefix, outside = cls.from_checkpoint_names(state, backbone)
        backbone.init_optional_weights()
        initialized, unused = load_strict(
            backbone,
            found,
            what=f"{cls.__name__} from {name!r}",
            optional=cls.optional_weights,
            unused=cls.unused_weights,
            dtype=as_dtype(dtype),
            device=device,
        )
        backbone.eval()
        info = LoadingInfo(prefix, sorted(outside + unused), initialized)
        backbone.report_loading(name, info)
        return backbone, info

    def init_optional_weights(self) -> None:
        """Initializes the weights that a checkpoint may lack, which are on the meta device."""

    def report_loading(self, name: str, info: LoadingInfo) -> None:
        """Logs the tensors of a checkpoint that were not used."""
        if info.ignored:
            count = len(info.ignored)
            logger.info("%s: %d tensors are not the backbone's: %s", name, count, info.ignored)

    def without_weights(self: Module) -> Module:
        """Builds a backbone of the same configuration on the meta device."""
        with shapes_only():
            return self.from_config(self.config)

    def check_own_weights(self) -> None:
        """Checks that a backbone of this configuration with these weights computes the same.

        Raises:
            ValueError: adapters or other layers were put into it.
        """
        own, state = self.without_weights().state_dict(), self.state_dict()
        shapes = {name: tensor.shape for name, tensor in own.items()}
        foreign = sorted(n for n, tensor in state.items() if shapes.get(n) != tensor.shape)
        replaced = [n for n, why in self.called_modules().items() if why.endswith(PUT_INTO_IT)]
        if foreign or replaced:
            found = (
                f"its weight {foreign[0]!r}" if foreign else f"what was put into {replaced[0]!r}"
            )
            raise ValueError(
                f"no checkpoint of a {type(self).__name__} has {found}: merge adapters first "
                "(merge_and_unload of PEFT) or save them by their own library, and remove "
                "parametrizations and other layers"
            )

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Writes config.json and model.safetensors, from which transformers computes equal outputs.

        Args:
            save_directory: created if it does not exist.

        Raises:
            ValueError: adapters or other layers have weights that a checkpoint has no names for.
        """
        self.check_own_weights()
        config = type(self.config).from_dict(self.config.to_dict())
        config.architectures = [type(self).__name__]
        config.dtype = str(self.dtype).removeprefix("torch.")
        config.save_pretrained(save_directory)  # first: a field that JSON cannot hold is refused
        save_state_dict(self.to_checkpoint_names(), Path(save_directory))


PUT_INTO_IT = "was put into it"


def in_dtype(pixel_values: Tensor, dtype: torch.dtype, forced: bool) -> Tensor:
    """Converts floating pixels to the dtype of the weights, unless torch.autocast chooses it.

    Args:
        pixel_values: of any dtype. Integers are returned as they are. autocast does not convert
            float64.
        dtype: of the weights.
        forced: a precision was requested, so autocast does not choose.
    """
    if not pixel_values.is_floating_point():
        return pixel_values
    is_cast = pixel_values.dtype != torch.float64 and autocasts(pixel_values.device.type)
    return pixel_values if is_cast and not forced else pixel_values.to(dtype)
