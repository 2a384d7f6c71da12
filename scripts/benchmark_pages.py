"""Writes the table of docs/benchmarks/traffic.md and the picture docs/ledger.png.

    python scripts/benchmark_pages.py

The models are directories with only a config.json, of which `fastbb bench --random-weights` takes
each as well; `--configs FOLDER` leaves them there.
"""

import argparse
import json
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastbb.bench.traffic import Traffic, count_traffic, plot, summary

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE, PICTURE = DOCS / "benchmarks" / "traffic.md", DOCS / "ledger.png"

STAGES = (1, 2, 3, 4)
SWIN_S = {"model_type": "swin", "depths": [2, 2, 18, 2]}
CONFIGS: dict[str, dict[str, Any]] = {
    "Swin-T": {"model_type": "swin"},
    "Swin-S": SWIN_S,
    "Swin-B-384": {
        **SWIN_S,
        "image_size": 384,
        "embed_dim": 128,
        "num_heads": [4, 8, 16, 32],
        "window_size": 12,
    },
    "ResNet-50": {"model_type": "resnet"},
    "ResNet-18": {
        "model_type": "resnet",
        "layer_type": "basic",
        "depths": [2, 2, 2, 2],
        "hidden_sizes": [64, 128, 256, 512],
    },
    "ResNet-101": {"model_type": "resnet", "depths": [3, 4, 23, 3]},
}
# name of the model, (height, width) and batch, by title in the table
COUNTED: dict[str, tuple[str, tuple[int, int], int]] = {
    "Swin-T, 224, batch 64": ("Swin-T", (224, 224), 64),
    "Swin-S, 224, batch 64": ("Swin-S", (224, 224), 64),
    "Swin-B, 384, batch 8": ("Swin-B-384", (384, 384), 8),
    "Swin-T, 800x1088, batch 8": ("Swin-T", (800, 1088), 8),
    "ResNet-50, 224, batch 64": ("ResNet-50", (224, 224), 64),
    "ResNet-18, 224, batch 64": ("ResNet-18", (224, 224), 64),
    "ResNet-101, 224, batch 64": ("ResNet-101", (224, 224), 64),
    "timm's ResNet-50-D, 224, batch 64": ("resnet50d", (224, 224), 64),
}
DRAWN = ("Swin-T, 224, batch 64", "ResNet-50, 224, batch 64")


def write_configs(folder: Path) -> None:
    """Makes a directory with a config.json for each model of `CONFIGS`."""
    for name, config in CONFIGS.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def count(title: str, folder: Path) -> Traffic:
    """Counts a model of `COUNTED`, of which the folder has the directory."""
    name, size, batch = COUNTED[title]
    model = str(folder / name) if name in CONFIGS else name
    return replace(count_traffic(model, size, batch, STAGES), title=title)


def with_table(page: str, table: str) -> str:
    """Replaces the table of traffic in a page, and the reasons below it."""
    pattern = r"^\| traffic .*?(?=\n\n(?!\*)|\Z)"
    found, n = re.subn(pattern, lambda _: table, page.rstrip(), flags=re.M | re.S)
    assert n == 1, "the page has no table of traffic, or several"
    return found + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--configs", type=Path, metavar="FOLDER", help="default: a temporary one")
    folder = parser.parse_args().configs
    with tempfile.TemporaryDirectory() as temporary:
        folder = folder or Path(temporary)
        write_configs(folder)
        models = [count(title, folder) for title in COUNTED]
    PAGE.write_text(with_table(PAGE.read_text(), summary(models)))
    plot([model for model in models if model.title in DRAWN], PICTURE)


if __name__ == "__main__":
    main()
