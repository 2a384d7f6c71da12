"""What all commands share: one rule for signals, errors and exit codes, and how they print."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import traceback
import warnings
from typing import Any

import click

from ..engine.explanation import printable
from ..engine.interruption import ending_on_signals, interruption_code, interruption_word

_USAGE = 2
_OUTPUT = 6
_DEFECT = 70
_INTERRUPTED = 130


class _CannotPrintError(Exception):
    """The report of a command cannot be written to its standard output."""

    exit_code = _OUTPUT


class Command(click.Command):
    """A command that also survives an output to which its help cannot be written."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        try:
            return super().make_context(*args, **kwargs)
        except OSError as error:  # nothing but the help is printed here
            _discard_output()
            if error.errno == errno.EPIPE:
                sys.exit(0)
            say(f"fastbb: {_not_printed(error)}")
            sys.exit(_OUTPUT)


class Commands(Command, click.Group):
    """The commands, with one rule for signals, errors and exit codes."""

    command_class = Command

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
            say("".join(traceback.format_exception(found)).rstrip())
        say(f"fastbb: {message}")
        sys.exit(code)


def _judge(error: BaseException) -> tuple[int, str]:
    """Returns the exit code for an error, and the line for the user."""
    code = interruption_code()
    is_extract = click.get_current_context().invoked_subcommand == "extract"
    if code is not None or isinstance(error, KeyboardInterrupt):
        resumes = "; the same command again goes on after the last finished shard"
        return code or _INTERRUPTED, interruption_word() + resumes * is_extract
    code = getattr(error, "exit_code", None)  # of an ExtractionError, which costs importing torch
    if code is None:
        code = _USAGE if isinstance(error, (ValueError, OSError)) else _DEFECT
    if code == _DEFECT:
        return code, "this is a defect of fastbb, the lines above say where"
    has_shards = is_extract and code == _OUTPUT and not isinstance(error, _CannotPrintError)
    return code, str(error) + ", finished shards are kept" * has_shards


def echo(text: str) -> None:
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
    say(f"fastbb: warning: {message}")


def say(text: str) -> None:
    """Prints a message on stderr; an error of writing it is ignored."""
    with contextlib.suppress(OSError):
        click.echo(_printable(text), err=True)


def _printable(text: str) -> str:
    return "\n".join(map(printable, text.split("\n")))


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
