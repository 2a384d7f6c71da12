"""Commands that extract features, and that read a features directory."""

from __future__ import annotations

import re
import sys
from typing import Any

import click

from .options import DEVICE, MODES, OUT_INDICES, ExtractedSize, Names
from .shell import Command, echo

# of a cluster, as `ray.init` takes it
_ADDRESS = re.compile(r"|auto|local|[^/\s]+:\d+|[a-z]+://.+")


def _address(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    if value is not None and not _ADDRESS.fullmatch(value):
        raise click.BadParameter(
            f"wanted auto, local, HOST:PORT or ray://HOST:PORT, got {value!r}; put --ray behind "
            "the inputs, or write --ray=ADDRESS"
        )
    return value


@click.command(cls=Command)
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option("--out", required=True, metavar="DIR", help="Where the features go.")
@click.option("--model", metavar="MODEL", help="Name or directory; needed for a first start.")
@click.option(
    "--features",
    type=Names(),
    metavar="NAME,...",
    help="embedding, cls, patch_mean, tokens, projection, pooled, maps, maps.<stage>, "
    "layer:<module>.  [default: embedding]",
)
@OUT_INDICES
@click.option(
    "--norm",
    type=click.Choice(["final", "none"]),
    help="Whether cls, patch_mean and tokens have the model's final norm.  [default: final]",
)
@click.option(
    "--normalize/--no-normalize",
    default=None,
    help="Divide vectors by their L2 norm.  [default: no]",
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16", "fp16"]),
    help="What computes.  [default: fp32]",
)
@click.option(
    "--feature-dtype",
    type=click.Choice(["fp32", "bf16", "fp16"]),
    help="What is stored.  [default: fp32; of maps, tokens and layers the precision]",
)
@click.option("--batch-size", type=click.IntRange(min=1), help="[default: 32]")
@DEVICE
@click.option(
    "--size",
    type=ExtractedSize(),
    metavar="HxW",
    help="Resize every image to this instead of the model's own; test: a timm model's test size.",
)
@click.option(
    "--mode",
    type=click.Choice(MODES),
    help="How the model runs; auto compiles where that pays for so many images.  [default: auto]",
)
@click.option(
    "--shard-rows",
    type=click.IntRange(min=1),
    help="Images per shard, all that an interruption can lose.  [default: at most 4096]",
)
@click.option("--limit", type=click.IntRange(min=1), help="At most so many images in DIR.")
@click.option("--update", is_flag=True, help="Also the images that DIR does not have yet.")
@click.option("--retry-failed", is_flag=True, help="Also the images that failed, once more.")
@click.option("--follow-symlinks", is_flag=True, help="Follow symbolic links in directories.")
@click.option(
    "--max-error-rate",
    type=click.FloatRange(0, 1),
    default=0.05,
    show_default=True,
    help="Stop when more than this share of the images fails, from the 20th image on.",
)
@click.option(
    "--workers", type=click.IntRange(min=1), help="Number of CPU processes that share the work."
)
@click.option("--devices", metavar="all|0,1", help="GPUs that share the work, a process for each.")
@click.option(
    "--ray",
    is_flag=False,
    flag_value="",
    metavar="[ADDRESS]",
    callback=_address,
    help="Share the work on a Ray cluster.  [default: that of RAY_ADDRESS or of this machine]",
)
@click.option(
    "--num-gpus-per-worker",
    type=click.FloatRange(min=0),
    help="GPUs of a worker of Ray, may be a part of one.  [default: 1 where there are GPUs]",
)
@click.option(
    "--min-workers",
    type=click.IntRange(min=1),
    help="Workers of Ray that have to be ready to begin.  [default: 1]",
)
@click.option(
    "--max-workers",
    type=click.IntRange(min=1),
    help="Workers of Ray at most.  [default: as many as the cluster has room for]",
)
@click.option(
    "--record-crashes",
    is_flag=True,
    help="Images of a shard that ended its worker three times become failed rows (with --workers, "
    "--devices or --ray).",
)
@click.option(
    "--shard-index",
    metavar="I/N",
    help="The I-th of N commands, from 0, that share the work: every N-th shard.",
)
@click.option("--quiet", is_flag=True, help="Show no progress.")
def extract(
    inputs: tuple[str, ...],
    model: str | None,
    ray: str | None,
    num_gpus_per_worker: float | None,
    min_workers: int | None,
    max_workers: int | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Stores the features of images. The same command again resumes.

    INPUT is a directory, a glob in quotes, an image, a list (.txt, .csv, .tsv, .jsonl, .parquet;
    one image per row) or an archive (.tar, .zip; sets by a directory, a glob or braces).

    A resume takes what is not said from DIR. What would change values is refused.

    Exit codes: 0 every image has features; 1 finished, some images failed, could not be listed or
    are of a shard that ended its workers; 2 wrong arguments; 3 DIR holds features of another plan;
    4 too many images failed; 5 another process uses DIR; 6 DIR or the report cannot be written, or
    the disk is full; 7 workers end before they have the model; 70 a defect of fastbb; 130
    interrupted (SIGINT), 143 terminated (SIGTERM).
    """
    from ..extraction import RayOptions
    from ..extraction import extract as run

    given: dict[str, Any] = {
        "num_gpus_per_worker": num_gpus_per_worker,
        "min_workers": min_workers,
        "max_workers": max_workers,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if given and ray is None:
        raise click.UsageError(f"--{min(given).replace('_', '-')}: it is for --ray")
    cluster = None if ray is None else RayOptions(ray or None, **given)
    report = run(model, inputs, progress=not quiet, ray=cluster, **options)
    echo(str(report))
    sys.exit(1 if report.errors or report.unreadable_directories or report.left else 0)


@click.command(cls=Command)
@click.argument("directory", metavar="FEATURES_DIR")
def show(directory: str) -> None:
    """Shows what a features directory holds. Plan, rows, failures, speed, why a run stopped.

    Exit codes: 0 shown; 2 no features directory; 3 its plan or a shard is damaged; 6 the report
    cannot be written; 130 interrupted, 143 terminated.
    """
    from ..extraction import open_features

    echo(open_features(directory).describe())


@click.command(cls=Command)
@click.argument("directory", metavar="FEATURES_DIR")
@click.option(
    "-o",
    "--out",
    type=click.Path(dir_okay=False),
    default="report.html",
    show_default=True,
    help="The page to write.",
)
def report(directory: str, out: str) -> None:
    """Writes a page about a features directory.

    Runs, speed, failures, a scatter of the features and nearest neighbours as thumbnails; the page
    needs no other file.

    Exit codes: 0 written; 2 no features directory, or something else is at the place to write; 3
    its plan or a shard is damaged; 6 the page cannot be written; 130 interrupted, 143 terminated.
    """
    from ..inspect.features_report import report as write_report

    echo(f"wrote {write_report(directory, out)}")


@click.command(cls=Command)
@click.argument("directory", metavar="FEATURES_DIR")
@click.option(
    "--to",
    type=click.Choice(["parquet", "npy", "faiss"]),
    required=True,
    help="parquet: one file of all rows; npy: arrays and rows.jsonl; faiss: exact indices.",
)
@click.option(
    "-o",
    "--out",
    type=click.Path(),
    help="The file or directory to write.  [default: beside FEATURES_DIR]",
)
@click.option("--features", type=Names(), metavar="NAME,...", help="Which.  [default: all]")
@click.option(
    "--metric",
    type=click.Choice(["cosine", "dot", "l2"]),
    help="Of a faiss index.  [default: cosine]",
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier export.")
def export(directory: str, to: Any, **options: Any) -> None:
    """Writes features to files that other programs read.

    A killed export leaves the earlier files or none; the same command again does it.

    Exit codes: 0 written; 2 wrong arguments, no features directory, or something is at the place to
    write; 3 its plan or a shard is damaged; 6 the files cannot be written; 130 interrupted, 143
    terminated.
    """
    from ..extraction import export_features

    echo(str(export_features(directory, to, **options)))


@click.command(cls=Command)
@click.argument("directory", metavar="FEATURES_DIR")
def verify(directory: str) -> None:
    """Reads a features directory whole, and compares its files.

    Hashes, rows, counts, shapes.

    Exit codes: 0 complete and undamaged; 1 some files are damaged or missing, each with what to do;
    2 no features directory; 6 the report cannot be written; 130 interrupted, 143 terminated.
    """
    from ..extraction import verify_features

    found = verify_features(directory)
    echo(str(found))
    sys.exit(0 if found.passed else 1)
