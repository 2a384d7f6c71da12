"""The command that measures."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from .options import MODES, RANDOM_WEIGHTS, Batches, Choices, Integers, Names, SizeOrSide
from .shell import Command, echo, say

_PATH = click.Path(dir_okay=False, path_type=Path)


@click.command(cls=Command)
@click.argument("models", nargs=-1, metavar="MODEL...")
@click.option(
    "--batch",
    "batches",
    type=Batches(),
    default="1,8",
    show_default=True,
    help="Images per call; halved where memory runs out.",
)
@click.option(
    "--size",
    type=SizeOrSide(),
    metavar="HxW",
    help="Of the images; one number is a square.  [default: the model's own]",
)
@click.option(
    "--precision",
    "precisions",
    type=Choices("fp32", "tf32", "bf16", "fp16"),
    default="fp32",
    show_default=True,
    help="fp32, tf32, bf16, fp16.",
)
@click.option(
    "--mode",
    "modes",
    type=Choices(*MODES),
    default="auto",
    show_default=True,
    help=f"Of fastbb: {', '.join(MODES)}.",
)
@click.option(
    "--against",
    type=Choices("transformers", "timm", "torchvision", "compile", "openvino", "onnxruntime"),
    default="",
    help="Besides the model's own library, op by op, which always runs: transformers, timm, "
    "torchvision, compile (each library under torch.compile), openvino, onnxruntime.",
)
@RANDOM_WEIGHTS
@click.option("--out-indices", type=Integers(), help="Which maps.  [default: the model's own]")
@click.option("--device", metavar="DEVICE", help="cpu, cuda or cuda:N.  [default: a GPU if any]")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=5,
    show_default=True,
    help="Of timing, for each way in each cell.",
)
@click.option(
    "--budget",
    "budget_s",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="For everything; ways that compile too slowly for it are dropped and named.",
)
@click.option(
    "--accelerate",
    "hosts",
    type=Names(),
    metavar="HOST,...",
    help="Models of other libraries, as they are and accelerated: a directory or class of "
    "transformers, a timm name, torchvision/NAME, module:function.",
)
@click.option(
    "--end-to-end",
    metavar="INPUT",
    help="Extract the features of these images instead: read, decode, resize, copy, model and "
    "write, alone and together.",
)
@click.option("--null-model", is_flag=True, help="With --end-to-end: no model, the feed alone.")
@click.option(
    "--traffic", is_flag=True, help="Count bytes and launches on a GPU instead; needs no GPU."
)
@click.option("--csv", "csv_path", type=_PATH, metavar="FILE", help="timm's columns and more.")
@click.option("--json", "json_path", type=_PATH, metavar="FILE", help="Everything.")
@click.option("--markdown", "markdown_path", type=_PATH, metavar="FILE", help="Tables.")
@click.option("--plot", "plot_path", type=_PATH, metavar="FILE", help="A picture.")
@click.option(
    "--compare",
    "old_path",
    metavar="OLD.json",
    help="Measure again what this file of --json has, or MODEL, and judge each cell.",
)
def bench(models: tuple[str, ...], **options: Any) -> None:
    """Measures how fast a backbone runs, in every way, and whether each computes the same.

    A cell is a model, a precision and a batch. Each way runs in a process of its own; they take
    turns, and their maps are compared with upstream's in float64 first. A way that is wrong is
    printed WRONG and is never the best. Ctrl-C prints and writes what was measured until then.

    Exit codes: 0 measured; 1 a way is WRONG, nothing could be timed, or --compare found a
    regression; 2 wrong arguments or no such model; 6 a file or the report cannot be written; 130
    interrupted, 143 terminated.
    """
    from ..bench.command import Outputs, run
    from ..bench.results import Results
    from ..bench.run import Asked

    outputs = Outputs(**{k: options.pop(f"{k}_path") for k in ("csv", "json", "markdown", "plot")})
    outputs.check()
    how = {name: options.pop(name) for name in ("null_model", "traffic")}
    images, old_path = options.pop("end_to_end"), options.pop("old_path")
    old = None if old_path is None else Results.read(old_path)
    hosts = options["hosts"] or ()
    if old is not None and not (models or hosts):
        _check_nothing_else_is_said(options)
        asked = Asked.from_options(old.options)
    else:
        asked = Asked(**{**options, "models": models, "hosts": hosts})
    _check(asked, images=images, old=old, **how)
    command = ["fastbb", *sys.argv[1:]]
    sys.exit(
        run(
            asked,
            outputs=outputs,
            command=command,
            echo=echo,
            say=say,
            images=images,
            old=old,
            **how,
        )
    )


def _check_nothing_else_is_said(options: Mapping[str, Any]) -> None:
    context = click.get_current_context()
    said = [
        name
        for name in options
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    ]
    if said:
        raise click.UsageError(
            "with --compare and no MODEL the file says what is measured; name MODEL to choose"
        )


def _check(asked: Any, *, images: str | None, null_model: bool, traffic: bool, old: Any) -> None:
    """Refuses options that contradict each other."""
    if not (asked.models or asked.hosts):
        raise click.UsageError(
            "wanted a MODEL, --accelerate HOST or --compare OLD.json; `fastbb list` prints models"
        )
    alone = [name for name, value in (("--end-to-end", images), ("--traffic", traffic)) if value]
    if len(alone) == 2 or (alone and old is not None):
        raise click.UsageError(f"{alone[0]} and {(*alone, '--compare')[1]}: take one of them")
    if null_model and images is None:
        raise click.UsageError("--null-model is for --end-to-end INPUT")
    if images is not None and asked.hosts:
        raise click.UsageError("--end-to-end takes MODEL, not --accelerate HOST")
