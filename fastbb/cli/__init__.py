"""The `fastbb` command: arguments in, exit codes out."""

from __future__ import annotations

import click

from . import bench, features, machine, models
from .shell import Commands


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog='Completion in bash: eval "$(_FASTBB_COMPLETE=bash_source fastbb)"; in zsh and fish '
    "with zsh_source and fish_source.",
)
@click.version_option(package_name="fastbb", message="fastbb %(version)s")
def main() -> None:
    """Vision backbones, fast, computing exactly what their own libraries compute."""


for room in (bench, features, machine, models):
    for command in vars(room).values():
        if isinstance(command, click.Command):
            main.add_command(command)
