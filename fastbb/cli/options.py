"""Types and options that several commands take."""

from __future__ import annotations

from typing import Any

import click

# of `Backbone.prepare`
MODES = ("auto", "eager", "compile", "openvino", "triton", "triton+compile")


class Size(click.ParamType):
    name = "HxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        height, _, width = str(value).lower().partition("x")
        if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
            self.fail(
                f"wanted height x width in pixels, such as 224x224, got {value!r}", param, ctx
            )
        return int(height), int(width)


class SizeOrSide(Size):
    """Height and width, or one number for a square."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        text = str(value)
        return super().convert(f"{text}x{text}" if text.isdecimal() else value, param, ctx)


class ExtractedSize(SizeOrSide):
    """A size, or the word `test`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return "test" if str(value) == "test" else super().convert(value, param, ctx)


class Batches(click.ParamType):
    name = "n,m"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in str(value).split(",")]
        if not all(part.isdecimal() and int(part) for part in parts):
            self.fail(f"wanted numbers of images such as 1,8,64, got {value!r}", param, ctx)
        return tuple(int(part) for part in parts)


class Names(click.ParamType):
    name = "a,b"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return tuple(part.strip() for part in str(value).split(",") if part.strip())


class Choices(Names):
    """Some of these words, separated by commas; each counts once."""

    def __init__(self, *choices: str) -> None:
        self._choices = choices

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        names = value if isinstance(value, tuple) else super().convert(value, param, ctx)
        for name in names:
            if name not in self._choices:
                self.fail(f"wanted some of {', '.join(self._choices)}, got {name!r}", param, ctx)
        return tuple(dict.fromkeys(names))


class Integers(click.ParamType):
    name = "i,j"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return tuple(int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"wanted whole numbers such as 1,2 or -1, got {value!r}", param, ctx)


# --dtype, the earlier name of --precision, is accepted and not shown
WITH_DTYPE = {"token_normalize_func": lambda name: "precision" if name == "dtype" else name}
OUT_INDICES = click.option(
    "--out-indices", type=Integers(), help="Which maps.  [default: the model's own]"
)
DEVICE = click.option(
    "--device", metavar="DEVICE", help="cpu, cuda or cuda:N.  [default: a GPU if any]"
)
SIZE = click.option(
    "--size",
    type=SizeOrSide(),
    metavar="HxW",
    help="Of the images; one number is a square.  [default: the model's own]",
)
RANDOM_WEIGHTS = click.option(
    "--random-weights",
    is_flag=True,
    help="Load no weights, draw random ones; a timm name or a config.json is enough.",
)
