"""Weights from every kind of file, name and place; broken ones are refused."""

import json
import logging

import pytest
import torch
from reference_models import randomize_
from safetensors.torch import load_file, save_file
from tolerance import assert_equals_upstream

from fastbb import AutoBackbone, ResNetBackbone, ResNetConfig, SwinBackbone, SwinConfig
from fastbb.backbone.checkpoint import find_prefix, read_state_dict
from fastbb.backbone.configuration import BackboneConfig

SWIN = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4, "image_size": 32}
RESNET = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1]}
PIXELS = torch.randn(1, 3, 32, 32)
STAGES = ["stage1", "stage2"]


@pytest.fixture
def swin(tmp_path):
    """A saved Swin: the backbone and its directory."""
    backbone = randomize_(SwinBackbone(SwinConfig(**SWIN, out_features=STAGES)))
    backbone.save_pretrained(tmp_path / "swin")
    return backbone, tmp_path / "swin"


def change_weights(directory, change):
    state = load_file(directory / "model.safetensors")
    save_file(change(state), directory / "model.safetensors", metadata={"format": "pt"})


def change_config(directory, change):
    path = directory / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


@torch.no_grad()
def assert_same(directory, backbone, **kwargs):
    loaded = AutoBackbone.from_pretrained(directory, out_features=STAGES, **kwargs)
    assert_equals_upstream(loaded(PIXELS).feature_maps, backbone(PIXELS).feature_maps, rel=0)
    return loaded


def test_names_in_memory_and_on_disk_load_alike(swin):
    backbone, directory = swin
    on_disk = load_file(directory / "model.safetensors").keys()
    assert "encoder.layers.0.blocks.0.attention.self.query.weight" in on_disk
    assert "hidden_states_norms.stage1.weight" in on_disk
    assert_same(directory, backbone)
    change_weights(directory, lambda _: {k: v.clone() for k, v in backbone.state_dict().items()})
    assert_same(directory, backbone)


def test_classifier_is_ignored_and_its_missing_norms_are_reported_once(swin, caplog):
    backbone, directory = swin
    for norm in backbone.hidden_states_norms.values():
        norm.reset_parameters()

    def as_classifier(state):
        state = {f"swin.{k.removeprefix('swin.')}": v for k, v in state.items() if "norms" not in k}
        index = torch.zeros(16, 16, dtype=torch.long)
        name = "swin.encoder.layers.0.blocks.0.attention.self.relative_position_index"
        return state | {"classifier.weight": torch.zeros(3, 16), name: index}

    change_weights(directory, as_classifier)
    with caplog.at_level(logging.INFO), pytest.warns(UserWarning, match="no norm for stage1, stag"):
        loaded, info = AutoBackbone.from_pretrained(
            directory, out_features=STAGES, output_loading_info=True
        )
    assert info.prefix == "swin." and "classifier.weight" in info.ignored
    assert "classifier.weight" in caplog.text
    assert "hidden_states_norms.stage1.weight" in info.initialized
    assert_equals_upstream(loaded(PIXELS).feature_maps, backbone(PIXELS).feature_maps, rel=0)
    with pytest.warns(UserWarning, match="no norm for stem:"):
        loaded.out_indices = (0, 1)


@pytest.mark.parametrize("prefix", ["", "model.", "backbone.", "encoder.model."], ids=repr)
def test_names_in_memory_under_any_prefix_keep_their_norms(prefix, swin, recwarn):
    backbone, directory = swin
    state = {prefix + name: t.clone() for name, t in backbone.state_dict().items()}
    change_weights(directory, lambda _: state)
    assert_same(directory, backbone)
    assert not [w for w in recwarn if "no norm for" in str(w.message)]


HEADS = {
    # head's model_type: where its checkpoint holds the backbone
    "mask2former": "model.pixel_level_module.encoder.",
    "upernet": "backbone.",
    "grounding-dino": "model.backbone.conv_encoder.model.",
}


