"""Files of a model: in a local directory, a bundled model, or a repository of the Hub."""

import json
import os
from dataclasses import asdict, dataclass, replace
from http import HTTPStatus
from pathlib import Path
from typing import Any

BUNDLED_DIR = Path(__file__).parents[1] / "assets"
ANSWER_TIMEOUT_S = 3.0  # for whether the Hub has a file; HF_HUB_ETAG_TIMEOUT overrides it


@dataclass(frozen=True)
class HubOptions:
    """Options of requests to the Hub; huggingface_hub's environment variables apply too.

    Attributes:
        revision: branch, tag or commit; default: the main branch.
        cache_dir: directory of downloads; default: huggingface_hub's cache.
        token: access token, True for the stored one, False for none.
        local_files_only: use only files in the cache.
    """

    revision: str | None = None
    cache_dir: str | Path | None = None
    token: str | bool | None = None
    local_files_only: bool = False

    def without_secret(self) -> "HubOptions":
        """The same options without a token that was given in words, which nobody should pickle."""
        return replace(self, token=None) if isinstance(self.token, str) else self


DEFAULT_HUB = HubOptions()


def bundled_models() -> list[str]:
    """Names of the models that ship with fastbb."""
    return sorted(path.parent.name for path in BUNDLED_DIR.glob("*/config.json"))


def local_directory(name_or_dir: str | os.PathLike[str]) -> Path | None:
    """The directory of a name: an existing directory, or that of a bundled model.

    Raises:
        OSError: the name is empty, or in the home directory of an unknown user.
    """
    if not os.fspath(name_or_dir):
        raise OSError(
            "the name of the model is empty: wanted a directory, the name of a bundled model, a "
            "timm name or a Hub repository"
        )
    try:
        path = Path(name_or_dir).expanduser()
    except RuntimeError as error:
        raise OSError(
            f"{str(name_or_dir)!r} starts with the home directory of a user that is not known "
            "here: wanted a directory, the name of a bundled model, a timm name or a Hub repository"
        ) from error
    if path.is_dir():
        return path
    return BUNDLED_DIR / str(name_or_dir) if str(name_or_dir) in bundled_models() else None


def absolute_name(name_or_dir: str | os.PathLike[str]) -> str:
    """The name of a model, which of a directory is its absolute path."""
    path = Path(name_or_dir).expanduser() if os.fspath(name_or_dir) else Path()
    return os.path.abspath(path) if path.name and path.is_dir() else os.fspath(name_or_dir)


def find_file(
    name_or_dir: str | os.PathLike[str], filename: str, hub: HubOptions = DEFAULT_HUB
) -> Path | None:
    """Finds a file of a model and downloads it if necessary.

    Args:
        name_or_dir: local directory, bundled model or Hub repository.
        filename: path inside it.
        hub: options for the Hub.

    Returns:
        The path of the file, or None if the directory or repository has no such file.

    Raises:
        OSError: there is no such directory or repository, or the Hub cannot be reached.
    """
    directory = local_directory(name_or_dir)
    if directory is not None:
        path = directory / filename
        return path if path.is_file() else None
    return _find_on_hub(str(name_or_dir), filename, hub)


