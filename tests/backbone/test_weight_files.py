"""Formats of weight files: older containers, shards, views, unusual dtypes and devices."""

import json

import pytest
import torch
from reference_models import randomize_
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastbb import AutoBackbone, ResNetBackbone, ResNetConfig, SwinBackbone, SwinConfig
from fastbb.backbone.checkpoint import find_prefix, load_strict, read_state_dict, save_state_dict

RESNET = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1]}


@pytest.fixture
def resnet(tmp_path):
    """Directory of a saved ResNet without its weights file, and the tensors of that file."""
    randomize_(ResNetBackbone(ResNetConfig(**RESNET))).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    return tmp_path, state


def assert_loads(directory, state):
    loaded = AutoBackbone.from_pretrained(directory).state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_bin_file_of_a_training_run_loads(resnet):
    directory, state = resnet
    torch.save({"state_dict": state, "epoch": 3}, directory / "pytorch_model.bin")
    assert_loads(directory, state)


def test_split_bin_files_load(resnet):
    directory, state = resnet
    shards = {"1.bin": sorted(state)[::2], "2.bin": sorted(state)[1::2]}
    for shard, names in shards.items():
        torch.save({name: state[name] for name in names}, directory / shard)
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    index = directory / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert_loads(directory, state)


def test_safetensors_are_preferred_to_a_bin_file(resnet):
    directory, state = resnet
    torch.save({"other": torch.ones(1)}, directory / "pytorch_model.bin")
    save_file(state, directory / "model.safetensors")
    assert_loads(directory, state)


@pytest.mark.parametrize(
    "content", [{"epoch": 3}, [1, 2], torch.ones(2)], ids=["dict", "list", "t"]
)
def test_bin_file_without_tensors_raises_os_error(resnet, content):
    directory, _ = resnet
    torch.save(content, directory / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"pytorch_model\.bin must hold a dictionary of tensors"):
        AutoBackbone.from_pretrained(directory)


@pytest.mark.parametrize("keep", [0, 10, 0.5], ids=str)
def test_truncated_bin_file_raises_os_error(resnet, keep):
    directory, state = resnet
    path = directory / "pytorch_model.bin"
    torch.save(state, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(OSError, match=r"pytorch_model\.bin is corrupt, truncated .* delete it"):
        AutoBackbone.from_pretrained(directory)


def test_views_are_saved_as_separate_tensors(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    state = {"whole": base, "shared": base, "row": base[1], "turned": base.T}
    save_state_dict(state, tmp_path)
    loaded = read_state_dict(tmp_path)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # loaders of transformers look at it


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_counters_keep_their_integers(resnet, dtype):
    directory, state = resnet
    counter = "embedder.embedder.normalization.num_batches_tracked"
    state[counter] = torch.tensor(12345)
    save_file(state, directory / "model.safetensors")
    loaded = AutoBackbone.from_pretrained(directory, dtype=dtype).state_dict()[counter]
    assert loaded.dtype == torch.int64 and loaded == 12345


def test_counters_that_are_missing_start_at_zero(resnet):
    directory, state = resnet
    counters = {name for name in state if name.endswith("num_batches_tracked")}
    kept = {name: tensor for name, tensor in state.items() if name not in counters}
    save_file(kept, directory / "model.safetensors")
    loaded, info = AutoBackbone.from_pretrained(directory, output_loading_info=True)
    assert set(info.initialized) == counters
    assert all(loaded.state_dict()[name] == 0 for name in counters)


def test_device_reaches_every_tensor(resnet):
    directory, state = resnet
    save_file(state, directory / "model.safetensors")
    loaded = AutoBackbone.from_pretrained(directory, device="meta")
    assert loaded.device.type == "meta"
    assert all(tensor.is_meta for tensor in loaded.state_dict().values())


def test_unneeded_tensors_are_ignored_and_listed(tmp_path):
    sizes = {"depths": [1, 1], "num_heads": [1, 2], "window_size": 4, "embed_dim": 8}
    SwinBackbone(SwinConfig(**sizes)).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    extra = [
        "embeddings.mask_token",
        "encoder.layers.0.blocks.0.attention.self.relative_position_index",
        "encoder.layers.1.blocks.0.attn_mask",
    ]
    state |= {name: torch.ones(1) for name in extra}
    save_file(state, tmp_path / "model.safetensors")
    _, info = AutoBackbone.from_pretrained(tmp_path, output_loading_info=True)
    assert [name.split(".")[-1] for name in info.ignored] == [
        "mask_token",
        "relative_position_index",
        "attn_mask",
    ]


def test_prefix_must_end_at_a_dot():
    with pytest.raises(ValueError, match="holds no ResNet"):
        find_prefix(["preconv1.weight"], ["conv1.weight"], "ResNet")


def test_long_lists_of_problems_are_shortened():
    names = {f"x{i:02}": torch.ones(1) for i in range(30)}
    with pytest.raises(ValueError, match=r"unknown: x00, .*x19, \.\.\. \(30 in all\)$"):
        load_strict(torch.nn.Identity(), names, what="a module")
