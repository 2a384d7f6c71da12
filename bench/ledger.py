"""Counts the bytes of a forward pass: transformers, timm and fastbb by one rule, no GPU.

    python bench/ledger.py                      # every model: traffic, launches, by category
    python bench/ledger.py --markdown           # only the tables of docs/benchmarks/traffic.md
    python bench/ledger.py --model swin_t_224 --plot ledger.png

Everything runs on the meta device: bf16, eval, no gradients, all four stages returned. The
dispatcher reports ops, and the launcher our kernels; `ledger_count` has the rule. Each model runs
twice and the second run counts, without values that are computed once per set of weights.
"""

import argparse
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ledger_count import (
    ATTENTION,
    CATEGORIES,
    GEMM,
    NORM,
    Launch,
    count_launches,
    n_bytes,
)
from torch import Tensor, nn

from fastbb import ResNetConfig, SwinConfig, TimmBackbone, TimmBackboneConfig
from fastbb.models.resnet import ResNetBackbone
from fastbb.models.swin import SwinBackbone
from fastbb_kernels import use_impl
from fastbb_kernels.testing import record_launches

BLOCK_OPS = ("swin_attention_block", "swin_mlp_block", "bottleneck_tail")

# a fused kernel has the category of most of its work; keys are ops, as in `_<op>_fwd_kernel`
KERNEL_CATEGORIES = {
    "bottleneck_tail": GEMM,
    "conv1x1_bn_act": GEMM,
    "conv1x1_dual": GEMM,
    "conv3x3_bn_act": GEMM,
    "depthwise_conv_bn_act": GEMM,
    "layer_norm_linear": GEMM,
    "layer_norm_nchw": NORM,
    "linear_residual": GEMM,
    "patch_embed": GEMM,
    "patch_merging": GEMM,
    "stem_conv_bn_relu_pool": GEMM,
    "swin_attention_block": ATTENTION,
    "swin_mlp_block": GEMM,
    "window_attention": ATTENTION,
}


@dataclass(frozen=True)
class Case:
    """A model and its input.

    Attributes:
        title: model, size and batch, in tables.
        family: "swin" or "resnet".
        config: fields of transformers' configuration and ours; None: only timm has the model.
        timm_name: the same model in timm.
        size: (height, width) of the images, pixels.
        batch: images per forward.
    """

    title: str
    family: str
    config: dict[str, Any] | None
    timm_name: str
    size: tuple[int, int]
    batch: int


STAGES = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
SWIN_S = {**STAGES, "depths": (2, 2, 18, 2)}
SWIN_B_384 = {**SWIN_S, "embed_dim": 128, "num_heads": (4, 8, 16, 32), "window_size": 12}
TIMM_SWIN_T = "swin_tiny_patch4_window7_224"
TIMM_SWIN_S = "swin_small_patch4_window7_224"
TIMM_SWIN_B_384 = "swin_base_patch4_window12_384"
RESNET18 = {
    **STAGES,
    "layer_type": "basic",
    "depths": (2, 2, 2, 2),
    "hidden_sizes": (64, 128, 256, 512),
}
RESNET101 = {**STAGES, "depths": (3, 4, 23, 3)}
CASES = {
    "swin_t_224": Case("Swin-T, 224, batch 64", "swin", STAGES, TIMM_SWIN_T, (224, 224), 64),
    "swin_s_224": Case("Swin-S, 224, batch 64", "swin", SWIN_S, TIMM_SWIN_S, (224, 224), 64),
    "swin_b_384": Case("Swin-B, 384, batch 8", "swin", SWIN_B_384, TIMM_SWIN_B_384, (384, 384), 8),
    "swin_t_800x1088": Case(
        "Swin-T, 800x1088, batch 8", "swin", STAGES, TIMM_SWIN_T, (800, 1088), 8
    ),
    "resnet50": Case("ResNet-50, 224, batch 64", "resnet", STAGES, "resnet50", (224, 224), 64),
    "resnet18": Case("ResNet-18, 224, batch 64", "resnet", RESNET18, "resnet18", (224, 224), 64),
    "resnet101": Case(
        "ResNet-101, 224, batch 64", "resnet", RESNET101, "resnet101", (224, 224), 64
    ),
    "resnet50d": Case("ResNet-50-D, 224, batch 64", "resnet", None, "resnet50d", (224, 224), 64),
}

Ledger = dict[str, list[Launch]]  # launches of a forward, by implementation


def transformers_launches(case: Case) -> list[Launch]:
    import transformers

    config = {"swin": transformers.SwinConfig, "resnet": transformers.ResNetConfig}[case.family]
    options = {"attn_implementation": "sdpa"} if case.family == "swin" else {}
    with torch.device("meta"):
        model = transformers.AutoBackbone.from_config(config(**case.config or {}), **options)
    return forward_launches(model, case)


def timm_launches(case: Case) -> list[Launch]:
    import timm

    options: dict[str, Any] = {"out_indices": (1, 2, 3, 4)}  # stages after the stem
    if case.family == "swin":
        options = {"out_indices": (0, 1, 2, 3), "img_size": case.size}
    with torch.device("meta"):
        model = timm.create_model(case.timm_name, features_only=True, **options)
    return forward_launches(model, case)


def separate_launches(case: Case) -> list[Launch]:
    return _fastbb_launches(case, use_impl("eager", ops=BLOCK_OPS))


def block_launches(case: Case) -> list[Launch]:
    return _fastbb_launches(case, nullcontext())