@pytest.mark.parametrize("head", HEADS)
def test_backbone_inside_a_head_loads(head, swin):
    backbone, directory = swin
    prefix = HEADS[head]
    change_weights(
        directory,
        lambda state: {prefix + k: v for k, v in state.items()} | {"decoder.w": torch.ones(1)},
    )
    change_config(directory, lambda config: {"model_type": head, "backbone_config": config})
    loaded = assert_same(directory, backbone)
    assert isinstance(loaded, SwinBackbone) and loaded.config.model_type == "swin"


def test_detr_with_a_timm_backbone_and_frozen_norms_loads(tmp_path):
    timm = pytest.importorskip("timm")
    model = randomize_(timm.create_model("test_resnet", features_only=True))
    prefix = "model.backbone.conv_encoder.model."
    state = {prefix + k: v for k, v in model.state_dict().items() if "num_batches" not in k}
    save_file(state, tmp_path / "model.safetensors")
    config = {"model_type": "detr", "backbone": "test_resnet", "use_timm_backbone": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = AutoBackbone.from_pretrained(tmp_path)
    assert loaded.out_indices == [1, 2, 3, 4]
    with torch.no_grad():
        assert_equals_upstream(loaded(PIXELS).feature_maps, model(PIXELS)[1:], rel=1e-5)


def test_split_checkpoint_loads_and_missing_shards_are_refused(swin):
    backbone, directory = swin
    state = load_file(directory / "model.safetensors")
    names = sorted(state)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, inside in shards.items():
        save_file({name: state[name] for name in inside}, directory / shard)
    weight_map = {name: shard for shard, inside in shards.items() for name in inside}
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    (directory / "model.safetensors").unlink()
    assert_same(directory, backbone)

    (directory / "b.safetensors").unlink()
    with pytest.raises(OSError, match=r"lacks the shard 'b.safetensors'"):
        AutoBackbone.from_pretrained(directory)
    save_file({"x": torch.ones(1)}, directory / "b.safetensors")
    with pytest.raises(OSError, match="named in its index"):
        AutoBackbone.from_pretrained(directory)
    index.write_text("{}")
    with pytest.raises(OSError, match="has no weight_map"):
        AutoBackbone.from_pretrained(directory)


class Trap:
    """An object whose unpickling runs code."""

    def __reduce__(self):
        return print, ("the pickle ran",)


def test_bin_files_load_as_weights_only(swin, capsys):
    backbone, directory = swin
    state = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    torch.save(state, directory / "pytorch_model.bin")
    assert_same(directory, backbone)
    torch.save({"trap": Trap()}, directory / "pytorch_model.bin")
    with pytest.raises(OSError, match="holds Python objects other than tensors"):
        AutoBackbone.from_pretrained(directory)
    assert "the pickle ran" not in capsys.readouterr().out


@pytest.mark.parametrize("keep", [0, 4, 200, 0.5, 0.99], ids=str)
def test_truncated_safetensors_raise_os_error(keep, swin):
    _, directory = swin
    path = directory / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(OSError, match=r"model\.safetensors is corrupt, truncated .* delete it"):
        AutoBackbone.from_pretrained(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("embeddings.norm.bias"), r"missing: swin\.embeddings\.norm\.bias"),
        (lambda s: s.update({"encoder.extra": torch.ones(1)}), r"unknown: swin\.encoder\.extra"),
        (
            lambda s: s.update({"embeddings.norm.bias": torch.ones(9)}),
            r"norm\.bias: \[9\] in the checkpoint, \[8\] in the model",
        ),
        (lambda s: [s.pop(k) for k in list(s)[1:]], "holds no Swin|missing"),
    ],
    ids=["missing", "unknown", "shape", "nearly-empty"],
)
def test_weights_that_do_not_fit_raise_value_error(change, message, swin):
    _, directory = swin

    def changed(state):
        change(state)
        return state

    change_weights(directory, changed)
    with pytest.raises(ValueError, match=message):
        AutoBackbone.from_pretrained(directory)


