"""TimmBackbone from files: pruned ones, precision, device, options and timm's own files."""

import json

import pytest
import timm
import torch
from reference_models import randomize_, saved_bytes
from safetensors.torch import load_file, save_file

from fastbb import AutoBackbone, TimmBackbone, TimmBackboneConfig

PIXELS = torch.randn(1, 3, 64, 64)


@pytest.fixture
def timm_directory(tmp_path):
    """Directory with the files that timm saves of a classifier with `output_stride=16`."""
    model = randomize_(timm.create_model("test_resnet", output_stride=16))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    cfg = timm.get_pretrained_cfg("test_resnet")
    assert cfg is not None
    config = {"architecture": "test_resnet", "model_args": {"output_stride": 16}}
    (tmp_path / "config.json").write_text(json.dumps({**config, "pretrained_cfg": cfg.to_dict()}))
    return tmp_path


def save(directory, out_indices, drop=()):
    """A saved test_resnet whose file lacks the tensors named with a part in `drop`."""
    config = TimmBackboneConfig("test_resnet", out_indices=out_indices)
    backbone = randomize_(TimmBackbone(config))
    backbone.save_pretrained(directory)
    config_file = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config_file, "out_indices": out_indices}))
    state = load_file(directory / "model.safetensors")
    kept = {name: t for name, t in state.items() if not any(part in name for part in drop)}
    assert len(kept) < len(state) or not drop
    save_file(kept, directory / "model.safetensors")
    return backbone


@torch.no_grad()
def test_pruned_files_with_negative_indices_load(tmp_path):
    backbone = save(tmp_path, [-4], drop=["layer2", "layer3", "layer4"])
    loaded = AutoBackbone.from_pretrained(tmp_path)
    assert torch.equal(loaded(PIXELS).feature_maps[0], backbone(PIXELS).feature_maps[0])


@torch.no_grad()
def test_files_without_counters_are_not_taken_for_pruned_files(tmp_path):
    backbone = save(tmp_path, [1], drop=["num_batches_tracked"])
    loaded = AutoBackbone.from_pretrained(tmp_path)
    loaded.out_indices = backbone.out_indices = [4]
    assert torch.equal(loaded(PIXELS).feature_maps[0], backbone(PIXELS).feature_maps[0])


def test_a_saved_backbone_does_not_ask_for_timms_weights(hub, tmp_path):
    save(tmp_path, [1])
    AutoBackbone.from_pretrained(tmp_path, use_pretrained_backbone=True)
    assert not hub.requests


@torch.no_grad()
def test_arguments_win_over_those_of_a_timm_directory(timm_directory):
    assert AutoBackbone.from_pretrained(timm_directory)(PIXELS).feature_maps[0].shape[-1] == 4
    loaded = AutoBackbone.from_pretrained(timm_directory, backbone_kwargs={"output_stride": 8})
    assert loaded(PIXELS).feature_maps[0].shape[-1] == 8


def test_dtype_and_device_apply_to_a_timm_directory(timm_directory):
    loaded = AutoBackbone.from_pretrained(timm_directory, torch_dtype="bfloat16", device="meta")
    assert loaded.dtype == torch.bfloat16 and loaded.device.type == "meta"


def test_native_false_is_followed_for_timm_and_saved_directories(timm_directory, tmp_path):
    save(tmp_path / "saved", [1])
    for directory in (timm_directory, tmp_path / "saved"):
        assert AutoBackbone.from_pretrained(directory).native
        assert not AutoBackbone.from_pretrained(directory, native=False).native


def test_timm_bin_files_load(timm_directory):
    state = load_file(timm_directory / "model.safetensors")
    want = AutoBackbone.from_pretrained(timm_directory).state_dict()
    (timm_directory / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"has no weights: wanted one of model\.safetensors, pytorch"):
        AutoBackbone.from_pretrained(timm_directory)
    torch.save(state, timm_directory / "pytorch_model.bin")
    got = AutoBackbone.from_pretrained(timm_directory).state_dict()
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_gradient_checkpointing_can_be_disabled(name):
    backbone, pixels = TimmBackbone(TimmBackboneConfig(name)).train(), torch.randn(1, 3, 160, 160)
    plain = saved_bytes(backbone, pixels)
    backbone.gradient_checkpointing_enable()
    assert saved_bytes(backbone, pixels) < plain
    backbone.gradient_checkpointing_disable()
    assert saved_bytes(backbone, pixels) == plain


def test_stages_with_the_same_timm_name_get_distinct_names():
    config = TimmBackboneConfig("crossvit_tiny_240", out_indices=[0, 1])
    if not hasattr(timm.create_model("crossvit_tiny_240"), "feature_info"):
        with pytest.raises(ValueError, match=f"timm {timm.__version__} has no stages of 'crossvit"):
            TimmBackbone(config)
        return
    backbone = TimmBackbone(config)
    assert len(set(backbone.stage_names)) == len(backbone.stage_names)
    assert any("@" in name for name in backbone.stage_names)
