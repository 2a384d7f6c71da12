"""timm's full models, which have the final norm and the head that features-only modules lack."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..backbone.hub import DEFAULT_HUB, HubOptions, TimmSource, timm_source
from .timm import TimmBackbone, TimmBackboneConfig
from .timm_loading import MissingWeightsError, classifier_names, create_full, joined

POOLED_OR_MAPS = "ask for --features pooled or maps"
_NO_PROJECTION = (
    "projection: wanted the image tower of a CLIP or SigLIP model as it was trained with text, and "
)


def load_full(
    name_or_dir: str | os.PathLike[str],
    hub: HubOptions = DEFAULT_HUB,
    *,
    config: TimmBackboneConfig | None = None,
    projects: bool = False,
    layers: Sequence[str] = (),
) -> tuple[TimmBackboneConfig, nn.Module]:
    """Loads timm's full model of a timm name, directory or Hub repository, in eval mode.

    It is the model that timm builds for `num_classes=0`, unless its head is wanted.

    Args:
        name_or_dir: as for `TimmBackbone.from_pretrained`.
        hub: options for downloads.
        config: of a backbone of this name; default: that of the name.
        projects: keep CLIP's projection, which is the head.
        layers: names of modules; the head is kept, if the checkpoint has its weights or a layer is
            in it.

    Returns:
        The configuration and the model.

    Raises:
        OSError: the model does not exist, or its weights do not load or lack something.
        ValueError: the weights are those of a backbone alone, timm cannot build the model, or it
            has no projection.
    """
    name = str(name_or_dir)
    source = timm_source(name_or_dir, hub)
    if source is None:
        raise ValueError(
            f"{name!r} is a backbone that was saved alone, without the final norm and the head of "
            f"timm's full model, from which this feature is computed: {POOLED_OR_MAPS}, or load "
            "timm's own checkpoint"
        )
    if config is None:
        config = TimmBackboneConfig(source.architecture, backbone_kwargs=source.model_args)
    kwargs = config.model_arguments()

    def create(head: bool) -> nn.Module:
        try:
            return create_full(source.architecture, kwargs, source, hub, head=head).eval()
        except MissingWeightsError as error:
            if layers and head and _lacks_only_a_head(error, layers):
                return create(False)
            what = "projection: " if projects and head else ""
            raise OSError(
                f"{what}{error}; --features pooled and maps need no final norm"
            ) from error

    pools = projects and _projects_by_pooling(name, source)
    with torch.inference_mode(False):
        model = create(bool(layers) or (projects and not pools))
    if pools and getattr(model, "attn_pool", None) is None:
        raise ValueError(f"{_NO_PROJECTION}{name!r} has not SigLIP's pooling by attention")
    if projects and not pools:
        _check_projection(name, model)
    return config, model


def _lacks_only_a_head(error: MissingWeightsError, layers: Sequence[str]) -> bool:
    """Whether a checkpoint lacks nothing but classifiers that no layer is in or around."""
    heads = [f"{name}." for name in error.classifiers]
    return all(name.startswith(tuple(heads)) for name in error.names) and not any(
        head.startswith(f"{layer}.") or f"{layer}.".startswith(head)
        for layer in layers
        for head in heads
    )


def _projects_by_pooling(name: str, source: TimmSource) -> bool:
    """Whether the image embeds of a model are its pooled output, as SigLIP's are.

    Raises:
        ValueError: the model is neither SigLIP's nor CLIP's, or is a classifier made of one.
    """
    import timm

    cfg = source.pretrained_cfg
    architecture, _, tag = source.architecture.removeprefix("timm/").partition(".")
    tag = cfg.get("tag") or tag
    words = {*architecture.split("_"), *tag.split("_")}
    try:
        original = timm.get_pretrained_cfg(f"{architecture}.{tag}") if tag else None
    except RuntimeError:  # the architecture has no such tag
        original = None
    n_classes = source.model_args.get("num_classes", cfg.get("num_classes"))
    is_original = original is not None and n_classes == original.num_classes
    if is_original and "ft" not in words and not cfg.get("label_names"):
        if "siglip" in words and "gap" not in words and n_classes == 0:
            return True
        if "clip" in words and n_classes:
            return False
    raise ValueError(
        f"{_NO_PROJECTION}timm's description of {name!r} is not that of one: ask for --features "
        "embedding"
    )


def _check_projection(name: str, model: Any) -> None:
    """Raises a ValueError if the head of a model is not CLIP's projection."""
    heads = [model.get_submodule(head) for head in classifier_names(model)]
    projection = heads[0] if len(heads) == 1 else None
    bias = getattr(projection, "bias", None)
    # a classifier of as many classes has a bias; CLIP's projection has none, timm's copy has zeros
    if not isinstance(projection, nn.Linear) or (bias is not None and bool(bias.count_nonzero())):
        raise ValueError(
            f"{_NO_PROJECTION}the head of {name!r} is not one linear layer without bias, and only "
            "such a head is taken for CLIP's projection: ask for --features embedding"
        )


def check_same_weights(backbone: TimmBackbone, full: nn.Module) -> None:
    """Refuses a backbone whose weights are not those of the checkpoint it was loaded from.

    Args:
        backbone: loaded from where the full model was.
        full: timm's full model, with weights of the same dtype on the same device.

    Raises:
        ValueError: names a tensor that differs.
    """
    theirs = {joined(name): tensor for name, tensor in full.state_dict().items()}
    for name, tensor in backbone._backbone.state_dict().items():
        other = theirs.get(joined(name))
        if other is None or other.shape != tensor.shape or not torch.equal(other, tensor):
            raise ValueError(
                f"the weight {name!r} of this backbone is not its checkpoint's, and the final "
                "norm and head are of the checkpoint: save timm's full model with the changed "
                f"weights and give its directory, or {POOLED_OR_MAPS}"
            )
