"""Commands about this machine."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from .options import WITH_DTYPE
from .shell import Command, echo, say


@click.command(cls=Command, context_settings=WITH_DTYPE)
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

    report = check_ops(device, **options, progress=lambda op: say(f"checking {op}"))
    echo(str(report))
    sys.exit(1 if report.problems else 0)


@click.command(cls=Command)
@click.option("-v", "--verbose", is_flag=True, help="Also packages, ops, models and formats.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")
def doctor(verbose: bool, as_json: bool) -> None:
    """Examines what this machine can run. Problems come first, each with a remedy.

    Exit codes: 0 no problems (hints do not count); 1 something is wrong or impossible here; 6 the
    report cannot be written; 130 interrupted, 143 terminated.
    """
    from ..inspect.doctor import doctor as examine

    found = examine()
    echo(json.dumps(found.to_dict(), indent=2) if as_json else found.text(verbose=verbose))
    sys.exit(1 if found.problems else 0)
