"""The command that measures."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from .options import DEVICE, MODES, OUT_INDICES, RANDOM_WEIGHTS, SIZE, Batches, Choices, Names
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
@SIZE
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
@OUT_INDICES
@DEVICE
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
    help="Drop ways, and name them, that compile too slowly to end in so many seconds.",
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
    """Measures backbones, beside other software.

    Speed, memory, start and errors. A cell is a model, a precision and a batch. Each way runs in a
    process of its own; they take turns, and their maps are compared with upstream's in float64
    first. A way that is wrong is printed WRONG and is never the best. Ctrl-C prints and writes what
    was measured until then.

    Exit codes: 0 measured; 1 a way is WRONG, fastbb or upstream failed, or --compare found a
    regression or nothing to compare; 2 wrong arguments or no such model; 6 a file or the report
    cannot be written; 130 interrupted, 143 terminated.
    """
    from ..bench.command import Outputs, run
    from ..bench.results import Results
    from ..bench.run import Asked
    from ..extraction.plan import DEFAULT_BATCH_SIZE

    outputs = Outputs(**{k: options.pop(f"{k}_path") for k in ("csv", "json", "markdown", "plot")})
    images, null_model, traffic, old_path = (
        options.pop(name) for name in ("end_to_end", "null_model", "traffic", "old_path")
    )
    said = _said()
    options |= {"models": models, "hosts": options["hosts"] or ()}
    if images is not None and "batches" not in said:
        options["batches"] = (DEFAULT_BATCH_SIZE,)  # that of `fastbb extract`
    kind = "--traffic" if traffic else "--end-to-end" if images is not None else None
    _check(said, kind, options, repeats=old_path is not None)
    outputs.check()
    old = None if old_path is None else Results.read(old_path)
    if old is not None and not any(way.rounds_s for cell in old.cells for way in cell.ways):
        raise click.UsageError(f"--compare {old_path}: nothing in it was timed")
    repeats = old is not None and not (models or options["hosts"])
    sys.exit(
        run(
            Asked.from_options(old.options) if old is not None and repeats else Asked(**options),
            outputs=outputs,
            command=["fastbb", *sys.argv[1:]],
            echo=echo,
            say=say,
            images=images,
            null_model=null_model,
            traffic=traffic,
            old=old,
        )
    )


def _said() -> dict[str, str]:
    """The options of the command line by parameter."""
    context = click.get_current_context()
    return {
        parameter.name: parameter.opts[0]
        for parameter in context.command.params
        if parameter.name is not None
        and isinstance(parameter, click.Option)
        and context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
    }


# parameters that say something where nothing is timed, or an extraction is
_OUTPUT = {"json_path", "markdown_path", "plot_path"}
_APPLIES = {
    "--traffic": {"batches", "size", "random_weights", "out_indices", "hosts", "traffic", *_OUTPUT},
    "--end-to-end": {
        *("batches", "precisions", "modes", "random_weights", "device", "seconds"),
        *("end_to_end", "null_model", *_OUTPUT),
    },
}
_OF_MODELS = {"against", "out_indices"}


def _check(
    said: Mapping[str, str], kind: str | None, options: Mapping[str, Any], repeats: bool
) -> None:
    """Refuses options that contradict each other, or would be ignored.

    Args:
        said: see `_said`.
        kind: the option that measures something else than cells, or None.
        options: of the bench.
        repeats: whether there is a file to compare with.
    """
    models, hosts = options["models"], options["hosts"]
    refused: list[str] = []
    why = ""
    if kind is not None:
        refused = [option for name, option in said.items() if name not in _APPLIES[kind]]
        why = f"does not go with {kind}"
    elif "null_model" in said:
        refused, why = [said["null_model"]], "is for --end-to-end INPUT"
    elif repeats and not (models or hosts):
        free = {"old_path", "csv_path", *_OUTPUT}
        refused = [option for name, option in said.items() if name not in free]
        why = "has no meaning where --compare repeats what its file measured: name MODEL to choose"
    elif hosts and not models:
        refused = [option for name, option in said.items() if name in _OF_MODELS]
        why = "is for MODEL, not for --accelerate HOST"
    if refused:
        raise click.UsageError(f"{refused[0]} {why}")
    if not (models or hosts or repeats):
        raise click.UsageError(
            "wanted a MODEL, --accelerate HOST or --compare OLD.json; `fastbb list` prints models"
        )
