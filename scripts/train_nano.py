"""Trains the two bundled nano backbones on scikit-learn's handwritten digits.

    python scripts/train_nano.py

Writes fastbb/assets/nano-swin-digits and fastbb/assets/nano-resnet-digits, in three minutes on
one core, and prints the accuracy of a linear classifier of their features on the held-out digits.

Every stage learns to classify the digits by a linear head, which is then discarded. Half of the
images are recoloured, so that the networks use shapes and all three channels.
"""

import json
import math
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from torch.nn import functional as F

from fastbb import AutoBackbone, AutoImageProcessor, ResNetConfig, SwinBackbone, SwinConfig
from fastbb.backbone.base import Backbone

ASSETS = Path(__file__).parents[1] / "fastbb" / "assets"
SIZE = 64
EPOCHS = 60
BATCH_SIZE = 64
LEARNING_RATE = 3e-3
SMALLEST_ACCURACY = 0.97

CONFIGS = {
    "nano-swin-digits": SwinConfig(
        image_size=SIZE,
        embed_dim=12,
        depths=[2, 2, 2, 1],
        num_heads=[1, 2, 4, 8],
        window_size=4,
        drop_path_rate=0.0,
        initializer_range=0.1,  # the usual 0.02 suits more channels and starts slowly here
    ),
    "nano-resnet-digits": ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32, 48, 80],
        depths=[2, 2, 2, 1],
        layer_type="basic",
    ),
}
PREPROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": SIZE, "width": SIZE},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


class Digits(NamedTuple):
    """Images of 8 x 8 grey pixels (PIL mode L) and their digits (int64)."""

    images: list[Image.Image]
    labels: np.ndarray


def digits_split() -> tuple[Digits, Digits]:
    """Returns 1,198 digits for training and 599 held-out digits, always the same ones."""
    values, labels = map(np.asarray, load_digits(return_X_y=True))
    pixels = np.round(values.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    learn, held_out = train_test_split(
        np.arange(len(labels)), test_size=1 / 3, random_state=0, stratify=labels
    )

    def part(rows: np.ndarray) -> Digits:
        return Digits([Image.fromarray(image) for image in pixels[rows]], labels[rows])

    return part(np.asarray(learn)), part(np.asarray(held_out))


def linear_probe(name_or_dir: str | Path) -> float:
    """Returns the accuracy on held-out digits of a linear classifier of pooled features."""
    backbone = AutoBackbone.from_pretrained(name_or_dir)
    processor = AutoImageProcessor.from_pretrained(name_or_dir)

    def features(images: list[Image.Image]) -> np.ndarray:
        with torch.no_grad():
            maps = backbone(processor(images)["pixel_values"]).feature_maps
        return maps[-1].mean((2, 3)).numpy()

    train, test = digits_split()
    classifier = LogisticRegression(max_iter=2000).fit(features(train.images), train.labels)
    return float(classifier.score(features(test.images), test.labels))


def augment(pixel_values: torch.Tensor) -> torch.Tensor:
    """Moves, rotates and resizes white-on-black digits, and recolours about half of them.

    Args:
        pixel_values: [B, 3, H, W] in -1..1.

    Returns:
        [B, 3, H, W] in -1..1.
    """
    n_images = len(pixel_values)
    angle = (torch.rand(n_images) - 0.5) * 0.5
    scale = 1 + (torch.rand(n_images) - 0.5) * 0.4
    shift = (torch.rand(n_images, 2, 1) - 0.5) * 0.35
    cos, sin = angle.cos() * scale, angle.sin() * scale
    turn = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
    grid = F.affine_grid(torch.cat([turn, shift], 2), list(pixel_values.shape), align_corners=False)
    ink = F.grid_sample((pixel_values + 1) / 2, grid, align_corners=False)

    recoloured = torch.rand(n_images, 1, 1, 1) < 0.5
    foreground, background = torch.rand(2, n_images, 3, 1, 1)
    foreground = torch.where(recoloured, foreground, 1)
    background = torch.where(recoloured, background, 0)
    return (ink * foreground + (1 - ink) * background) * 2 - 1


def train(backbone: Backbone, pixel_values: torch.Tensor, labels: np.ndarray) -> None:
    """Trains all stages of a backbone, in place.

    Args:
        backbone: one with every stage among its `out_features`.
        pixel_values: fp32 [n, 3, H, W].
        labels: int64 [n].
    """
    targets = torch.from_numpy(labels)
    heads = torch.nn.ModuleList(torch.nn.Linear(channels, 10) for channels in backbone.channels)
    parameters = [*backbone.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.05)
    n_steps = EPOCHS * (len(targets) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / 100) * (1 + math.cos(math.pi * step / n_steps)) / 2,
    )
    backbone.train()
    for _ in range(EPOCHS):
        batches = torch.randperm(len(targets)).split(BATCH_SIZE)
        for batch in batches[: len(targets) // BATCH_SIZE]:
            maps = backbone(augment(pixel_values[batch])).feature_maps
            losses = [
                F.cross_entropy(head(stage.mean((2, 3))), targets[batch])
                for head, stage in zip(heads, maps)
            ]
            loss = losses[-1] + 0.1 * torch.stack(losses[:-1]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    backbone.eval()


def main() -> None:
    torch.set_num_threads(1)  # more gain nothing on small maps, and results would vary
    for name, config in CONFIGS.items():
        start = time.monotonic()
        folder = ASSETS / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n")
        processor = AutoImageProcessor.from_pretrained(folder)

        torch.manual_seed(0)
        backbone = AutoBackbone.from_config(config)
        backbone.out_features = backbone.stage_names
        digits, _ = digits_split()
        train(backbone, processor(digits.images)["pixel_values"], digits.labels)
        if isinstance(backbone, SwinBackbone):
            # the last map was classified through its norm, which is the final norm of a classifier
            norm = backbone.hidden_states_norms[backbone.stage_names[-1]]
            backbone.swin.layernorm.load_state_dict(norm.state_dict())
        backbone.save_pretrained(folder)
        # the file has the weights of every stage; by default the model returns the last one
        saved = type(config).from_pretrained(folder, out_features=backbone.stage_names[-1:])
        saved.save_pretrained(folder)

        accuracy = linear_probe(folder)
        n_bytes = (folder / "model.safetensors").stat().st_size
        print(
            f"{name}: linear probe {accuracy:.2%} of the held-out digits, "
            f"{n_bytes:,} bytes, {time.monotonic() - start:.0f} s"
        )
        if accuracy < SMALLEST_ACCURACY:
            raise SystemExit(f"{name} is below {SMALLEST_ACCURACY:.0%}: do not commit it")


if __name__ == "__main__":
    main()