def _find_on_hub(repo: str, filename: str, hub: HubOptions) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    wanted = f"{repo!r} is neither a local directory nor a bundled model ({bundled_models()})"
    try:
        if not hub.local_files_only and not _is_cached(repo, filename, hub):
            _ask(repo, filename, hub)
        path = hf_hub_download(repo, filename, etag_timeout=ANSWER_TIMEOUT_S, **asdict(hub))
        return Path(path)
    except HFValidationError as error:
        raise OSError(f"{wanted}, and not the name of a Hub repository: {error}") from error
    except GatedRepoError as error:
        raise OSError(
            f"The Hub repository {repo!r} is gated: ask for access on its page, then pass "
            "token=... or log in with `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise OSError(
            f"{wanted}, and the Hub has no such repository. If it is private, pass token=... "
            "or log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise OSError(f"The Hub repository {repo!r} has no revision {hub.revision!r}.") from error
    except (_NoAnswer, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        # the repository is in the cache, and this file of it was never downloaded
        if _is_cached(repo, "config.json", hub):
            return None
        reason = error if isinstance(error, _NoAnswer) else "offline mode or local_files_only"
        raise OSError(
            f"{wanted}, the Hub cannot be reached ({reason}), and the cache has no {filename!r} "
            "of it. Download it once with network, or pass the path of a directory."
        ) from error
    except EntryNotFoundError:
        return None
    except Exception as error:  # errors of the HTTP library too, which huggingface_hub chooses
        raise OSError(f"{wanted}, and asking the Hub for {repo!r} failed: {error}") from error


class _NoAnswer(Exception):
    """The Hub did not answer whether it has a file; the message gives the reason."""


def _ask(repo: str, filename: str, hub: HubOptions) -> None:
    """Asks the Hub once whether it has a file.

    hf_hub_download repeats this request for half a minute, which is too long for a mistyped name
    without network. The download of an existing file keeps its retries.

    Raises:
        _NoAnswer: the Hub cannot be reached, is too slow or is broken.
        HfHubHTTPError: the Hub refuses; the error has its reason.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    is_set = constants.HF_HUB_ETAG_TIMEOUT != constants.DEFAULT_ETAG_TIMEOUT
    timeout_s = constants.HF_HUB_ETAG_TIMEOUT if is_set else ANSWER_TIMEOUT_S
    try:
        url = hf_hub_url(repo, filename, revision=hub.revision)
        get_hf_file_metadata(url, token=hub.token, timeout=timeout_s)
    except (HFValidationError, OfflineModeIsEnabled):
        raise
    except HfHubHTTPError as error:
        if error.response.status_code < HTTPStatus.INTERNAL_SERVER_ERROR:
            raise
        raise _NoAnswer(f"it answers {error.response.status_code}") from error
    except Exception as error:  # errors of the HTTP library, which huggingface_hub chooses
        reason = str(error) or type(error).__name__
        if "timeout" in type(error).__name__.lower():
            reason = f"no answer within {timeout_s:g} s; HF_HUB_ETAG_TIMEOUT=60 waits longer"
        raise _NoAnswer(reason) from error


def _is_cached(repo: str, filename: str, hub: HubOptions) -> bool:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, filename, cache_dir=hub.cache_dir, revision=hub.revision)
    return isinstance(found, str)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ValueError: the file is not JSON, or not an object; the message names the file.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def read_config(
    name_or_dir: str | os.PathLike[str], hub: HubOptions = DEFAULT_HUB
) -> dict[str, Any]:
    """Reads `config.json` of a directory, bundled model or Hub repository.

    Raises:
        OSError: the model does not exist, or it has no config.json.
    """
    path = find_file(name_or_dir, "config.json", hub)
    if path is None:
        raise OSError(
            f"{str(name_or_dir)!r} has no config.json, so it is not a saved model: wanted a "
            "directory or Hub repository in transformers' or timm's format"
        )
    return read_json(path)


def is_timm_config(config: dict[str, Any]) -> bool:
    """Whether a config.json is timm's: it names an `architecture` instead of a `model_type`."""
    return "architecture" in config and "model_type" not in config


@dataclass(frozen=True)
class TimmSource:
    """A timm model with its weights.

    Attributes:
        architecture: timm's name of the architecture, with a tag if the name had one.
        pretrained_cfg: timm's description of the weights (input size, mean, classifier ...).
        model_args: constructor arguments of the saved model.
        weights: directory or Hub repository of the weights; None: timm has at most a URL.
        weights_file: file name of the weights, or None for the default names.
    """

    architecture: str
    pretrained_cfg: dict[str, Any]
    model_args: dict[str, Any]
    weights: str | None
    weights_file: str | None = None


def timm_source(
    name_or_dir: str | os.PathLike[str],
    hub: HubOptions = DEFAULT_HUB,
    config: dict[str, Any] | None = None,
) -> TimmSource | None:
    """Resolves a timm name (`resnet50`, `timm/resnet50.a1_in1k`), directory or Hub repository.

    Args:
        name_or_dir: name or directory.
        hub: options for the Hub.
        config: its config.json, if that was read already.

    Returns:
        The model, or None if the name is not timm's.

    Raises:
        OSError: the name is that of a Hub repository that cannot be read.
    """
    name = str(name_or_dir)
    if local_directory(name_or_dir) is None:
        registered = _registered_timm_source(name.removeprefix("timm/"))
        if registered is not None:
            return registered
        if "/" not in name:
            return None
    if config is None:
        path = find_file(name_or_dir, "config.json", hub)
        config = read_json(path) if path else {}
    if not is_timm_config(config):
        return None
    # before 2023 timm wrote the fields of pretrained_cfg at the top level
    pretrained_cfg = dict(config.get("pretrained_cfg", config))
    for key in ("num_classes", "label_names", "label_descriptions"):
        if key in config:
            pretrained_cfg[key] = config[key]
    return TimmSource(
        architecture=config["architecture"],
        pretrained_cfg=pretrained_cfg,
        model_args=config.get("model_args") or {},
        weights=name,
    )


def _registered_timm_source(name: str) -> TimmSource | None:
    import timm

    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        return None
    try:
        cfg = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
        raise OSError(f"timm's {architecture!r} has no weights {tag!r}; it has {tags}") from error
    assert cfg is not None
    return TimmSource(name, cfg.to_dict(), {}, cfg.hf_hub_id, cfg.hf_hub_filename)


def timm_pretrained_cfg(
    name_or_dir: str | os.PathLike[str], hub: HubOptions = DEFAULT_HUB
) -> dict[str, Any] | None:
    """timm's `pretrained_cfg` of a name, directory or repository, or None if it is not timm's."""
    source = timm_source(name_or_dir, hub)
    return None if source is None else source.pretrained_cfg


def unwrap_head(config: dict[str, Any], hub: HubOptions = DEFAULT_HUB) -> dict[str, Any]:
    """The backbone's configuration inside that of a head (MaskFormer, DETR, CLIP, UperNet ...)."""
    inner = config.get("backbone_config")
    if isinstance(inner, dict):
        return inner
    tower = config.get("vision_config")
    if isinstance(tower, dict):
        # CLIP's first files have a second dictionary, which wins
        second = config.get("vision_config_dict") or {}
        return {"model_type": f"{config.get('model_type')}_vision_model", **tower, **second}
    name = config.get("backbone")
    if not isinstance(name, str) or config.get("model_type") == "timm_backbone":
        return config
    kwargs = dict(config.get("backbone_kwargs") or {})
    # before transformers 5 a head named its backbone, on the Hub or in timm (DETR and relatives)
    if not config.get("use_timm_backbone", "/" not in name):
        return {**read_config(name, hub), **kwargs}
    kwargs.setdefault("out_indices", [1, 2, 3, 4])
    if config.get("dilation"):
        kwargs.setdefault("output_stride", 16)
    return {
        "model_type": "timm_backbone",
        "backbone": name,
        "num_channels": config.get("num_channels", 3),
        "backbone_kwargs": kwargs,
    }


@dataclass(frozen=True)
class ConfigFile:
    """A config.json, read once.

    Attributes:
        values: its values.
        backbone: the configuration of the backbone that it describes, with a `model_type`.
    """

    values: dict[str, Any]
    backbone: dict[str, Any]

    @classmethod
    def read(
        cls, name_or_dir: str | os.PathLike[str], hub: HubOptions = DEFAULT_HUB
    ) -> "ConfigFile":
        """Reads the file of a directory, bundled model or Hub repository.

        Raises:
            OSError: the model does not exist, or it has no config.json.
            ValueError: the model needs code of its own.
        """
        values = read_config(name_or_dir, hub)
        if "auto_map" in values:
            raise ValueError(
                f"{str(name_or_dir)!r} needs code of its own (`auto_map` in its config.json), and "
                "fastbb runs no code of checkpoints. If its weights are those of a model that "
                "transformers has itself, give its configuration: "
                "from_pretrained(..., config=AutoConfig.for_model(model_type, ...))"
            )
        if not is_timm_config(values):
            return cls(values, unwrap_head(values, hub))
        model_args = values.get("model_args") or {}
        backbone = {"backbone": values["architecture"], "backbone_kwargs": model_args}
        return cls(values, {"model_type": "timm_backbone", **backbone})
