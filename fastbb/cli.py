"""The `fastbb` command: arguments in, exit codes out."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import click

from .engine.interruption import ending_on_signals, interruption_code, interruption_word

ARCHITECTURES = ("80", "86", "89", "90", "100", "120", "gfx90a", "gfx942")  # of our kernels
MODES = ("auto", "eager", "compile", "triton", "triton+compile")  # of `Backbone.prepare`
_USAGE = 2
_OUTPUT = 6
_DEFECT = 70
_INTERRUPTED = 130


class _CannotPrintError(Exception):
    """The report of a command cannot be written to its standard output."""

    exit_code = _OUTPUT


class _Command(click.Command):
    """A command that also survives an output to which its help cannot be written."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        try:
            return super().make_context(*args, **kwargs)
        except OSError as error:  # nothing but the help is printed here
            _discard_output()
            if error.errno == errno.EPIPE:
                sys.exit(0)
            _say(f"fastbb: {_not_printed(error)}")
            sys.exit(_OUTPUT)


class _Commands(_Command, click.Group):
    """The commands, with one rule for signals, errors and exit codes."""

    command_class = _Command

    def main(self, *args: Any, **kwargs: Any) -> Any:
        _fill_missing_streams()
        with ending_on_signals(), warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                sys.exit(super().main(*args, **{**kwargs, "standalone_mode": False}))
            except click.ClickException as error:
                with contextlib.suppress(OSError):
                    error.show()
                sys.exit(interruption_code() or error.exit_code)
            except click.Abort:  # how click passes an interruption on
                sys.exit(interruption_code() or _INTERRUPTED)
            except BaseException:
                code = interruption_code()
                if code is None:
                    raise
                sys.exit(code)  # whatever the interruption was turned into

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except (Exception, KeyboardInterrupt) as error:
            found, (code, message) = error, _judge(error)
        if code == _DEFECT:
            _say("".join(traceback.format_exception(found)).rstrip())
        _say(f"fastbb: {message}")
        sys.exit(code)


class _Size(click.ParamType):
    name = "HxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        height, _, width = str(value).lower().partition("x")
        if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
            self.fail(
                f"wanted height x width in pixels, such as 224x224, got {value!r}", param, ctx
            )
        return int(height), int(width)


class _SizeOrSide(_Size):
    """Height and width, or one number for a square."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        text = str(value)
        return super().convert(f"{text}x{text}" if text.isdecimal() else value, param, ctx)


class _ExtractedSize(_SizeOrSide):
    """A size, or the word `test`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return "test" if str(value) == "test" else super().convert(value, param, ctx)


class _Batches(click.ParamType):
    name = "n,m"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        parts = [part.strip() for part in str(value).split(",")]
        if not all(part.isdecimal() and int(part) for part in parts):
            self.fail(f"wanted numbers of images such as 1,8,64, got {value!r}", param, ctx)
        return tuple(int(part) for part in parts)


class _Names(click.ParamType):
    name = "a,b"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return tuple(part.strip() for part in str(value).split(",") if part.strip())


class _Integers(click.ParamType):
    name = "i,j"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return tuple(int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"wanted whole numbers such as 1,2 or -1, got {value!r}", param, ctx)


# --dtype, the earlier name of --precision, is accepted and not shown
_WITH_DTYPE = {"token_normalize_func": lambda name: "precision" if name == "dtype" else name}
_RANDOM_WEIGHTS = click.option(
    "--random-weights",
    is_flag=True,
    help="Load no weights, draw random ones; a timm name or a config.json is enough.",
)


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog='Completion in bash: eval "$(_FASTBB_COMPLETE=bash_source fastbb)"; in zsh and fish '
    "with zsh_source and fish_source.",
)
@click.version_option(package_name="fastbb", message="fastbb %(version)s")
def main() -> None:
    """Vision backbones, fast, computing exactly what their own libraries compute."""


