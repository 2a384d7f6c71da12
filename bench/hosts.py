"""Existing models on this machine's CPU, as they are and with `fastbb.accelerate`, interleaved.

    python bench/hosts.py --json hosts.json           # every host, fp32 and bf16; half an hour
    python bench/hosts.py --host mask2former --dtype float32 --rounds 5
    python bench/hosts.py --ledger-only               # bytes and launches of the backbones on a GPU

The models have their full size and random weights, and run one image. Both copies of a model take
turns on the same input; the tables show medians. `share` is the share of the time spent inside the
modules that fastbb replaced.
Traffic and launches are counted, not measured: for the backbone on a GPU in bf16, by the rule of
`bench/ledger.py`, for upstream and for our kernels.
"""

import argparse
import copy
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ledger import Case, count_kernels, forward_launches
from ledger_count import n_bytes
from peers import machine
from torch import Tensor, nn

import fastbb
from fastbb_kernels.testing import record_launches

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SIDES = ("upstream", "fastbb")
STAGES = ["stage1", "stage2", "stage3", "stage4"]


@dataclass(frozen=True)
class Host:
    """A model that users have.

    Attributes:
        title: in tables.
        build: makes the model with random weights.
        size: (height, width) of the image, pixels.
        backbone: name of the module of the backbone in the model, for the ledger.
        inputs: makes the model's inputs from pixels; default: the pixels alone.
    """

    title: str
    build: Callable[[], nn.Module]
    size: tuple[int, int]
    backbone: str = ""
    inputs: Callable[[Tensor], dict[str, Any] | Any] = lambda pixels: pixels


