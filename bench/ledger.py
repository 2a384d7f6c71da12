"""Where the bytes of a Swin forward pass go: transformers, timm and fastbb by one rule, no GPU.

    python bench/ledger.py                      # every model: traffic, launches, by category
    python bench/ledger.py --markdown           # only the table that the README shows
    python bench/ledger.py --model swin_t_224 --plot ledger.png

Everything runs on the meta device: bf16, eval, no gradients, all four stages returned. Ops are seen
by the dispatcher, our kernels by their launches; `ledger_count` has the rule. Each model runs twice
and the second run counts, so that nobody pays for what is computed once per set of weights.
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

from fastbb import SwinConfig
from fastbb.models.swin import SwinBackbone
from fastbb_kernels import use_impl

BLOCK_OPS = ("swin_attention_block", "swin_mlp_block")

# a fused kernel counts where most of its work is; keys are ops, as in `_<op>_fwd_kernel`
KERNEL_CATEGORIES = {
    "layer_norm_linear": GEMM,
    "layer_norm_nchw": NORM,
    "linear_residual": GEMM,
    "patch_embed": GEMM,
    "patch_merging": GEMM,
    "swin_attention_block": ATTENTION,
    "swin_mlp_block": GEMM,
    "window_attention": ATTENTION,
}


@dataclass(frozen=True)
class Case:
    """A model and its input.

    Attributes:
        title: model, size and batch, for people.
        config: fields of `SwinConfig`, transformers' or ours.
        timm_name: the same model in timm.
        size: (height, width) of the images, pixels.
        batch: images per forward.
    """

    title: str
    config: dict[str, Any]
    timm_name: str
    size: tuple[int, int]
    batch: int


SWIN_T = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
SWIN_S = {**SWIN_T, "depths": (2, 2, 18, 2)}
SWIN_B_384 = {**SWIN_S, "embed_dim": 128, "num_heads": (4, 8, 16, 32), "window_size": 12}
TIMM_SWIN_T = "swin_tiny_patch4_window7_224"
TIMM_SWIN_S = "swin_small_patch4_window7_224"
TIMM_SWIN_B_384 = "swin_base_patch4_window12_384"
CASES = {
    "swin_t_224": Case("Swin-T, 224, batch 64", SWIN_T, TIMM_SWIN_T, (224, 224), 64),
    "swin_s_224": Case("Swin-S, 224, batch 64", SWIN_S, TIMM_SWIN_S, (224, 224), 64),
    "swin_b_384": Case("Swin-B, 384, batch 8", SWIN_B_384, TIMM_SWIN_B_384, (384, 384), 8),
    "swin_t_800x1088": Case("Swin-T, 800x1088, batch 8", SWIN_T, TIMM_SWIN_T, (800, 1088), 8),
}

Ledger = dict[str, list[Launch]]  # launches of a forward, by implementation


def transformers_launches(case: Case) -> list[Launch]:
    import transformers

    config = transformers.SwinConfig(**case.config)
    with torch.device("meta"):
        model = transformers.AutoBackbone.from_config(config, attn_implementation="sdpa")
    return forward_launches(model, case)


def timm_launches(case: Case) -> list[Launch]:
    import timm

    with torch.device("meta"):
        model = timm.create_model(
            case.timm_name, features_only=True, out_indices=(0, 1, 2, 3), img_size=case.size
        )
    return forward_launches(model, case)


def separate_launches(case: Case) -> list[Launch]:
    return _fastbb_launches(case, use_impl("eager", ops=BLOCK_OPS))


def block_launches(case: Case) -> list[Launch]:
    return _fastbb_launches(case, nullcontext())


UPSTREAM = "transformers, SDPA"  # what the others are compared with
IMPLEMENTATIONS: dict[str, Callable[[Case], list[Launch]]] = {
    UPSTREAM: transformers_launches,
    "timm": timm_launches,
    "fastbb, separate ops": separate_launches,
    "fastbb, block kernels": block_launches,
}


def _fastbb_launches(case: Case, impl: AbstractContextManager[None]) -> list[Launch]:
    with torch.device("meta"):
        model = SwinBackbone(SwinConfig(**case.config))
    with use_impl("triton"), impl:
        return forward_launches(model, case, count_kernels)


def forward_launches(
    model: nn.Module,
    case: Case,
    count: Callable[[list[Tensor]], AbstractContextManager[list[Launch]]] = count_launches,
) -> list[Launch]:
    """Launches of one forward pass of a model on the meta device, its second."""
    model = model.to(torch.bfloat16).eval()
    weights = [*model.parameters(), *model.buffers()]
    pixels = torch.empty(case.batch, 3, *case.size, dtype=torch.bfloat16, device="meta")

    def forward() -> list[Launch]:
        with torch.no_grad(), count(weights) as launches:
            model(pixels)
        return launches

    forward()
    return forward()


@contextmanager
def count_kernels(weights: Iterable[Tensor]) -> Iterator[list[Launch]]:
    """`count_launches` that counts launches of our kernels as well."""
    from fastbb_kernels.testing import record_launches

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
    """The table of the README: traffic, its ratio to transformers', and launches.

    Args:
        ledgers: by name of the case.
    """
    rows = []
    for name, ledger in ledgers.items():
        upstream = n_bytes(ledger[UPSTREAM])
        cells = []
        for launches in ledger.values():
            traffic = n_bytes(launches)
            cells.append(f"{traffic / 1e9:.2f} GB ({traffic / upstream:.2f}), {len(launches)}")
        rows.append([CASES[name].title, *cells])
    return table(["traffic (ratio), launches", *IMPLEMENTATIONS], rows)


def breakdown(case: Case, ledger: Ledger) -> str:
    """Where the traffic of one model goes, with launches in brackets."""

    def row(name: str, wanted: Collection[str]) -> list[str]:
        chosen = [[x for x in launches if x.category in wanted] for launches in ledger.values()]
        return [name, *(f"{n_bytes(x) / 1e9:.3f} ({len(x)})" if x else "" for x in chosen)]

    rows = [row(category, [category]) for category in CATEGORIES] + [row("total", CATEGORIES)]
    per_image = [f"{n_bytes(x) / 1e6 / case.batch:.1f}" for x in ledger.values()]
    rows = [row for row in rows if any(row[1:])] + [["MB per image", *per_image]]
    return table([f"{case.title}: GB (launches)", *ledger], rows)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown that is also readable as text: names to the left, numbers to the right."""
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
    ledgers = {
        name: {side: launches(CASES[name]) for side, launches in IMPLEMENTATIONS.items()}
        for name in arguments.model or CASES
    }
    print(summary(ledgers))
    if not arguments.markdown:
        for name, ledger in ledgers.items():
            print(f"\n{breakdown(CASES[name], ledger)}")
    if arguments.plot:
        from ledger_plot import plot  # needs matplotlib, the extra `plot`

        plot({CASES[name].title: ledger for name, ledger in ledgers.items()}, arguments.plot)


if __name__ == "__main__":
    main()
