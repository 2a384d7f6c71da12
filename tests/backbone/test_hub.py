"""Names are resolved to files: `~`, incomplete repositories, Hub errors, timm's formats."""

import json
from http import HTTPStatus

import pytest
import timm
from hub_server import _Handler, _Refusal
from huggingface_hub import constants
from safetensors.torch import save_file

from fastbb import (
    AutoBackbone,
    AutoConfig,
    ResNetBackbone,
    ResNetConfig,
    TimmBackbone,
    TimmBackboneConfig,
)
from fastbb.backbone.hub import HubOptions, find_file, read_json, timm_source

RESNET = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1]}
REPO = "acme/tiny"


def save_resnet(folder):
    ResNetBackbone(ResNetConfig(**RESNET)).save_pretrained(folder)
    return folder


def test_a_home_directory_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_resnet(tmp_path / "model")
    assert AutoBackbone.from_pretrained("~/model").out_features == ["stage2"]


def test_the_home_of_an_unknown_user_is_refused():
    with pytest.raises(OSError, match="'~nosuchuser/m' starts with the home directory of a user"):
        AutoBackbone.from_pretrained("~nosuchuser/m")


@pytest.mark.parametrize("options", [{}, {"revision": "v2"}, {"cache_dir": "elsewhere"}], ids=str)
def test_file_missing_in_the_cached_repository_is_none_offline(hub, tmp_path, options):
    if "cache_dir" in options:
        options = {"cache_dir": tmp_path / "elsewhere"}
    save_resnet(tmp_path / "model")
    hub.add_repo(REPO, tmp_path / "model", revision=options.get("revision", "main"))
    at = HubOptions(**options)
    assert find_file(REPO, "config.json", at)
    with hub.offline():
        assert find_file(REPO, "preprocessor_config.json", at) is None
        with pytest.raises(OSError, match="the Hub cannot be reached"):
            find_file("acme/other", "preprocessor_config.json", at)


def test_offline_mode_serves_the_cache_only(hub, tmp_path, monkeypatch):
    hub.add_repo(REPO, save_resnet(tmp_path / "model"))
    AutoBackbone.from_pretrained(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert AutoBackbone.from_pretrained(REPO).out_features == ["stage2"]
    with pytest.raises(OSError, match="the Hub cannot be reached .*offline mode"):
        AutoBackbone.from_pretrained("acme/other")
    assert not hub.requests


def test_refusals_of_the_hub_are_explained(hub, tmp_path, monkeypatch):
    with pytest.raises(OSError, match="'a b/c' is neither .* not the name of a Hub repository"):
        AutoBackbone.from_pretrained("a b/c")
    hub.add_repo(REPO, save_resnet(tmp_path / "model"), token="hf_key")
    with pytest.raises(OSError, match=f"{REPO}' is gated: ask for access on its page"):
        AutoBackbone.from_pretrained(REPO)

    def overloaded(handler, commit, data):
        if handler.command == "GET":
            raise _Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, "Overloaded")
        return file_part(handler, commit, data)

    hub.add_repo("acme/broken", tmp_path / "model")
    file_part = _Handler._file_part
    monkeypatch.setattr(_Handler, "_file_part", overloaded)
    with pytest.raises(
        OSError, match="'acme/broken' is neither .* asking the Hub .* failed: .*500"
    ):
        AutoBackbone.from_pretrained("acme/broken")


def test_every_argument_reaches_the_weights(hub, tmp_path):
    hub.add_repo(REPO, save_resnet(tmp_path / "model"), revision="v2", token="hf_key")
    at = {"revision": "v2", "token": "hf_key", "cache_dir": tmp_path / "cache"}
    AutoBackbone.from_pretrained(REPO, **at)
    assert AutoConfig.from_pretrained(REPO, **at).depths == [1, 1]
    hub.requests.clear()
    AutoBackbone.from_pretrained(REPO, **at, local_files_only=True)
    assert AutoConfig.from_pretrained(REPO, **at, local_files_only=True).depths == [1, 1]
    assert not hub.requests


