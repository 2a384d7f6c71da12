"""The command `fastbb bench`: measures, prints, and writes files, also after Ctrl-C."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..engine.interruption import interruption_code
from ..extraction.layout import OutputError, write_file
from . import end_to_end, exports, markdown, plot, table
from .compare import Comparison, compare
from .pictures import check_plot
from .results import Results
from .run import Asked, new_results, run_bench, run_end_to_end, run_traffic
from .traffic import LEGEND, Traffic, breakdown, summary
from .traffic import plot as plot_traffic
from .waterfall import plot_waterfall

Line = Callable[[str], None]


@dataclass(frozen=True)
class Outputs:
    """Files that a bench writes, None for those that nobody wants."""

    csv: Path | None = None
    json: Path | None = None
    markdown: Path | None = None
    plot: Path | None = None

    def check(self) -> None:
        """Raises a ValueError for a file that could not be written after the measurement."""
        wanted = {f"--{name}": path for name, path in vars(self).items() if path is not None}
        exports.check_targets(wanted)
        if self.plot is not None:
            check_plot(self.plot)

    def write(self, results: Results, traffic: Sequence[Traffic]) -> list[str]:
        """Writes the files; returns why some could not be."""
        problems = []
        for path, write in (
            (self.csv, exports.write_csv),
            (self.json, exports.write_json),
            (self.markdown, lambda results, path: _write_markdown(results, traffic, path)),
            (self.plot, lambda results, path: _draw(results, traffic, path)),
        ):
            if path is None:
                continue
            try:
                write(results, path)
            except (OutputError, OSError, ValueError) as error:
                problems.append(str(error))
        return problems


def run(
    asked: Asked,
    *,
    outputs: Outputs,
    command: Sequence[str],
    echo: Line,
    say: Line,
    images: str | None = None,
    null_model: bool = False,
    traffic: bool = False,
    old: Results | None = None,
) -> int:
    """Runs a bench and returns the exit code of the command.

    Args:
        asked: what to measure.
        outputs: files to write.
        command: as it was typed.
        echo: prints the report.
        say: prints what is going on.
        images: measures the extraction of their features instead.
        null_model: without the model.
        traffic: counts bytes and launches instead.
        old: results to compare with.

    Raises:
        OSError, ValueError: see `run_bench`.
        OutputError: a file cannot be written; the report was printed.
    """
    results = new_results(asked, command)
    counted: list[Traffic] = []
    try:
        if traffic:
            run_traffic(asked, results, counted, say)
        elif images is not None:
            run_end_to_end(asked, results, images, null_model=null_model, say=say)
        else:
            run_bench(asked, results, old=old, say=say)
    except BaseException as error:
        if not (results.cells or results.end_to_end):
            raise
        results.interrupted = True
        # inside this handler an interruption is not raised again
        _finish(results, counted, outputs, echo, old)
        if not isinstance(error, KeyboardInterrupt):
            raise  # of a later model: what was measured is printed and written
        return interruption_code() or 130
    comparison = _finish(results, counted, outputs, echo, old)
    if results.interrupted:
        return interruption_code() or 130
    return 1 if _is_wrong(results) or (comparison is not None and _fails(comparison)) else 0


def _finish(
    results: Results,
    traffic: Sequence[Traffic],
    outputs: Outputs,
    echo: Line,
    old: Results | None,
) -> Comparison | None:
    """Writes the files, prints the report, and returns the comparison with older results."""
    comparison = None if old is None else compare(old, results)
    problems = outputs.write(results, traffic)
    parts = [_text(results, traffic), "" if comparison is None else str(comparison)]
    echo("\n\n".join(filter(None, parts)))
    if problems:
        raise OutputError("; ".join(problems))
    return comparison


def _fails(comparison: Comparison) -> bool:
    """Whether there is a regression, or nothing to judge though the hardware is the same."""
    return comparison.regressed or (comparison.same_hardware and not comparison.n_judged)


def _is_wrong(results: Results) -> bool:
    """Whether a way is wrong, or ours or upstream's failed."""
    return any(
        way.wrong is not None or (way.failed and (way.ours or way.name == cell.upstream))
        for cell in results.cells
        for way in cell.ways
    )


def _text(results: Results, traffic: Sequence[Traffic]) -> str:
    if traffic:
        return "\n\n".join(filter(None, [summary(traffic), LEGEND, *map(breakdown, traffic)]))
    return "\n\n".join([table.text(results), *map(end_to_end.text, _extractions(results))])


def _write_markdown(results: Results, traffic: Sequence[Traffic], path: Path) -> None:
    if traffic:  # its cells have no times
        parts = [markdown.markdown(replace(results, cells=[])), summary(traffic), LEGEND]
        parts += [found for found in map(breakdown, traffic) if found]
    else:
        parts = [markdown.markdown(results), *map(end_to_end.markdown, _extractions(results))]
    text = "\n\n".join(part.strip() for part in parts)
    write_file(path, f"{text}\n".encode())


def _draw(results: Results, traffic: Sequence[Traffic], path: Path) -> None:
    if traffic:
        plot_traffic(traffic, path)
    elif results.end_to_end:
        plot_waterfall(_extractions(results), path)
    else:
        plot.plot(results, path)


def _extractions(results: Results) -> list[end_to_end.EndToEnd]:
    return list(map(end_to_end.EndToEnd.from_dict, results.end_to_end))
