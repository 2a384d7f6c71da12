"""Bundled nano backbones: accuracy on digits, and upstream's maps for trained weights."""

import hashlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import demo
import numpy as np
import pytest
import torch
from tolerance import assert_equals_upstream
from train_nano import digits_split, linear_probe

import fastbb
from fastbb import AutoBackbone, AutoImageProcessor

ASSETS = Path(fastbb.__file__).parent / "assets"
CHANNELS = {
    "nano-swin-digits": {"stem": 12, "stage1": 12, "stage2": 24, "stage3": 48, "stage4": 96},
    "nano-resnet-digits": {"stem": 16, "stage1": 16, "stage2": 32, "stage3": 48, "stage4": 80},
}
every_model = pytest.mark.parametrize("name", CHANNELS)


@every_model
def test_linear_probe_classifies_the_held_out_digits(name: str) -> None:
    assert linear_probe(name) >= 0.97


def test_split_holds_out_a_third_of_every_digit() -> None:
    train, held_out = digits_split()
    assert (len(train.images), len(held_out.images)) == (1198, 599)
    assert {image.tobytes() for image in train.images}.isdisjoint(
        image.tobytes() for image in held_out.images
    )
    shares = np.bincount(held_out.labels) / np.bincount(np.r_[train.labels, held_out.labels])
    assert np.abs(shares - 1 / 3).max() < 0.01
    # another split would hold out digits that the bundled models have learned from: train again
    pixels = np.stack([np.asarray(image) for image in held_out.images])
    assert hashlib.sha256(pixels.tobytes()).hexdigest().startswith("490b13219e9939eb")


@every_model
def test_default_is_the_last_stage_at_the_trained_size(name: str) -> None:
    backbone = AutoBackbone.from_pretrained(name)
    processor = AutoImageProcessor.from_pretrained(name)
    _, held_out = digits_split()
    (last,) = backbone(processor(held_out.images[:3])["pixel_values"]).feature_maps
    assert backbone.out_features == ["stage4"]
    assert last.shape == (3, CHANNELS[name]["stage4"], 2, 2)
    assert (ASSETS / name / "model.safetensors").stat().st_size < 1_000_000


@every_model
def test_every_stage_is_trained(name: str, recwarn: pytest.WarningsRecorder) -> None:
    backbone = AutoBackbone.from_pretrained(name)
    backbone.out_features = backbone.stage_names
    assert backbone.out_feature_channels == CHANNELS[name]
    weights = backbone.state_dict()
    norms = [key for key in weights if "norm" in key and key.endswith(("weight", "bias"))]
    flat = [key for key in norms if weights[key].unique().numel() == 1]
    assert [key for key in flat if "swin.layernorm" not in key] == []
    assert not recwarn.list


@pytest.mark.parametrize("size", [(64, 64), (96, 160), (75, 50), (20, 24)], ids=str)
@every_model
def test_maps_of_the_trained_weights_equal_upstream(name: str, size: tuple[int, int]) -> None:
    transformers = pytest.importorskip("transformers")
    upstream_class = {
        "nano-swin-digits": transformers.SwinBackbone,
        "nano-resnet-digits": transformers.ResNetBackbone,
    }[name]
    stages = list(CHANNELS[name])
    upstream = upstream_class.from_pretrained(ASSETS / name, out_features=stages).eval()
    ours = AutoBackbone.from_pretrained(name, out_features=stages)
    pixel_values = torch.randn(2, 3, *size)
    with torch.no_grad():
        want = upstream(pixel_values).feature_maps
        assert_equals_upstream(ours(pixel_values).feature_maps, want)


@every_model
def test_preprocessing_equals_upstream(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    upstream = transformers.AutoImageProcessor.from_pretrained(ASSETS / name, backend="pil")
    _, held_out = digits_split()
    images = [image.convert("RGB") for image in held_out.images[:5]]
    want = upstream(images, return_tensors="pt")["pixel_values"]
    got = AutoImageProcessor.from_pretrained(name)(held_out.images[:5])["pixel_values"]
    assert got.shape == (5, 3, 64, 64)
    assert torch.equal(got, want)


@every_model
def test_bundled_config_has_the_fields_of_transformers(name: str) -> None:
    config = json.loads((ASSETS / name / "config.json").read_text())
    assert config["model_type"] == name.split("-")[1]
    assert config["out_features"] == ["stage4"] and config["out_indices"] == [4]


def test_demo_runs_offline_and_writes_its_sheets(tmp_path: Path) -> None:
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, inspect.getfile(demo)]
    run = subprocess.run(
        command, cwd=tmp_path, env=offline, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("599 of 599 images have features") == 2
    assert "rocket-cut-off.jpg: truncated" in run.stdout
    sheets = list((tmp_path / "demo-output" / "sheets").glob("*.png"))
    assert len(sheets) == len(demo.MODELS) * (1 + len(demo.PHOTOS))


def test_knn_accuracy_leaves_out_the_row_itself() -> None:
    labels = torch.arange(10).repeat_interleave(8)
    clusters = torch.nn.functional.one_hot(labels).float() + 0.1 * torch.rand(80, 10)
    assert demo.knn_accuracy(clusters, labels) == 1
    assert demo.knn_accuracy(torch.eye(10), torch.arange(10)) == 0