def save_timm_format(folder):
    write_config(folder, {"architecture": "test_resnet", "num_classes": 10})
    weights = timm.create_model("test_resnet", num_classes=10).state_dict()
    save_file(weights, folder / "model.safetensors")


def save_timm_backbone(folder):
    TimmBackbone(TimmBackboneConfig("test_resnet")).save_pretrained(folder)


@pytest.mark.parametrize("save", [save_resnet, save_timm_format, save_timm_backbone])
def test_the_configuration_is_asked_for_and_read_once(hub, tmp_path, monkeypatch, save):
    save(tmp_path / "model")
    hub.add_repo(REPO, tmp_path / "model")
    read = []
    monkeypatch.setattr(
        "fastbb.backbone.hub.read_json", lambda path: read.append(path) or read_json(path)
    )
    for first in (True, False):
        read.clear()
        hub.requests.clear()
        AutoBackbone.from_pretrained(REPO)
        assert [path.name for path in read] == ["config.json"]
        asked = [r.method for r in hub.requests if r.path.endswith("/config.json")]
        assert asked == (["HEAD", "HEAD", "GET"] if first else ["HEAD"])


def test_the_backbone_that_a_head_names_is_read_once(hub, tmp_path):
    hub.add_repo("acme/backbone", save_resnet(tmp_path / "backbone"))
    head = save_resnet(tmp_path / "head")
    names = {"model_type": "maskformer", "backbone": "acme/backbone", "use_timm_backbone": False}
    hub.add_repo("acme/head", write_config(head, names))
    AutoBackbone.from_pretrained("acme/head")
    asked = [r.path for r in hub.requests if r.path.endswith("/config.json") and r.method == "GET"]
    assert len(asked) == 2
    hub.requests.clear()
    AutoBackbone.from_pretrained("acme/head")
    assert len([r for r in hub.requests if r.path.endswith("/config.json")]) == 2


def test_a_repository_without_owner_loads(hub, tmp_path):
    hub.add_repo("tiny", save_resnet(tmp_path / "model"))
    assert AutoBackbone.from_pretrained("tiny").channels == [32]


def write_config(folder, config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_flat_configs_of_timm_before_2023_load(tmp_path):
    mean = [0.1, 0.2, 0.3]
    flat = {"architecture": "test_resnet", "num_classes": 5, "mean": mean}
    source = timm_source(write_config(tmp_path, flat))
    assert source and source.pretrained_cfg["mean"] == mean and source.model_args == {}


def test_the_number_of_classes_is_read_as_timm_reads_it(tmp_path):
    config = {
        "architecture": "test_resnet",
        "num_classes": 5,
        "model_args": None,
        "pretrained_cfg": {"num_classes": 1000, "mean": [0.5, 0.5, 0.5]},
    }
    source = timm_source(write_config(tmp_path, config))
    assert source and source.model_args == {}
    assert source.pretrained_cfg["num_classes"] == 5


def test_transformers_config_with_an_architecture_is_not_taken_for_timm(tmp_path):
    config = {**ResNetConfig(**RESNET).to_dict(), "architecture": "resnet50"}
    assert timm_source(write_config(tmp_path, config)) is None
    assert isinstance(AutoConfig.from_pretrained(tmp_path), ResNetConfig)


def test_a_directory_named_like_a_timm_model_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_resnet(tmp_path / "resnet18")
    assert isinstance(AutoBackbone.from_pretrained("resnet18"), ResNetBackbone)
    assert timm_source("resnet18") is None


def test_json_in_another_encoding_raises_value_error(tmp_path):
    (tmp_path / "config.json").write_bytes('{"a": "é"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        read_json(tmp_path / "config.json")


def test_any_error_of_the_http_library_becomes_an_os_error(hub, tmp_path, monkeypatch):
    def break_off(*args, **kwargs):
        raise RuntimeError("peer closed the connection")

    hub.add_repo("acme/x", save_resnet(tmp_path / "model"))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", break_off)
    with pytest.raises(OSError, match="asking the Hub for 'acme/x' failed: peer closed"):
        find_file("acme/x", "config.json")