def test_every_problem_is_in_one_error(swin):
    _, directory = swin

    def spoil(state):
        state.pop("embeddings.norm.bias")
        return state | {"encoder.x": torch.ones(1), "embeddings.norm.weight": torch.ones(9)}

    change_weights(directory, spoil)
    with pytest.raises(ValueError, match=r"(?s)missing: .*unknown: .*wrong shape: "):
        AutoBackbone.from_pretrained(directory)


def test_dtype_is_that_of_the_checkpoint_unless_given(swin):
    backbone, directory = swin
    backbone.to(torch.bfloat16).save_pretrained(directory)
    assert AutoBackbone.from_pretrained(directory).dtype == torch.bfloat16
    assert AutoBackbone.from_pretrained(directory, dtype="float32").dtype == torch.float32
    assert AutoBackbone.from_pretrained(directory, dtype=torch.float16).dtype == torch.float16
    assert json.loads((directory / "config.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(ValueError, match="dtype must be a floating torch.dtype .* got 'float99'"):
        AutoBackbone.from_pretrained(directory, dtype="float99")


def test_loaded_weights_are_not_a_map_of_the_file(swin):
    backbone, directory = swin
    loaded = AutoBackbone.from_pretrained(directory, out_features=STAGES)
    (directory / "model.safetensors").write_bytes(b"")
    assert_equals_upstream(loaded(PIXELS).feature_maps, backbone(PIXELS).feature_maps, rel=0)


def test_saving_is_atomic_and_honours_the_umask(swin, monkeypatch):
    import os

    import safetensors.torch

    backbone, directory = swin
    before = os.umask(0o027)
    try:
        backbone.save_pretrained(directory)
    finally:
        os.umask(before)
    path = directory / "model.safetensors"
    assert path.stat().st_mode & 0o777 == 0o640
    old = path.read_bytes()

    def fail(tensors, filename, metadata):
        filename.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        backbone.save_pretrained(directory)
    assert path.read_bytes() == old
    assert sorted(p.name for p in directory.iterdir()) == ["config.json", "model.safetensors"]


def test_find_prefix_takes_the_best_and_refuses_a_tie():
    expected = ["conv1.weight", "bn1.weight"]
    names = ["layer1.0.conv1.weight", "body.conv1.weight", "body.bn1.weight"]
    assert find_prefix(names, expected, "ResNet") == "body."
    with pytest.raises(ValueError, match="holds no ResNet: it has none .* It holds fc.weight"):
        find_prefix(["fc.weight"], expected, "ResNet")
    with pytest.raises(ValueError, match=r"more than one ResNet: under \['a.', 'b.'\]"):
        find_prefix(["a.conv1.weight", "b.conv1.weight"], expected, "ResNet")
    with pytest.raises(ValueError, match=r"more than one ResNet: under \['', 'ema.'\]"):
        find_prefix([*expected, *(f"ema.{name}" for name in expected)], expected, "ResNet")
    # names with the prefix of a base model and without
    both = [*expected, *(f"resnet.{name}" for name in expected)]
    assert find_prefix([f"body.resnet.{name}" for name in expected], both, "ResNet") == "body."


class TestHub:
    """Loads checkpoints from a local server with the Hub's API."""

    @pytest.fixture
    def repo(self, hub, tmp_path):
        config = ResNetConfig(**RESNET, out_features=STAGES)
        backbone = randomize_(ResNetBackbone(config))
        backbone.save_pretrained(tmp_path / "resnet")
        hub.add_repo("acme/tiny-resnet", tmp_path / "resnet")
        return backbone

    def test_repository_loads_online_and_offline_from_the_cache(self, hub, repo):
        assert_same("acme/tiny-resnet", repo)
        with hub.offline():
            assert_same("acme/tiny-resnet", repo)
            assert_same("acme/tiny-resnet", repo, local_files_only=True)
            with pytest.raises(OSError, match="Hub cannot be reached .* cache has no 'config.json"):
                AutoBackbone.from_pretrained("acme/another")

    def test_revision_and_cache_dir_are_followed(self, hub, repo, tmp_path):
        other = randomize_(ResNetBackbone(ResNetConfig(**RESNET, out_features=STAGES)), seed=1)
        other.save_pretrained(tmp_path / "other")
        hub.add_repo("acme/tiny-resnet", tmp_path / "other", revision="v2")
        assert_same("acme/tiny-resnet", other, revision="v2", cache_dir=tmp_path / "cache")
        assert_same("acme/tiny-resnet", repo)
        assert (tmp_path / "cache" / "models--acme--tiny-resnet").is_dir()
        with pytest.raises(OSError, match="has no revision 'v3'"):
            AutoBackbone.from_pretrained("acme/tiny-resnet", revision="v3")

    def test_gated_repository_needs_its_token(self, hub, repo, tmp_path):
        hub.add_repo("acme/secret", tmp_path / "resnet", token="hf_key")
        with pytest.raises(OSError, match="(?i)gated|private"):
            AutoBackbone.from_pretrained("acme/secret")
        assert_same("acme/secret", repo, token="hf_key")

    def test_unknown_repository_raises_os_error(self, hub):
        with pytest.raises(OSError, match="'acme/nothing' is neither a local directory"):
            AutoBackbone.from_pretrained("acme/nothing")

    def test_timm_repository_loads_into_timm_backbone(self, hub, tmp_path):
        import timm

        model = randomize_(timm.create_model("test_resnet", num_classes=5))
        state = {k: v.clone() for k, v in model.state_dict().items()}
        save_file(state, tmp_path / "model.safetensors")
        config = {"architecture": "test_resnet", "num_classes": 5, "pretrained_cfg": {}}
        config["pretrained_cfg"] = {**timm.get_pretrained_cfg("test_resnet").to_dict()}  # type: ignore[union-attr]  # registered
        (tmp_path / "config.json").write_text(json.dumps(config))
        hub.add_repo("acme/my-timm", tmp_path)
        hub.add_repo("timm/test_resnet.r160_in1k", tmp_path)
        _, want = model.forward_intermediates(PIXELS)
        for name in ("acme/my-timm", "test_resnet", "timm/test_resnet.r160_in1k", tmp_path):
            loaded = AutoBackbone.from_pretrained(name, out_indices=(1, 4))
            assert type(loaded).__name__ == "TimmBackbone" and not loaded.training
            with torch.no_grad():
                maps = loaded(PIXELS).feature_maps
            assert_equals_upstream(maps, [want[1].detach(), want[4].detach()])
        with pytest.raises(OSError, match="has no weights 'nope'; it has"):
            AutoBackbone.from_pretrained("test_resnet.nope")

    def test_incomplete_timm_weights_are_refused(self, hub, tmp_path):
        import timm

        state = timm.create_model("test_resnet").state_dict()
        state.pop("layer2.0.conv1.weight")
        save_file({k: v.clone() for k, v in state.items()}, tmp_path / "model.safetensors")
        hub.add_repo("timm/test_resnet.r160_in1k", tmp_path)
        with pytest.raises(OSError, match=r"lack layer2\.0\.conv1\.weight|do not load"):
            AutoBackbone.from_pretrained("test_resnet")
        (tmp_path / "model.safetensors").write_bytes(b"short")
        hub.add_repo("timm/test_resnet.r160_in1k", tmp_path)
        with pytest.raises(OSError, match="corrupt, truncated or not a file"):
            AutoBackbone.from_pretrained("test_resnet")


def test_read_only_directory_still_loads(swin):
    backbone, directory = swin
    directory.chmod(0o555)
    try:
        assert_same(directory, backbone)
    finally:
        directory.chmod(0o755)


def test_directory_without_weights_raises_os_error(tmp_path):
    SwinConfig(**SWIN).save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"has no weights: wanted one of model\.safetensors"):
        read_state_dict(tmp_path)


def test_base_configuration_keeps_unknown_fields():
    assert BackboneConfig(flavour="mild").flavour == "mild"
