"""Looks up names: a directory, a bundled model, a timm name or a repository of the Hub."""

import difflib
import fnmatch
import os
from typing import Any

from ..backbone.configuration import BackboneConfig
from ..backbone.hub import (
    ConfigFile,
    HubOptions,
    bundled_models,
    local_directory,
)
from ..backbone.registry import family_of


def list_backbones(filter: str = "", pretrained: bool = False) -> list[str]:
    """Names that `AutoBackbone.from_pretrained` accepts without a request to the Hub.

    Args:
        filter: shell pattern such as `swin*`; default: all.
        pretrained: only names with weights, timm's with their tags.

    Returns:
        The bundled models, then timm's, sorted. Hub repositories and directories work too.
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
        OSError: the model does not exist.
        ValueError: fastbb has no backbone for this kind of model.
    """
    found = find_config(name_or_dir, hub)
    if found is None:
        name = str(name_or_dir).removeprefix("timm/")
        values = {"model_type": "timm_backbone", "backbone": name}
    else:
        values = found.backbone
    _, config_class = family_of(values.get("model_type"))
    return config_class.from_dict(values, **overrides)


def find_config(name_or_dir: str | os.PathLike[str], hub: HubOptions) -> ConfigFile | None:
    """Reads the config.json behind a name, in the order the names are looked up.

    Returns:
        The file, or None for a name of timm.

    Raises:
        OSError: the model does not exist.
    """
    name = str(name_or_dir)
    if local_directory(name_or_dir) is not None:
        return ConfigFile.read(name_or_dir, hub)
    if _is_timm_name(name):
        return None
    try:
        return ConfigFile.read(name, hub)
    except OSError as error:
        if "/" in name:
            raise
        close = difflib.get_close_matches(name, list_backbones(), n=5)
        close = close or difflib.get_close_matches(name, list_backbones(pretrained=True), n=5)
        if not close:
            raise
        raise OSError(f"{error} Did you mean {', '.join(close)}?") from error


def _is_timm_name(name: str) -> bool:
    if name.startswith("timm/"):
        return True
    if "/" in name:
        return False
    import timm

    return timm.is_model(name.partition(".")[0])
