"""Which model a name means: a directory, a bundled model, timm's, or a repository of the Hub."""

import difflib
import fnmatch
import os
from typing import Any

from ..backbone.configuration import BackboneConfig
from ..backbone.hub import (
    HubOptions,
    bundled_models,
    is_timm_config,
    local_directory,
    read_config,
    unwrap_head,
)
from ..backbone.registry import family_of


def list_backbones(filter: str = "", pretrained: bool = False) -> list[str]:
    """Names that `AutoBackbone.from_pretrained` takes without asking the Hub what they are.

    Args:
        filter: shell pattern such as `swin*`; default: all.
        pretrained: only names with weights, timm's with their tags.

    Returns:
        The bundled models, then timm's, sorted. Any Hub repository or directory works beside them.
    """
    import timm

    names = timm.list_pretrained() if pretrained else timm.list_models()
    names = [*bundled_models(), *names]
    return fnmatch.filter(names, filter) if filter else names


def pretrained_config(
    name_or_dir: str | os.PathLike[str], hub: HubOptions, **overrides: Any
) -> BackboneConfig:
    """Reads the configuration of the backbone behind a name.

    Raises:
        OSError: there is no such model.
        ValueError: it is of a kind that fastbb has no backbone for.
    """
    values = config_of(name_or_dir, hub)
    _, config_class = family_of(values.get("model_type"))
    return config_class.from_dict(values, **overrides)


def config_of(name_or_dir: str | os.PathLike[str], hub: HubOptions) -> dict[str, Any]:
    """The backbone's configuration behind a name, in the order the names are looked up."""
    name = str(name_or_dir)
    if local_directory(name_or_dir) is None:
        if _is_timm_name(name):
            return {"model_type": "timm_backbone", "backbone": name.removeprefix("timm/")}
        if "/" not in name:
            close = difflib.get_close_matches(name, list_backbones(), n=5)
            close = close or difflib.get_close_matches(name, list_backbones(pretrained=True), n=5)
            hint = f" Did you mean {', '.join(close)}?" if close else ""
            try:
                config = read_config(name, hub)
            except OSError as error:
                raise OSError(f"{error}{hint}") from error
            return unwrap_head(config, hub)
    config = read_config(name_or_dir, hub)
    if is_timm_config(config):
        kwargs = config.get("model_args") or {}
        architecture = config["architecture"]
        return {
            "model_type": "timm_backbone",
            "backbone": architecture,
            "backbone_kwargs": kwargs,
        }
    return unwrap_head(config, hub)


def _is_timm_name(name: str) -> bool:
    if name.startswith("timm/"):
        return True
    if "/" in name:
        return False
    import timm

    return timm.is_model(name.partition(".")[0])
