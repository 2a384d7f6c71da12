"""timm's full models, which have the final norm and the head that features-only modules lack."""

import os
from typing import Any, Literal

import torch
from torch import nn

from ..backbone.hub import DEFAULT_HUB, HubOptions, TimmSource, timm_source
from .timm import TimmBackbone, TimmBackboneConfig
from .timm_loading import create_full

Head = Literal["none", "projection", "any"]
_NO_PROJECTION = (
    "projection: wanted the image tower of a CLIP or SigLIP model as it was trained with text, and "
)


def load_full(
    name_or_dir: str | os.PathLike[str],
    hub: HubOptions = DEFAULT_HUB,
    *,
    config: TimmBackboneConfig | None = None,
    head: Head = "none",
) -> tuple[TimmBackboneConfig, nn.Module]:
    """Loads timm's full model of a timm name, directory or Hub repository, in eval mode.

    Args:
        name_or_dir: as for `TimmBackbone.from_pretrained`.
        hub: options for downloads.
        config: of a backbone of this name; default: that of the name.
        head: "none" is the model that timm builds for `num_classes=0`; "projection" keeps CLIP's
            projection as the head; "any" keeps the head, if the checkpoint has its weights.

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
            "timm's full model, from which this feature is computed: ask for --features pooled or "
            "maps, or load timm's own checkpoint"
        )
    if config is None:
        config = TimmBackboneConfig(source.architecture, backbone_kwargs=source.model_args)
    kwargs = config.model_arguments()

    def create(keep_head: bool) -> nn.Module:
        try:
            return create_full(source.architecture, kwargs, source, hub, head=keep_head).eval()
        except OSError as error:
            hint = "; --features pooled and maps need no final norm" if "lack" in str(error) else ""
            raise OSError(f"{error}{hint}") from error

    with torch.inference_mode(False):
        if head == "any":
            try:
                return config, create(True)
            except OSError:  # such as a checkpoint without a classifier
                return config, create(False)
        if head == "none" or _projects_by_pooling(name, source):
            return config, create(False)
        model = create(True)
    projection: Any = getattr(model, "head", None)
    bias = getattr(projection, "bias", None)
    # a classifier of as many classes has a bias; CLIP's projection has none, timm's copy has zeros
    if type(projection) is not nn.Linear or (bias is not None and bool(bias.count_nonzero())):
        raise ValueError(f"{_NO_PROJECTION}the head of {name!r} is not CLIP's projection")
    return config, model


def _projects_by_pooling(name: str, source: TimmSource) -> bool:
    """Whether the image embeds of a model are its pooled output, as SigLIP's are.

    Raises:
        ValueError: the model is neither SigLIP's nor CLIP's, or is a classifier made of one.
    """
    cfg = source.pretrained_cfg
    architecture, _, tag = source.architecture.removeprefix("timm/").partition(".")
    tag, n_classes = cfg.get("tag") or tag, cfg.get("num_classes")
    is_original = bool(tag) and "ft" not in tag.split("_") and not cfg.get("label_names")
    is_vit = architecture.startswith("vit_") and is_original
    if is_vit and "_siglip_" in architecture and "_gap_" not in architecture and n_classes == 0:
        return True
    own_classes = source.model_args.get("num_classes", n_classes)
    if is_vit and "_clip_" in architecture and n_classes and own_classes == n_classes:
        return False
    raise ValueError(
        f"{_NO_PROJECTION}timm's description of {name!r} is not that of one: ask for --features "
        "embedding"
    )


def check_same_weights(backbone: TimmBackbone, full: nn.Module) -> None:
    """Refuses a backbone whose weights are not those of the checkpoint it was loaded from.

    Args:
        backbone: loaded from where the full model was.
        full: timm's full model, with weights of the same dtype on the same device.

    Raises:
        ValueError: names a tensor that differs.
    """
    # timm's features-only modules join the names of nested modules by underscores
    theirs = {name.replace(".", "_"): tensor for name, tensor in full.state_dict().items()}
    inner: Any = getattr(backbone._backbone, "model", backbone._backbone)
    for name, tensor in inner.state_dict().items():
        other = theirs.get(name.replace(".", "_"))
        if other is None or other.shape != tensor.shape or not torch.equal(other, tensor):
            raise ValueError(
                f"the weight {name!r} of this backbone is not its checkpoint's, and the final "
                "norm and head are of the checkpoint: save timm's full model with the changed "
                "weights and give its directory, or ask for --features pooled or maps"
            )
