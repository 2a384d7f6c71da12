"""Loading and running a native backbone imports no compiler."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from fastbb.backbone.checkpoint import shapes_only

PROGRAM = """
import sys
import torch
from PIL import Image
from fastbb import AutoBackbone
from fastbb.extraction import FeatureExtractor, extract

def check(what):
    assert not {"torch._dynamo", "sympy"} & sys.modules.keys(), what

check("fastbb")
model, folder = sys.argv[1:]
backbone = AutoBackbone.from_pretrained(model)
check("from_pretrained")
with torch.inference_mode():
    backbone(torch.zeros(1, 3, 32, 32))
check("forward")
FeatureExtractor(model)
check("FeatureExtractor")
Image.new("RGB", (9, 8)).save(f"{folder}/a.png")
extract(model, [f"{folder}/a.png"], f"{folder}/out", mode="eager", device="cpu")
check("extract")
"""


@pytest.mark.parametrize("model", ["nano-resnet-digits", "nano-swin-digits"])
def test_loading_and_running_do_not_import_the_compiler(model: str, tmp_path) -> None:
    command = [sys.executable, "-c", PROGRAM, model, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_shapes_only_modules_have_the_usual_shapes_and_attributes() -> None:
    with shapes_only():
        made: Any = nn.Sequential(nn.Linear(3, 4), nn.Conv2d(3, 8, 3), nn.Embedding(5, 2))
        nn.init.normal_(made[0].weight, std=0.02)
        nn.init.kaiming_normal_(made[1].weight)
        nn.init.trunc_normal_(tensor=made[2].weight)
    real = nn.Sequential(nn.Linear(3, 4), nn.Conv2d(3, 8, 3), nn.Embedding(5, 2))
    shapes = {name: tensor.shape for name, tensor in made.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in real.state_dict().items()}
    assert all(isinstance(p, nn.Parameter) and p.is_meta for p in made.parameters())
    assert not torch.empty(1).is_meta