def transformers_model(name: str, config: str, **fields: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        return getattr(transformers, name)(getattr(transformers, config)(**fields))

    return build


def with_backbone(name: str, config: str, inner: str, **fields: Any) -> Callable[[], nn.Module]:
    """Returns a builder of a head of transformers around a backbone of the usual size."""

    def build() -> nn.Module:
        import transformers

        backbone = getattr(transformers, inner)(out_features=STAGES)
        own = getattr(transformers, config)(backbone_config=backbone, **fields)
        return getattr(transformers, name)(own)

    return build


def timm_model(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, **options)

    return build


def torchvision_model(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import torchvision

        package = torchvision.models
        for part in name.split(".")[:-1]:
            package = getattr(package, part)
        options_ = {"weights": None, **options}
        return getattr(package, name.split(".")[-1])(**options_)

    return build


def smp_unet(encoder: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import segmentation_models_pytorch as smp

        return smp.Unet(encoder, encoder_weights=None)

    return build


def text_and_pixels(pixels: Tensor) -> dict[str, Any]:
    ids = torch.tensor([[101, 1037, 4937, 1012, 102]])
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


SEGMENT, PIXEL_LEVEL = (800, 1088), "model.pixel_level_module.encoder"
TIMM_SWIN = "swin_tiny_patch4_window7_224"
HOSTS = {
    "swin": Host(
        "transformers SwinForImageClassification",
        transformers_model("SwinForImageClassification", "SwinConfig"),
        (224, 224),
        "swin",
    ),
    "swin_backbone": Host(
        "transformers SwinBackbone",
        transformers_model("SwinBackbone", "SwinConfig", out_features=STAGES),
        (224, 224),
    ),
    "resnet": Host(
        "transformers ResNetForImageClassification",
        transformers_model("ResNetForImageClassification", "ResNetConfig"),
        (224, 224),
        "resnet",
    ),
    "maskformer": Host(
        "transformers MaskFormer, Swin-T",
        with_backbone("MaskFormerForInstanceSegmentation", "MaskFormerConfig", "SwinConfig"),
        SEGMENT,
        PIXEL_LEVEL,
    ),
    "mask2former": Host(
        "transformers Mask2Former, Swin-T",
        with_backbone("Mask2FormerForUniversalSegmentation", "Mask2FormerConfig", "SwinConfig"),
        SEGMENT,
        PIXEL_LEVEL,
    ),
    "upernet": Host(
        "transformers UperNet, Swin-T",
        with_backbone("UperNetForSemanticSegmentation", "UperNetConfig", "SwinConfig"),
        (512, 512),
        "backbone",
    ),
    "detr": Host(
        "transformers DETR, ResNet-50",
        with_backbone(
            "DetrForObjectDetection", "DetrConfig", "ResNetConfig", use_timm_backbone=False
        ),
        SEGMENT,
        "model.backbone.model",
    ),
    "rt_detr": Host(
        "transformers RT-DETR, ResNet-50-D",
        transformers_model("RTDetrForObjectDetection", "RTDetrConfig"),
        (640, 640),
        "model.backbone.model",
    ),
    "grounding_dino": Host(
        "transformers Grounding DINO, Swin-T",
        transformers_model("GroundingDinoForObjectDetection", "GroundingDinoConfig"),
        SEGMENT,
        "model.backbone.conv_encoder.model",
        text_and_pixels,
    ),
    "timm_swin": Host("timm Swin-T", timm_model(TIMM_SWIN), (224, 224)),
    "timm_resnet": Host("timm ResNet-50", timm_model("resnet50"), (224, 224)),
    "timm_efficientnet": Host("timm EfficientNet-B0", timm_model("efficientnet_b0"), (224, 224)),
    "torchvision_swin": Host("torchvision swin_t", torchvision_model("swin_t"), (224, 224)),
    "torchvision_resnet": Host("torchvision resnet50", torchvision_model("resnet50"), (224, 224)),
    "fasterrcnn": Host(
        "torchvision Faster R-CNN, ResNet-50-FPN",
        torchvision_model("detection.fasterrcnn_resnet50_fpn", weights_backbone=None),
        SEGMENT,
        "backbone.body",
        list,
    ),
    "deeplabv3": Host(
        "torchvision DeepLabV3, ResNet-50",
        torchvision_model("segmentation.deeplabv3_resnet50", weights_backbone=None),
        (520, 520),
        "backbone",
    ),
    "smp_unet": Host("smp Unet, ResNet-50", smp_unet("resnet50"), (512, 512), "encoder"),
    "smp_swin": Host("smp Unet, tu-swin-T", smp_unet(f"tu-{TIMM_SWIN}"), (224, 224), "encoder"),
}


class Inside:
    """Seconds spent inside some modules of a model."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.seconds = 0.0
        self._starts: list[float] = []
        for name in names:
            module = model.get_submodule(name)
            module.register_forward_pre_hook(self._enter)
            module.register_forward_hook(self._leave)

    def _enter(self, *_: Any) -> None:
        self._starts.append(time.perf_counter())

    def _leave(self, *_: Any) -> None:
        start = self._starts.pop()
        if not self._starts:  # a module inside another one counts once
            self.seconds += time.perf_counter() - start


def outermost(names: Sequence[str]) -> list[str]:
    return [
        name
        for name in names
        if not any(other != name and (not other or name.startswith(f"{other}.")) for other in names)
    ]


def measure(host: Host, dtype: torch.dtype, rounds: int, mode: str) -> dict[str, Any]:
    """Returns medians of both copies, of the model and of the replaced modules, in milliseconds."""
    torch.manual_seed(0)
    theirs = host.build().eval().to(dtype)
    ours = copy.deepcopy(theirs)
    report = fastbb.accelerate(ours, mode=mode)
    names = outermost(report.accelerated)
    watched = {"upstream": Inside(theirs, names), "fastbb": Inside(ours, names)}
    models = {"upstream": theirs, "fastbb": ours}
    inputs = host.inputs(torch.randn(1, 3, *host.size).to(dtype))
    call = (lambda m: m(**inputs)) if isinstance(inputs, dict) else (lambda m: m(inputs))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    with torch.inference_mode():
        for _ in range(2):  # the first call compares and times, the second runs like all later ones
            for model in models.values():
                call(model)
        for index in range(rounds):
            order = list(models) if index % 2 else list(models)[::-1]
            for name in order:
                inside = watched[name]
                inside.seconds = 0.0
                start = time.perf_counter()
                call(models[name])
                times[name].append((time.perf_counter() - start, inside.seconds))
    result: dict[str, Any] = {}
    for name, taken in times.items():
        whole, part = (statistics.median(column) * 1e3 for column in zip(*taken))
        result[name] = {"ms": whole, "inside_ms": part}
    result["ratio"] = result["upstream"]["ms"] / result["fastbb"]["ms"]
    result["inside_ratio"] = result["upstream"]["inside_ms"] / result["fastbb"]["inside_ms"]
    # only modules that could not run or were wrong, not slower ones
    result["left_alone"] = [
        row for row in report.rows() if row[2] == "upstream" and not row[3].startswith("ours ")
    ]
    result["report"] = str(report)
    return result


def ledger(host: Host) -> dict[str, Any]:
    """Counts bytes and launches of the backbone on a GPU, on the meta device."""
    case = Case(host.title, "", None, "", host.size, 1)
    with torch.device("meta"):
        backbone = host.build().get_submodule(host.backbone)
    before = forward_launches(backbone, case)
    with record_launches():
        fastbb.accelerate(backbone, mode="triton")
    after = forward_launches(backbone, case, count_kernels)
    return {
        "upstream": {"bytes": n_bytes(before), "launches": len(before)},
        "fastbb": {"bytes": n_bytes(after), "launches": len(after)},
    }


def table(data: dict[str, Any]) -> str:
    """Markdown: one row per host."""
    lines = [
        "| host | image | fp32 | its backbone | bf16 | its backbone "
        "| backbone's share of the time, fp32 | GPU traffic (counted), launches |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, host in HOSTS.items():
        row = data.get(name)
        if row is None:
            continue
        cells = [host.title, "x".join(map(str, host.size))]
        for dtype in DTYPES:
            found = row.get(dtype, {})
            if "ratio" in found:
                cells += [f"{found['ratio']:.2f}", f"{found['inside_ratio']:.2f}"]
            else:
                cells += ["does not run" if "reason" in found else "-", "-"]
        found = row.get("float32", {})
        shares = "-"
        if "ratio" in found:
            before, after = (
                100 * found[side]["inside_ms"] / found[side]["ms"]
                for side in ("upstream", "fastbb")
            )
            shares = f"{before:.0f} % -> {after:.0f} %"
        cells.append(shares)
        counted = row.get("ledger", {})
        if "fastbb" in counted:
            sides = [counted[side] for side in SIDES]
            gb = " -> ".join(f"{side['bytes'] / 1e9:.2f}" for side in sides)
            launches = " -> ".join(str(side["launches"]) for side in sides)
            cells.append(f"{gb} GB, {launches}")
        else:
            cells.append("-")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--host", action="append", choices=HOSTS, help="default: all")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="default: both")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mode", default="auto", help="of accelerate (auto)")
    parser.add_argument("--ledger-only", action="store_true")
    parser.add_argument("--json", type=Path, metavar="PATH")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    data: dict[str, Any] = {}
    for name in options.host or HOSTS:
        host, row = HOSTS[name], data.setdefault(name, {})
        for dtype in [] if options.ledger_only else options.dtype or DTYPES:
            try:
                row[dtype] = measure(host, DTYPES[dtype], options.rounds, options.mode)
                print(f"{host.title}, {dtype}: {row[dtype]['ratio']:.2f}", file=sys.stderr)
                for left in row[dtype]["left_alone"]:
                    print(f"  {': '.join(left)}", file=sys.stderr)
            except Exception as error:  # a host that fails only loses its own row
                row[dtype] = {"reason": f"{type(error).__name__}: {error}".splitlines()[0][:80]}
                print(f"{host.title}, {dtype}: {row[dtype]['reason']}", file=sys.stderr)
        try:
            row["ledger"] = ledger(host)
        except Exception as error:
            row["ledger"] = {"reason": f"{type(error).__name__}: {error}".splitlines()[0][:80]}
            print(f"{host.title}, ledger: {row['ledger']['reason']}", file=sys.stderr)
        if options.json:
            options.json.write_text(json.dumps({"machine": machine(), "hosts": data}, indent=1))
    print(table(data))
    return 0


if __name__ == "__main__":
    sys.exit(main())
