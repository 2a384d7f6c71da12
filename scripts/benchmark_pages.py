"""Writes the tables and pictures of docs/benchmarks and the table of the README.

    python scripts/benchmark_pages.py --measure             # on this CPU, over an hour with
                                                            # nothing else running
    python scripts/benchmark_pages.py --measure families    # one of the measured pages
    python scripts/benchmark_pages.py                       # from the results that are there, and
                                                            # counts

Measured are backbones.json, families.json and hosts.json of docs/benchmarks, by the commands of
`fastbb bench` that the pages name. The models are directories with only a config.json; `--configs
FOLDER` leaves them there.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastbb.bench.exports import write_json
from fastbb.bench.markdown import markdown
from fastbb.bench.noise import best, is_valid, speed
from fastbb.bench.plot import plot as plot_bars
from fastbb.bench.results import Cell, Results
from fastbb.bench.table import rate
from fastbb.bench.traffic import Traffic, count_traffic, plot, summary

ROOT = Path(__file__).resolve().parents[1]
DOCS, README = ROOT / "docs", ROOT / "README.md"
PAGES = DOCS / "benchmarks"
PAGE, PICTURE = PAGES / "traffic.md", DOCS / "ledger.png"

STAGES = (1, 2, 3, 4)
SWIN_S = {"model_type": "swin", "depths": [2, 2, 18, 2]}
SWIN_B = {**SWIN_S, "embed_dim": 128, "num_heads": [4, 8, 16, 32]}
VIT_B = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "image_size": 224,
    "patch_size": 16,
}
VIT_S = {**VIT_B, "hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6}
TRAINED_AT_518 = {"image_size": 518, "patch_size": 14}
CONVNEXT_T = {"hidden_sizes": [96, 192, 384, 768], "depths": [3, 3, 9, 3], "image_size": 224}
CONFIGS: dict[str, dict[str, Any]] = {
    "Swin-T": {"model_type": "swin"},
    "Swin-S": SWIN_S,
    "Swin-B": SWIN_B,
    "Swin-B-384": {**SWIN_B, "image_size": 384, "window_size": 12},
    "Swinv2-T": {"model_type": "swinv2", "image_size": 256, "window_size": 8},
    "ResNet-50": {"model_type": "resnet"},
    "ResNet-18": {
        "model_type": "resnet",
        "layer_type": "basic",
        "depths": [2, 2, 2, 2],
        "hidden_sizes": [64, 128, 256, 512],
    },
    "ResNet-101": {"model_type": "resnet", "depths": [3, 4, 23, 3]},
    "DINOv2-S": {"model_type": "dinov2", **VIT_S, **TRAINED_AT_518},
    "DINOv2-B": {"model_type": "dinov2", **VIT_B, **TRAINED_AT_518},
    "DINOv3-S": {"model_type": "dinov3_vit", **VIT_S, "num_register_tokens": 4},
    "DINOv3-B": {"model_type": "dinov3_vit", **VIT_B, "num_register_tokens": 4},
    "BEiT-B": {
        "model_type": "beit",
        **VIT_B,
        "use_absolute_position_embeddings": False,
        "use_relative_position_bias": True,
    },
    "ConvNeXt-T": {"model_type": "convnext", **CONVNEXT_T},
    "ConvNeXtV2-T": {"model_type": "convnextv2", **CONVNEXT_T},
}
BACKBONES = tuple(
    f"{models} --random-weights --batch 1,8 --precision fp32,bf16 --mode eager,compile,openvino "
    "--against timm,compile,openvino,onnxruntime --budget 3600"
    for models in ("Swin-T ResNet-50 --out-indices 1,2,3,4", "DINOv2-S ConvNeXt-T")
)
FAMILIES = (
    "DINOv2-S DINOv3-S BEiT-B ConvNeXt-T ConvNeXtV2-T --random-weights --batch 1,8 "
    "--precision fp32,bf16 --mode eager --against timm --budget 1500"
)
# HOST,... and further options; those of `bench.hosts` are built by bench/hosts.py
HOSTS = (
    "SwinForImageClassification,bench.hosts:swin_backbone,ResNetForImageClassification,"
    "bench.hosts:maskformer,bench.hosts:upernet,bench.hosts:detr,GroundingDinoForObjectDetection,"
    "swin_tiny_patch4_window7_224,resnet50,efficientnet_b0,torchvision/swin_t,torchvision/resnet50,"
    "torchvision/fasterrcnn_resnet50_fpn,torchvision/deeplabv3_resnet50,bench.hosts:smp_swin",
    "bench.hosts:mask2former --size 800x1088",
    "RTDetrForObjectDetection --size 640",
    "bench.hosts:smp_unet --size 512",
)
# columns of the README, as the bench names them
README_WAYS = (
    *("transformers eager", "fastbb eager", "transformers compiled", "timm compiled"),
    *("fastbb compile", "fastbb openvino", "OpenVINO", "ONNX Runtime"),
)
# name of the model, (height, width) and batch, by title in the table
COUNTED: dict[str, tuple[str, tuple[int, int], int]] = {
    "Swin-T, 224, batch 64": ("Swin-T", (224, 224), 64),
    "Swin-S, 224, batch 64": ("Swin-S", (224, 224), 64),
    "Swin-B, 384, batch 8": ("Swin-B-384", (384, 384), 8),
    "Swin-T, 800x1088, batch 8": ("Swin-T", (800, 1088), 8),
    "Swinv2-T, 256, batch 64": ("Swinv2-T", (256, 256), 64),
    "ResNet-50, 224, batch 64": ("ResNet-50", (224, 224), 64),
    "ResNet-18, 224, batch 64": ("ResNet-18", (224, 224), 64),
    "ResNet-101, 224, batch 64": ("ResNet-101", (224, 224), 64),
    "timm's ResNet-50-D, 224, batch 64": ("resnet50d", (224, 224), 64),
    **{
        f"{name}, 224, batch 64": (name, (224, 224), 64)
        for name in (
            *("DINOv2-S", "DINOv2-B", "DINOv3-S", "DINOv3-B", "BEiT-B"),
            *("ConvNeXt-T", "ConvNeXtV2-T"),
        )
    },
}
DRAWN = ("Swin-T, 224, batch 64", "ResNet-50, 224, batch 64")


def write_configs(folder: Path) -> None:
    """Makes a directory with a config.json for each model of `CONFIGS`."""
    for name, config in CONFIGS.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def bench(options: str, folder: Path) -> Results:
    """Runs `fastbb bench` in a folder; its reasons for failing are printed."""
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "results.json"
        command = [sys.executable, "-m", "fastbb", "bench", *options.split(), "--json", str(path)]
        where = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
        subprocess.run(command, cwd=folder, env={**os.environ, **where}, stdout=subprocess.DEVNULL)
        return replace(Results.read(path), command=f"fastbb bench {options}")


def merged(parts: Sequence[Results], title: str) -> Results:
    """One result of several commands, with a note that names all but the first."""
    cells = [cell for part in parts for cell in part.cells]
    notes = [note for part in parts for note in part.notes]
    others = ", ".join(f"`{part.command}`" for part in parts[1:])
    return replace(parts[0], cells=cells, notes=[*notes, f"{title}: {others}."])


def measure_backbones(folder: Path) -> Results:
    """Measures the backbones of the README beside all engines."""
    return merged([bench(options, folder) for options in BACKBONES], "Other models")


def measure_hosts() -> Results:
    """Measures the hosts in fp32 with one image, and counts the traffic of what is replaced."""
    options = [f"--accelerate {host} --random-weights --batch 1" for host in HOSTS]
    parts = [bench(one, ROOT) for one in options]
    counts = [cell for one in options for cell in bench(f"{one} --traffic", ROOT).cells]
    traffic = {(cell.model, cell.size): cell.traffic for cell in counts}
    results = merged(parts, "Other sizes")
    for cell in results.cells:
        cell.traffic = traffic.get((cell.model, cell.size), {})
    return results


# what measures each page, given the folder with the models
MEASURED: dict[str, Callable[[Path], Results]] = {
    "backbones": measure_backbones,
    "families": lambda folder: bench(FAMILIES, folder),
    "hosts": lambda _: measure_hosts(),
}


def count(title: str, folder: Path) -> Traffic:
    """Counts a model of `COUNTED`, of which the folder has the directory."""
    name, size, batch = COUNTED[title]
    model = str(folder / name) if name in CONFIGS else name
    return replace(count_traffic(model, size, batch, stages_of(name)), title=title)


def stages_of(name: str) -> tuple[int, ...]:
    """Indices of the maps that a model returns: all stages; of a ViT, whose maps are of one size,
    the last.
    """
    layers = CONFIGS.get(name, {}).get("num_hidden_layers")
    return STAGES if layers is None else (layers,)


def with_table(page: str, table: str) -> str:
    """Replaces the table of traffic in a page, and the reasons below it."""
    pattern = r"^\| traffic .*?(?=\n\n(?!\*)|\Z)"
    found, n = re.subn(pattern, lambda _: table, page.rstrip(), flags=re.M | re.S)
    assert n == 1, "the page has no table of traffic, or several"
    return found + "\n"


def with_measured(page: str, text: str) -> str:
    """Replaces what stands between the two marks of a page."""
    pattern = r"(?<=<!-- measured -->\n).*?(?=<!-- end of measured -->)"
    found, n = re.subn(pattern, lambda _: f"{text.strip()}\n", page, flags=re.S)
    assert n == 1, "the page has no marks for what is measured, or several"
    return found


def readme_table(results: Results) -> str:
    """Images per second: a row for each model and precision, with all batches in each field."""
    found: dict[tuple[str, str], list[Cell]] = {}
    for cell in results.cells:
        found.setdefault((cell.model, cell.precision), []).append(cell)
    batches = dict.fromkeys(cell.batch for cell in results.cells)
    title = f"batch {' / '.join(map(str, batches))}"
    rows = [[title, *README_WAYS], ["---", *["--:"] * len(README_WAYS)]]
    for (model, precision), cells in found.items():
        speeds = (" / ".join(_speed(cell, name) for cell in cells) for name in README_WAYS)
        rows.append([f"{model}, {precision}", *speeds])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _speed(cell: Cell, name: str) -> str:
    way = cell.way(name)
    found = None if way is None or not is_valid(way) else speed(way, cell.batch)
    if found is None:
        return "-"
    text = rate(found.images_per_s)
    return f"**{text}**" if best(cell).way is way else text


def write_measured_pages() -> None:
    """Writes the pages that have results, and the README."""
    for name in MEASURED:
        results, page = Results.read(PAGES / f"{name}.json"), PAGES / f"{name}.md"
        page.write_text(with_measured(page.read_text(), markdown(results)))
    backbones = Results.read(PAGES / "backbones.json")
    README.write_text(with_measured(README.read_text(), readme_table(backbones)))
    plot_bars(backbones, DOCS / "backbones.png")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--measure",
        nargs="*",
        choices=[*MEASURED],
        metavar="PAGE",
        help="measure first: backbones, families, hosts; default: all",
    )
    parser.add_argument("--configs", type=Path, metavar="FOLDER", help="default: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.configs or Path(temporary)
        write_configs(folder)
        wanted = [] if options.measure is None else options.measure or MEASURED
        for name in wanted:
            write_json(MEASURED[name](folder), PAGES / f"{name}.json")
        models = [count(title, folder) for title in COUNTED]
    PAGE.write_text(with_table(PAGE.read_text(), summary(models)))
    plot([model for model in models if model.title in DRAWN], PICTURE)
    write_measured_pages()


if __name__ == "__main__":
    main()
