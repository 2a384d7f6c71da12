"""`--random-weights`: a model's shapes without its weights, the same ones every time."""

from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import cli_runner
from click.testing import Result

from fastbb import AutoBackbone
from fastbb.cli import main
from fastbb.inspect.loading import config_without_weights, load_backbone

CPU = torch.device("cpu")


def verify_model(*arguments: Any) -> Result:
    return cli_runner().invoke(main, ["verify-model", *map(str, arguments)])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A directory with a config.json and no weights."""
    AutoBackbone.from_pretrained("nano-swin-digits").config.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["resnet10t.c3_in1k", "timm/resnet10t", "saved"])
def test_verify_needs_no_download_and_gives_upstream_the_same_weights(
    name: str, saved: Path
) -> None:
    name = str(saved) if name == "saved" else name
    options = ("--random-weights", "--size", "64x64", "--batch", 1)
    first, again = verify_model(name, *options), verify_model(name, *options)
    assert first.exit_code == 0 and ": passed" in first.stdout, first.output
    assert "fastbb's own plain PyTorch" not in first.stdout
    assert first.stdout == again.stdout


def test_a_hub_name_needs_its_config() -> None:
    result = verify_model("someone/some-model", "--random-weights")
    assert result.exit_code == 2 and "is neither a local directory" in result.stderr


def test_the_state_of_torchs_generator_stays(saved: Path) -> None:
    before = torch.get_rng_state()
    backbone = load_backbone(str(saved), None, torch.bfloat16, CPU, random_weights=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert backbone.dtype == torch.bfloat16 and not backbone.training
    pretrained = AutoBackbone.from_pretrained("nano-swin-digits").state_dict()
    assert backbone.state_dict().keys() == pretrained.keys()


def test_a_config_that_asks_for_pretrained_weights_gets_random_ones(tmp_path: Path) -> None:
    config = config_without_weights("resnet10t", [1, 2])
    config.use_pretrained_backbone = True  # type: ignore[attr-defined]
    config.save_pretrained(tmp_path)
    backbone = load_backbone(str(tmp_path), None, torch.float32, CPU, random_weights=True)
    assert list(backbone.out_indices) == [1, 2]
