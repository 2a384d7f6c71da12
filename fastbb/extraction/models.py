"""Models that compute features: backbones, and timm's full models.

Each has an `Engine` of its own that decides how it runs.
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastbb_kernels.accuracy import FP32_REL_FOLDED

from ..backbone.base import Backbone
from ..engine.computation import BackboneMaps, Computation, without_engine
from ..engine.engine import Engine
from ..engine.settings import Settings
from ..hosts.accelerate import accelerate, restore
from ..hosts.replacement import AccelerateWarning
from ..hosts.transformers_backbone import TransformersBackbone
from ..models.timm_full import POOLED_OR_MAPS
from .outputs import Norm


class FeatureModel:
    """Computes some features by name.

    Attributes:
        module: with all weights that they depend on.
        engine: decides how it runs; None where it runs op by op in any mode.
    """

    def __init__(self, module: nn.Module, computation: Computation | None = None) -> None:
        self.module = module
        self._computation = computation
        self.engine: Engine | None = None

    @property
    def has_engine(self) -> bool:
        """Whether an engine decides how it runs."""
        return self._computation is not None

    def prepare(self, mode: str, expected_images: int | None) -> None:
        """Changes how it runs, see `Backbone.prepare`."""
        settings = Settings(mode, expected_images=expected_images)  # type: ignore[arg-type]
        settings.check_device(next(self.module.parameters()).device, "model")
        if self._computation is not None:
            self.engine = Engine(self._computation, settings)

    def state(self) -> dict[str, Tensor]:
        """The weights, by upstream's names."""
        return self.module.state_dict()

    def computed(self, pixels: Tensor, plain: bool) -> tuple[Tensor, ...]:
        """Computes what the features are made of, by the engine or plainly."""
        if self.engine is None or plain:
            assert self._computation is not None
            return self._computation.feature_maps(pixels)
        return self.engine(pixels)

    def check(self, pixels: Tensor) -> None:
        """Raises a ValueError if several images [B, 3, H, W] have not a feature each."""

    def features(self, pixels: Tensor, plain: bool = False) -> dict[str, Tensor]:
        """Computes features [B, ...] by name from pixels [B, 3, H, W].

        Args:
            pixels: in the dtype of the weights, on their device.
            plain: op by op, whatever the engine decides.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class _Stages(BackboneMaps):
    """Computes feature maps, and the last stage with the final norm, without it, or both."""

    maps: tuple[str, ...] = ()
    last: tuple[Norm, ...] = ()

    @property
    def outputs(self) -> Hashable:
        return self.maps, self.last

    @property
    def cache_key(self) -> str:
        return "-".join([super().cache_key, *self.last])

    def feature_maps(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        backbone, last = self.module, self.module.stage_names[-1]
        ends_last = self.last and last not in self.maps
        stages = backbone.forward_stages(pixel_values, [*self.maps, *([last] if ends_last else [])])
        # a feature pyramid computes its maps of all of them
        maps = list(backbone.returned_maps(stages, pixel_values)) if self.maps else []
        maps = maps[: len(self.maps)]  # class tokens may follow
        for norm in self.last:
            maps.append(backbone.final_state(stages[last]) if norm == "final" else stages[last])
        return tuple(maps)

    def copied(self) -> _Stages:
        return replace(self, module=copy.deepcopy(without_engine(self.module)))


class BackboneModel(FeatureModel):
    """A backbone: its maps, and of native families the features of the last stage.

    Args:
        backbone: in eval mode; its `out_features` are the requested maps.
        full: features of the last stage.
        norm: of the tokens.
        stored: stages whose maps are stored.
        pooled: stage whose mean is stored, or None.

    Raises:
        ValueError: the model has no such feature.
    """

    def __init__(
        self,
        backbone: Backbone,
        full: Sequence[str] = (),
        norm: Norm | None = None,
        stored: Sequence[str] = (),
        pooled: str | None = None,
    ) -> None:
        _check_native(backbone, full, norm)
        ends = {"embedding", "projection"} & set(full)
        final: list[Norm] = ["final"] if ends or norm == "final" else []
        last: list[Norm] = [*final, "none"] if norm == "none" else final
        used = {*stored, pooled}
        maps = tuple(name for name in backbone.stage_names if name in used)
        self.backbone = without_engine(backbone)
        if not getattr(self.backbone.config, "reshape_hidden_states", True):
            self.backbone.config.reshape_hidden_states = True  # of its own copy: features are maps
        super().__init__(self.backbone, _Stages(self.backbone, maps, tuple(last)))
        self._maps, self._last = maps, last
        self._full, self._norm, self._stored, self._pooled = full, norm, stored, pooled

    def prepare(self, mode: str, expected_images: int | None) -> None:
        if self._last:
            super().prepare(mode, expected_images)
        else:
            self.module = self.backbone.prepare(mode, expected_images=expected_images)
            self.engine = self.module._engine

    def state(self) -> dict[str, Tensor]:
        return self.backbone.used_weights(self._maps, "final" in self._last)

    def features(self, pixels: Tensor, plain: bool = False) -> dict[str, Tensor]:
        computed = self.computed(self.backbone._checked(pixels), plain)
        found = dict(zip([*self._maps, *self._last], computed))
        features: dict[str, Tensor] = {}
        for name in self._full:
            features[name] = self._feature(name, found)
        if self._pooled is not None:
            features["pooled"] = self._mean(found[self._pooled])
        return features | {f"maps.{name}": found[name] for name in self._stored}

    def check(self, pixels: Tensor) -> None:
        if isinstance(self.backbone, TransformersBackbone):
            _check_rows(self.backbone, self.features(pixels, plain=True), len(pixels))

    def _mean(self, feature_map: Tensor) -> Tensor:
        config = self.backbone.config
        if feature_map.ndim == 3 and not hasattr(config, "reshape_hidden_states"):
            return feature_map.float().mean(1)  # VitPose's, of patches alone
        if feature_map.ndim != 4:  # transformers' own backbones have flags as they were built
            raise ValueError(
                f"pooled: this {self.backbone.config.model_type} returns tokens, not maps: load it "
                "with reshape_hidden_states=True"
            )
        return feature_map.float().mean((2, 3))

    def _feature(self, name: str, found: dict[str, Tensor]) -> Tensor:
        """Computes a feature of the last stage from its states before and after the final norm."""
        backbone = self.backbone
        if name == "embedding":
            return backbone.embedding_of(found["final"])
        if name == "projection":
            return backbone.projection_of(found["final"])
        state = found[str(self._norm)]
        if name == "patch_mean":
            return backbone.patch_mean_of(state)
        tokens = backbone.tokens_of(state)
        return tokens[:, 0] if name == "cls" else tokens


def _check_rows(backbone: Backbone, features: Mapping[str, Tensor], n_images: int) -> None:
    """Raises a ValueError for a feature that has no row for each image."""
    for name, feature in features.items():
        if len(feature) != n_images:  # of RF-DETR, the tokens of each window
            raise ValueError(
                f"{name}: {backbone.config.model_type} gives {list(feature.shape)} for {n_images} "
                "images: no row for each; load it with reshape_hidden_states=True"
            )


def _check_native(backbone: Backbone, full: Sequence[str], norm: Norm | None) -> None:
    """Raises a ValueError for a feature that a native backbone has not."""
    what = type(backbone).__name__
    if "projection" in full and not backbone.has_projection:
        raise ValueError(
            f"projection: a {what} has none, as CLIP has to the space that images share with text; "
            "ask for --features embedding"
        )
    tokens = [name for name in full if name not in ("embedding", "projection")]
    if tokens and not backbone.has_tokens:
        raise ValueError(f"{tokens[0]}: a {what} is a CNN and has no tokens; {POOLED_OR_MAPS}")
    if "cls" in full and not backbone.n_prefix_tokens:
        raise ValueError(
            f"cls: a {what} has no class token; ask for --features embedding, patch_mean or pooled"
        )
    if tokens and norm == "final" and not backbone.norms_tokens:
        raise ValueError(
            f"{tokens[0]}: this {what} normalizes only after it pooled its tokens: ask for them "
            "with --norm none, or for --features embedding"
        )
    ends = [name for name in full if name not in tokens]
    if (ends or norm == "final") and backbone.lacks_final_norm:
        without = "" if ends else "ask for --norm none, or "
        raise ValueError(f"{full[0]}: {no_final_norm(backbone)}; {without}{POOLED_OR_MAPS}")


def no_final_norm(backbone: Backbone) -> str:
    return (
        f"the checkpoint of this {type(backbone).__name__} has no trained final norm, as it was "
        "trained or saved without a head"
    )


@dataclass(frozen=True)
class _FullOutputs:
    """Computes the output of timm's full model, and its tokens: the `Computation` of its engine.

    Attributes:
        module: timm's model; its final norm is `fastbb_norm` where tokens before it are wanted.
        wanted: "pre_logits", "logits" and "tokens", in this order.
        splits: whether its forward is `forward_head` after `forward_features`.
        cache_key: key of measured choices.
    """

    module: nn.Module
    wanted: tuple[str, ...]
    splits: bool
    cache_key: str
    exactness = FP32_REL_FOLDED

    @property
    def outputs(self) -> Hashable:
        return self.wanted

    def feature_maps(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        model: Any = self.module
        if not self.splits:
            return (model(pixel_values),)
        tokens = model.forward_features(pixel_values)
        final = model.fastbb_norm(tokens) if hasattr(model, "fastbb_norm") else tokens
        return tuple(
            tokens
            if name == "tokens"
            else model.forward_head(final, pre_logits=name == "pre_logits")
            for name in self.wanted
        )

    def copied(self) -> _FullOutputs:
        module = copy.deepcopy(self.module)
        restore(module)
        return replace(self, module=module)


class TimmModel(FeatureModel):
    """timm's full model, accelerated.

    Args:
        model: in eval mode, with its head only if the projection is wanted.
        full: features to compute.
        norm: of the tokens.
        img_size: side of the images, or (height, width), where it is not that of timm's weights.

    Raises:
        ValueError: the model has no such feature, or does not run in its dtype.
    """

    def __init__(
        self,
        model: nn.Module,
        full: Sequence[str],
        norm: Norm | None,
        img_size: int | Sequence[int] | None,
    ) -> None:
        self._full = full
        self._projects = "projection" in full and model.num_classes != 0  # type: ignore[operator]
        wanted = ["pre_logits"] if {"embedding", "projection"} & set(full) else []
        wanted += ["logits"] if self._projects else []
        wanted += ["tokens"] if norm is not None else []
        like = next(model.parameters())
        generator = torch.Generator().manual_seed(0)
        described: Any = model.pretrained_cfg
        size = img_size or described["input_size"][1:]
        height, width = (size, size) if isinstance(size, int) else size
        example = torch.randn(1, 3, height, width, generator=generator)
        example = example.to(like.device, like.dtype)
        with torch.no_grad():
            splits, calls = self._try(model, example, wanted)
            if norm is not None:
                self._n_prefix = _check_tokens(model, example, full, norm, calls)
        if splits:
            mode = "triton" if like.device.type == "cuda" else "eager"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", AccelerateWarning)
                # these modes measure nothing: another process computes the same
                accelerate(model, mode=mode)
        shapes = [(name, list(p.shape)) for name, p in model.named_parameters()]
        identity = repr((shapes, wanted, described.get("architecture")))
        key = f"{type(model).__name__}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
        super().__init__(model, _FullOutputs(model, tuple(wanted), splits, key))
        self._wanted = wanted

    def _try(self, model: Any, example: Tensor, wanted: Sequence[str]) -> tuple[bool, _Calls]:
        """Runs an example.

        Returns:
            Whether the model's forward is its two halves, one by one, and what the halves gave.
        """
        what = f"timm's {type(model).__name__}"
        dtype = str(example.dtype).removeprefix("torch.")
        halves: Any = None
        calls = _Calls()
        try:
            whole = model(example)
            with suppress(AttributeError, NotImplementedError, TypeError), calls.of(model):
                calls.features = model.forward_features(example)
                halves = model.forward_head(calls.features)
        except (AssertionError, RuntimeError) as error:
            cause = "model" if example.dtype == torch.float32 else "precision"
            raise ValueError(
                f"{cause}: {what} does not run in {dtype} on {example.device} with pixel_values of "
                f"shape {list(example.shape)}: {error}"
            ) from error
        if wanted != ["pre_logits"] and isinstance(whole, Tensor) and not whole.isfinite().all():
            raise ValueError(f"precision: {what} gives NaN or infinite values in {dtype}")
        is_vector = isinstance(whole, Tensor) and whole.ndim == 2
        if "pre_logits" in wanted and not is_vector:
            raise ValueError(f"embedding: {what} returns no vector; {POOLED_OR_MAPS}")
        splits = isinstance(halves, Tensor) and is_vector and torch.equal(halves, whole)
        if not splits and wanted != ["pre_logits"]:
            raise ValueError(f"{self._full[-1]}: {what} has no tokens of its own; {POOLED_OR_MAPS}")
        return splits, calls

    def state(self) -> dict[str, Tensor]:
        state = self.module.state_dict()
        return {name.replace("fastbb_norm.", "norm.", 1): tensor for name, tensor in state.items()}

    def features(self, pixels: Tensor, plain: bool = False) -> dict[str, Tensor]:
        found = dict(zip(self._wanted, self.computed(pixels, plain)))
        tokens = found.get("tokens")
        if tokens is not None and tokens.ndim == 4:  # Swin's, [B, h, w, C]
            tokens = tokens.flatten(1, 2)
        features: dict[str, Tensor] = {}
        for name in self._full:
            if name in ("embedding", "projection"):
                is_logits = name == "projection" and self._projects
                features[name] = found["logits" if is_logits else "pre_logits"]
                continue
            assert tokens is not None
            features[name] = of_tokens(name, tokens, self._n_prefix)
        return features


def of_tokens(name: str, tokens: Tensor, n_prefix: int) -> Tensor:
    """Computes "cls", "patch_mean" or "tokens" from the tokens [B, N, C] of a full model.

    Args:
        name: of the feature.
        tokens: those before the patches first.
        n_prefix: number of tokens before the patches.
    """
    if name == "cls":
        return tokens[:, 0]
    return tokens[:, n_prefix:].float().mean(1) if name == "patch_mean" else tokens


class _Calls:
    """Calls of the final norm of timm's model, beside its features.

    Attributes:
        features: of `forward_features`.
        final: input and output of the last call of the norm.
    """

    features: Any = None
    final: tuple[Tensor, Tensor] | None = None

    @contextmanager
    def of(self, model: Any) -> Iterator[None]:
        """Records the calls."""

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            self.final = args[0], output

        final = getattr(model, "norm", None)
        with final.register_forward_hook(keep) if isinstance(final, nn.Module) else nullcontext():
            yield


def _check_tokens(
    model: Any, example: Tensor, full: Sequence[str], norm: Norm, calls: _Calls
) -> int:
    """Checks the tokens of timm's model, and takes its final norm out for those before it.

    Args:
        model: timm's.
        example: pixels.
        full: the wanted features.
        norm: of the tokens.
        calls: for these pixels.

    Returns:
        The number of tokens before the patches.

    Raises:
        ValueError: there are no such tokens.
    """
    wanted = next(name for name in full if name not in ("embedding", "projection"))
    what = f"timm's {type(model).__name__}"
    features = calls.features
    is_map = isinstance(features, Tensor) and features.ndim == 4
    channels_last = is_map and str(getattr(model, "output_fmt", "")).endswith("NHWC")
    if not isinstance(features, Tensor) or not (features.ndim == 3 or channels_last):
        raise ValueError(f"{wanted}: {what} has no tokens; {POOLED_OR_MAPS}")
    has_class = getattr(model, "cls_token", None) is not None
    n_prefix = getattr(model, "num_prefix_tokens", None if has_class else 0)
    if n_prefix is None and full != ["tokens"]:
        raise ValueError(
            f"{wanted}: {what} does not say which tokens are patches; {POOLED_OR_MAPS}"
        )
    if "cls" in full and not (has_class and n_prefix):
        raise ValueError(
            f"cls: {what} has no class token; ask for --features embedding, patch_mean or pooled"
        )
    final = getattr(model, "norm", None)
    if isinstance(final, nn.Identity):
        if norm == "final":
            raise ValueError(
                f"{wanted}: {what} normalizes only after it pooled its tokens: ask for them with "
                "--norm none, or for --features embedding"
            )
        return n_prefix or 0
    if calls.final is None or not torch.equal(calls.final[1], features):
        raise ValueError(
            f"{wanted}: {what} does not end with a norm that is known; {POOLED_OR_MAPS}"
        )
    if norm == "none":
        model.fastbb_norm, model.norm = final, nn.Identity().eval()
        if not torch.equal(model.forward_features(example), calls.final[0]):
            raise ValueError(f"{wanted}: {what} has no tokens before its norm; {POOLED_OR_MAPS}")
    return n_prefix or 0
