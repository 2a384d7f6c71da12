"""Commands about one model."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import click

from .options import (
    DEVICE,
    MODES,
    OUT_INDICES,
    RANDOM_WEIGHTS,
    SIZE,
    WITH_DTYPE,
    Batches,
    Names,
    Size,
)
from .shell import Command, echo, say

ARCHITECTURES = ("80", "86", "89", "90", "100", "120", "gfx90a", "gfx942")  # of our kernels


@click.command(name="list", cls=Command)
@click.argument("filter", default="")
@click.option(
    "--type",
    "by_type",
    is_flag=True,
    help="List model types of transformers' checkpoints, and what loads them.",
)
def list_models(filter: str, by_type: bool) -> None:
    """Lists the names of models. All, or those that match FILTER, such as 'swin*'.

    Exit codes: 0 listed; 2 no name matches; 6 the list cannot be written; 130 interrupted,
    143 terminated.
    """
    from ..auto import list_backbones, list_types
    from ..engine.explanation import table

    if by_type:
        rows = [
            (row.model_type, row.loads_as, "yes" if row.is_native else "no", row.needs, row.example)
            for row in list_types(filter)
        ]
        head = ("model_type", "loads as", "native", "needs", "for example")
        names = [table([head, *rows])] if rows else []
    else:
        names = list_backbones(filter)
    if not names:
        raise click.BadParameter(
            f"wanted a pattern that matches a name, such as '*swin*', got {filter!r}"
            + "; models around a backbone (CLIP, detectors ...) load too, as its type" * by_type,
            param_hint="FILTER",
        )
    echo("\n".join(names))


@click.command(cls=Command)
@click.argument(
    "images",
    nargs=-1,
    required=True,
    metavar="IMAGE...",
    type=click.Path(exists=True, dir_okay=False),
)
@click.option("--model", required=True, metavar="MODEL", help="Name or directory.")
@click.option(
    "-o",
    "--out",
    type=click.Path(dir_okay=False),
    default="view.png",
    show_default=True,
    help="The picture to write.",
)
@click.option(
    "--size", type=Size(), metavar="HxW", help="What the model sees.  [default: the image's shape]"
)
@click.option(
    "--stages",
    type=Names(),
    help="Names or indices.  [default: all after the stem; four of more than four of one shape]",
)
def view(images: tuple[str, ...], model: str, out: str, **options: Any) -> None:
    """Draws what every stage of a model makes of images.

    Each image is a row. The channels of a map are drawn as colours by their three principal
    components.

    Exit codes: 0 drawn; 2 wrong arguments or no such model; 6 the picture or the report cannot be
    written; 130 interrupted, 143 terminated.
    """
    from ..inspect.view import view as write_view

    echo(f"wrote {write_view(images, model, out, **options)}")


@click.command(name="verify-model", cls=Command)
@click.argument("name", metavar="MODEL")
@RANDOM_WEIGHTS
@click.option(
    "--size",
    "sizes",
    type=Size(),
    multiple=True,
    metavar="HxW",
    help="Of the images, may be repeated.  [default: the model's own and a smaller one]",
)
@click.option(
    "--batch", type=click.IntRange(min=1), default=2, show_default=True, help="Images of each size."
)
@click.option(
    "--precision", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", show_default=True
)
@DEVICE
@OUT_INDICES
@click.option(
    "--mode",
    type=click.Choice(MODES),
    help="Prepare the model in it first.  [default: it runs as loaded]",
)
def verify_model(name: str, **options: Any) -> None:
    """Compares a model's maps with its own library's. The images are random.

    Exit codes: 0 every map is as accurate as its library's; 1 some are not; 2 wrong arguments or no
    such model; 6 the report cannot be written; 130 interrupted, 143 terminated.
    """
    from ..inspect.verify import verify_model as run

    report = run(name, **options)
    echo(str(report))
    sys.exit(0 if report.passed else 1)


@click.command(cls=Command, context_settings=WITH_DTYPE)
@click.argument("name", metavar="MODEL")
@RANDOM_WEIGHTS
@click.option(
    "--batch",
    "batches",
    type=click.IntRange(min=1),
    multiple=True,
    help="Images per forward pass, may be repeated.  [default: 1 and 8]",
)
@click.option(
    "--size",
    "sizes",
    type=Size(),
    multiple=True,
    help="Of the images, may be repeated.  [default: the model's own]",
)
@click.option(
    "--precision",
    "precisions",
    type=click.Choice(["fp32", "tf32", "bf16", "fp16"]),
    multiple=True,
    help="May be repeated.  [default: bf16 on a GPU, fp32 on a CPU]",
)
@DEVICE
@OUT_INDICES
@click.option(
    "--budget",
    "budget_s",
    type=click.FloatRange(min=0, min_open=True),
    default=180,
    show_default=True,
    metavar="SECONDS",
    help="For each combination; what was begun is finished.",
)
def tune(name: str, device: str | None, **options: Any) -> None:
    """Measures the fastest way to run a model here.

    Mode "auto" takes it from then on; a CPU compiles only where so many images come that it pays.
    Ways that compute other maps than float64 would, or fail,
    are left out and named.

    Exit codes: 0 measured; 2 wrong arguments or no such model; 6 the report cannot be written;
    130 interrupted, 143 terminated.
    """
    from ..inspect.tune import remembered_in, tune_model

    warnings.simplefilter("ignore", UserWarning)  # the results say it
    progress = lambda text: say(f"measuring {text}")  # noqa: E731
    results = []
    for tuned in tune_model(name, device=device, progress=progress, **options):
        echo(str(tuned))
        results.append(tuned)
    echo(remembered_in(device, results))


@click.command(cls=Command)
@click.argument("name", metavar="MODEL")
@click.option(
    "--batch",
    "batches",
    type=Batches(),
    default="1,8,64",
    show_default=True,
    help="Images per forward pass.",
)
@SIZE
@click.option(
    "--precision", type=click.Choice(["fp32", "bf16", "fp16"]), default="bf16", show_default=True
)
@click.option(
    "--arch",
    type=click.Choice(ARCHITECTURES),
    help="Compile for this one, and run nothing.  [default: that of the GPU here]",
)
@click.option(
    "--workers",
    "n_workers",
    type=click.IntRange(min=1),
    help="Processes that compile.  [default: one for each core]",
)
@OUT_INDICES
def warmup(name: str, arch: str | None, **options: Any) -> None:
    """Compiles a model's kernels before its first run.

    It compiles those that the model launches, in parallel. On a GPU it then runs one forward pass
    of each batch, in which new kernels are checked; that is remembered. Weights are random: none
    are downloaded.

    Exit codes: 0 all is compiled; 1 some kernels do not compile or fail their check, the others are
    done; 2 wrong arguments, no such model, or neither a GPU nor --arch; 6 Triton's cache or the
    report cannot be written; 130 interrupted, 143 terminated.
    """
    from tqdm import tqdm

    try:
        from ..inspect.warmup import warm_up
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise click.UsageError("kernels are compiled by triton, which is not installed") from error

    with tqdm(desc="compiling", unit=" binaries", disable=None, leave=False) as bar:
        report = warm_up(
            name,
            arch=int(arch) if arch is not None and arch.isdecimal() else arch,
            progress=lambda n_jobs: _counting(bar, n_jobs),
            **options,
        )
    echo(str(report))
    sys.exit(1 if report.problems else 0)


def _counting(bar: Any, total: int) -> Callable[[object], None]:
    """Gives a tqdm bar its length and returns a function that advances it by one."""
    bar.reset(total)
    return lambda _: bar.update()