TIMM = "timm"
IMPLEMENTATIONS: dict[str, dict[str, Callable[[Case], list[Launch]]]] = {
    "swin": {
        "transformers, SDPA": transformers_launches,
        TIMM: timm_launches,
        "fastbb, separate ops": separate_launches,
        "fastbb, block kernels": block_launches,
    },
    "resnet": {
        "transformers": transformers_launches,
        TIMM: timm_launches,
        "fastbb": separate_launches,
        "fastbb, tail kernels": block_launches,
    },
}
# the reference of the others
UPSTREAM = {"swin": "transformers, SDPA", "resnet": TIMM}


def count(case: Case) -> Ledger:
    """Counts the launches of a model by every implementation that has it."""
    return {
        name: launches(case)
        for name, launches in IMPLEMENTATIONS[case.family].items()
        if case.config is not None or launches is not transformers_launches
    }


def _fastbb_launches(case: Case, impl: AbstractContextManager[None]) -> list[Launch]:
    with torch.device("meta"):
        model = _fastbb_model(case)
    with use_impl("triton"), impl:
        return forward_launches(model, case, count_kernels)


def _fastbb_model(case: Case) -> nn.Module:
    if case.config is None:
        return TimmBackbone(TimmBackboneConfig(case.timm_name, out_indices=(1, 2, 3, 4)))
    if case.family == "swin":
        return SwinBackbone(SwinConfig(**case.config))
    return ResNetBackbone(ResNetConfig(**case.config))


def forward_launches(
    model: nn.Module,
    case: Case,
    count: Callable[[list[Tensor]], AbstractContextManager[list[Launch]]] = count_launches,
) -> list[Launch]:
    """Counts the launches of the second forward pass of a model on the meta device."""
    model = model.to(torch.bfloat16).eval()
    weights = [*model.parameters(), *model.buffers()]
    pixels = torch.empty(case.batch, 3, *case.size, dtype=torch.bfloat16, device="meta")

    with torch.no_grad(), record_launches():
        model(pixels)  # computes values that are made once per set of weights
    with torch.no_grad(), count(weights) as launches:
        model(pixels)
    return launches


@contextmanager
def count_kernels(weights: Iterable[Tensor]) -> Iterator[list[Launch]]:
    """Counts like `count_launches`, and the launches of our kernels as well."""
    with record_launches() as record, count_launches(weights) as launches:
        yield launches
    launches += [
        Launch(kernel.name, kernel_category(kernel.name), kernel.n_bytes)
        for kernel in record.launches
    ]


def kernel_category(kernel: str) -> str:
    for op, category in KERNEL_CATEGORIES.items():
        if kernel.startswith(f"_{op}"):
            return category
    raise NotImplementedError(f"the kernel {kernel} has no category: add its op")


def summary(ledgers: dict[str, Ledger]) -> str:
    """Formats traffic, ratio to upstream's, and launches, by family: docs/benchmarks/traffic.md.

    Args:
        ledgers: by name of the case.
    """
    tables = []
    for family, implementations in IMPLEMENTATIONS.items():
        rows = []
        for name, ledger in ledgers.items():
            case = CASES[name]
            if case.family != family:
                continue
            upstream = n_bytes(ledger[UPSTREAM[family]])
            cells = []
            for side in implementations:
                traffic = n_bytes(ledger.get(side, []))
                text = f"{_traffic(case, traffic)} ({traffic / upstream:.2f}), {{}}"
                cells.append(text.format(len(ledger[side])) if side in ledger else "-")
            rows.append([case.title, *cells])
        if rows:
            tables.append(table([_HEADERS[family], *implementations], rows))
    return "\n\n".join(tables)


_HEADERS = {
    "swin": "traffic (ratio), launches",
    "resnet": "traffic per image (ratio), launches",
}


def _traffic(case: Case, traffic: int) -> str:
    if case.family == "swin":
        return f"{traffic / 1e9:.2f} GB"
    return f"{traffic / 1e6 / case.batch:.1f} MB"


def breakdown(case: Case, ledger: Ledger) -> str:
    """Formats the traffic of a model by category, with launches in brackets."""

    def row(name: str, wanted: Collection[str]) -> list[str]:
        chosen = [[x for x in launches if x.category in wanted] for launches in ledger.values()]
        return [name, *(f"{n_bytes(x) / 1e9:.3f} ({len(x)})" if x else "" for x in chosen)]

    rows = [row(category, [category]) for category in CATEGORIES] + [row("total", CATEGORIES)]
    per_image = [f"{n_bytes(x) / 1e6 / case.batch:.1f}" for x in ledger.values()]
    rows = [row for row in rows if any(row[1:])] + [["MB per image", *per_image]]
    return table([f"{case.title}: GB (launches)", *ledger], rows)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Formats markdown that is also readable as text: names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    lines = [
        "| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |"
        for row in [header, *rows]
    ]
    rule = ["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]
    return "\n".join([lines[0], "|" + "|".join(rule) + "|", *lines[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", action="append", choices=CASES, help="default: all of them")
    parser.add_argument("--markdown", action="store_true", help="print only the summary")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw where the bytes go")
    arguments = parser.parse_args()
    ledgers = {name: count(CASES[name]) for name in arguments.model or CASES}
    print(summary(ledgers))
    if not arguments.markdown:
        for name, ledger in ledgers.items():
            print(f"\n{breakdown(CASES[name], ledger)}")
    if arguments.plot:
        from ledger_plot import plot  # needs matplotlib, the extra `plot`

        plot({CASES[name].title: ledger for name, ledger in ledgers.items()}, arguments.plot)


if __name__ == "__main__":
    main()