@main.command()
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option("--out", required=True, metavar="DIR", help="Where the features go.")
@click.option("--model", metavar="MODEL", help="Name or directory; needed for a first start.")
@click.option(
    "--features",
    type=_Names(),
    metavar="NAME,...",
    help="embedding, cls, patch_mean, tokens, projection, pooled, maps, maps.<stage>, "
    "layer:<module>.  [default: embedding]",
)
@click.option("--out-indices", type=_Integers(), help="Which maps.  [default: the model's own]")
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
@click.option("--device", metavar="DEVICE", help="cpu, cuda or cuda:N.  [default: a GPU if any]")
@click.option(
    "--size",
    type=_ExtractedSize(),
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
    help="Images per shard, all that an interruption can lose.  [default: 4096, fewer for maps]",
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
@click.option("--quiet", is_flag=True, help="Show no progress.")
def extract(inputs: tuple[str, ...], model: str | None, quiet: bool, **options: Any) -> None:
    """Stores the features of images. The same command again resumes.

    INPUT is a directory, a glob in quotes, an image, a list (.txt, .csv, .tsv, .jsonl, .parquet;
    one image per row) or an archive (.tar, .zip; sets by a directory, a glob or braces).

    A resume takes what is not said from DIR. What would change values is refused.

    Exit codes: 0 every image has features; 1 finished, some images failed or could not be listed;
    2 wrong arguments; 3 DIR holds features of another plan; 4 too many images failed; 5 another
    process uses DIR; 6 DIR or the report cannot be written, or the disk is full; 70 a defect of
    fastbb; 130 interrupted (SIGINT), 143 terminated (SIGTERM).
    """
    from .extraction import extract as run

    report = run(model, inputs, progress=not quiet, **options)
    _echo(str(report))
    sys.exit(1 if report.errors or report.unreadable_directories else 0)


@main.command()
@click.argument("directory", metavar="FEATURES_DIR")
def show(directory: str) -> None:
    """Shows what a features directory holds. Plan, rows, failures, speed, why a run stopped.

    Exit codes: 0 shown; 2 no features directory; 6 the report cannot be written; 130 interrupted,
    143 terminated.
    """
    from .extraction import open_features

    _echo(open_features(directory).describe())


@main.command()
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

    Exit codes: 0 written; 2 no features directory; 6 the page cannot be written; 130 interrupted,
    143 terminated.
    """
    from .inspect.features_report import report as write_report

    _echo(f"wrote {write_report(directory, out)}")


@main.command(name="list")
@click.argument("filter", default="")
def list_models(filter: str) -> None:
    """Lists the names of models. All, or those that match FILTER, such as 'swin*'.

    Exit codes: 0 listed; 2 no name matches; 6 the list cannot be written; 130 interrupted,
    143 terminated.
    """
    from .auto import list_backbones

    names = list_backbones(filter)
    if not names:
        raise click.BadParameter(
            f"wanted a pattern that matches a name, such as '*swin*', got {filter!r}",
            param_hint="FILTER",
        )
    _echo("\n".join(names))


@main.command()
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
    "--size", type=_Size(), metavar="HxW", help="What the model sees.  [default: the image's shape]"
)
@click.option(
    "--stages",
    type=_Names(),
    help="Names or indices.  [default: all after the stem; four of more than four of one shape]",
)
def view(images: tuple[str, ...], model: str, out: str, **options: Any) -> None:
    """Draws what every stage of a model makes of images.

    Each image is a row. The channels of a map are drawn as colours by their three principal
    components.

    Exit codes: 0 drawn; 2 wrong arguments or no such model; 6 the picture or the report cannot be
    written; 130 interrupted, 143 terminated.
    """
    from .inspect.view import view as write_view

    _echo(f"wrote {write_view(images, model, out, **options)}")


@main.command(name="verify-model")
@click.argument("name", metavar="MODEL")
@_RANDOM_WEIGHTS
@click.option(
    "--size",
    "sizes",
    type=_Size(),
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
@click.option("--device", metavar="DEVICE", help="cpu, cuda or cuda:N.  [default: a GPU if any]")
@click.option("--out-indices", type=_Integers(), help="Which maps.  [default: the model's own]")
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
    from .inspect.verify import verify_model as run

    report = run(name, **options)
    _echo(str(report))
    sys.exit(0 if report.passed else 1)


@main.command(context_settings=_WITH_DTYPE)
@click.option("--device", metavar="DEVICE", help="cuda or cuda:N.  [default: a GPU if any]")
@click.option("--op", "ops", multiple=True, help="Name, may be repeated.  [default: all]")
@click.option(
    "--precision",
    "dtypes",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    multiple=True,
    help="May be repeated.  [default: all]",
)
@click.option("--again", is_flag=True, help="Also kernels that an earlier check turned off.")
def check(device: str | None, **options: Any) -> None:
    """Tries the kernels of every op on the GPU.

    It compares small cases with PyTorch's own ops there. What it finds is remembered, as what the
    first launch of each compiled kernel shows.

    Exit codes: 0 every kernel is right, or there is no GPU; 1 some are not, and are not used;
    2 wrong arguments; 6 the report cannot be written; 130 interrupted, 143 terminated.
    """
    from fastbb_kernels.device_report import check_ops

    report = check_ops(device, **options, progress=lambda op: _say(f"checking {op}"))
    _echo(str(report))
    sys.exit(1 if report.problems else 0)


@main.command(context_settings=_WITH_DTYPE)
@click.argument("name", metavar="MODEL")
@_RANDOM_WEIGHTS
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
    type=_Size(),
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
@click.option("--device", metavar="DEVICE", help="cpu, cuda or cuda:N.  [default: a GPU if any]")
@click.option("--out-indices", type=_Integers(), help="Which maps.  [default: the model's own]")
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
    from .inspect.tune import remembered_in, tune_model

    warnings.simplefilter("ignore", UserWarning)  # the results say it
    progress = lambda text: _say(f"measuring {text}")  # noqa: E731
    results = []
    for tuned in tune_model(name, device=device, progress=progress, **options):
        _echo(str(tuned))
        results.append(tuned)
    _echo(remembered_in(device, results))


@main.command()
@click.argument("name", metavar="MODEL")
@click.option(
    "--batch",
    "batches",
    type=_Batches(),
    default="1,8,64",
    show_default=True,
    help="Images per forward pass.",
)
@click.option(
    "--size",
    type=_SizeOrSide(),
    metavar="HxW",
    help="Of the images; one number is a square.  [default: the model's own]",
)
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
@click.option("--out-indices", type=_Integers(), help="Which maps.  [default: the model's own]")
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
        from .inspect.warmup import warm_up
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
    _echo(str(report))
    sys.exit(1 if report.problems else 0)


@main.command()
@click.option("-v", "--verbose", is_flag=True, help="Also packages, ops, models and formats.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")
def doctor(verbose: bool, as_json: bool) -> None:
    """Examines what this machine can run. Problems come first, each with a remedy.

    Exit codes: 0 no problems (hints do not count); 1 something is wrong or impossible here; 6 the
    report cannot be written; 130 interrupted, 143 terminated.
    """
    from .inspect.doctor import doctor as examine

    found = examine()
    _echo(json.dumps(found.to_dict(), indent=2) if as_json else found.text(verbose=verbose))
    sys.exit(1 if found.problems else 0)


def _counting(bar: Any, total: int) -> Callable[[object], None]:
    """Gives a tqdm bar its length and returns a function that advances it by one."""
    bar.reset(total)
    return lambda _: bar.update()


def _judge(error: BaseException) -> tuple[int, str]:
    """Returns the exit code for an error, and the line for the user."""
    code = interruption_code()
    if code is not None or isinstance(error, KeyboardInterrupt):
        message = interruption_word()
        if click.get_current_context().invoked_subcommand == "extract":
            message += "; the same command again goes on after the last finished shard"
        return code or _INTERRUPTED, message
    code = getattr(error, "exit_code", None)  # of an ExtractionError, which costs importing torch
    if code is None:
        code = _USAGE if isinstance(error, (ValueError, OSError)) else _DEFECT
    if code == _DEFECT:
        return code, "this is a defect of fastbb, the lines above say where"
    return code, str(error)


def _echo(text: str) -> None:
    """Prints the report of a command. A reader that has gone (EPIPE) is no error.

    Raises:
        _CannotPrintError: the output cannot be written.
    """
    try:
        click.echo(_printable(text))
    except OSError as error:
        _discard_output()
        if error.errno != errno.EPIPE:
            raise _CannotPrintError(_not_printed(error)) from error


def _show_warning(message: Warning | str, *_: Any) -> None:
    """Prints a warning without the file and line that raised it, which say nothing here."""
    _say(f"fastbb: warning: {message}")


def _say(text: str) -> None:
    """Prints a message on stderr; an error of writing it is ignored."""
    with contextlib.suppress(OSError):
        click.echo(_printable(text), err=True)


def _printable(text: str) -> str:
    """Escapes characters that cannot be encoded or that would control a terminal."""
    return "".join(c if c == "\n" or c.isprintable() else repr(c)[1:-1] for c in text)


def _not_printed(error: OSError) -> str:
    return f"cannot print to the standard output: {error.strerror}"


def _discard_output() -> None:
    """Points standard output at the null device; Python's flush at exit would fail again."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fill_missing_streams() -> None:
    """Opens the null device for a standard stream that is closed or missing.

    The next file that is opened would get the number of a closed one, and what a library writes to
    stderr would end up in that file. Libraries also write to `sys.stderr` without asking for it.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            mode = "w" if descriptor else "r"
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 -- as long as the process
