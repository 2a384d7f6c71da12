"""Tables of a bench, in text and in Markdown."""

import re

import pytest
from bench_results import UPSTREAM, made_cell, made_host, made_results

from fastbb.bench import markdown as markdown_module
from fastbb.bench.results import Cell, Results, Way
from fastbb.bench.table import text


def markdown(results: Results) -> str:
    """The Markdown of results with its marks as they are shown."""
    return markdown_module.markdown(results).replace(r"\[", "[").replace(r"\]", "]")


def test_marks_in_a_row_are_no_link() -> None:
    cell = made_cell()
    cell.ways[1].note, cell.ways[1].wrong = "a note", "wrong"
    text = markdown_module.markdown(made_results(cell))
    assert r"\[1\]" in text and "[1]" not in text


def lines_of(results: Results) -> list[str]:
    return text(results).splitlines()


def line_of(results: Results, way: str) -> str:
    return next(line for line in lines_of(results) if line.startswith(f"  {way}"))


def cell_with_every_kind() -> Cell:
    cell = made_cell(batch=4)
    cell.asked_batch = 64
    cell.ways[1].wrong = "stage4: error 0.02, allowed 0.0004"
    cell.ways[2].note = "some calls ran eager"
    cell.ways.append(Way("ONNX Runtime", reason="not in bf16"))
    cell.notes.append("The GPU throttled in 2 rounds: power.")
    return cell


def test_cells_share_one_table_with_machine_and_footnotes() -> None:
    results = made_results(cell_with_every_kind(), made_cell("resnet50", "bf16", 8))
    lines = lines_of(results)
    assert lines[0] == "AMD EPYC, AVX512, avx512_bf16, 2 threads of 2 cores"
    assert "torch 2.14.1" in lines[1] and lines[2].startswith("2026-11-30")
    header = lines[4].split()
    assert header == [
        "images/s",
        "ratio",
        "p50",
        "p90",
        "p99",
        "memory",
        "cold",
        "start",
        "compile",
        "error",
    ]
    assert "microsoft/swin-tiny-patch4-window7-224, fp32, batch 64 (ran 4), 224x224" in lines
    assert "resnet50, bf16, batch 8, 224x224" in lines
    rows = [line for line in lines if re.match(r"  (fastbb eager|transformers eager) ", line)]
    assert {len(line) for line in rows} == {len(lines[4])}  # columns of both cells are aligned
    assert max(map(len, lines)) <= 120
    assert "  Batch 4 instead of 64: memory ran out." in lines
    assert "  The GPU throttled in 2 rounds: power." in lines


def test_wrong_way_has_no_speed_and_is_never_the_best() -> None:
    cell = cell_with_every_kind()
    cell.ways[1].rounds_s = [[1e-6]] * 10
    results = made_results(cell)
    wrong = line_of(results, "OpenVINO").split()
    assert wrong[:3] == ["OpenVINO", "WRONG", "[1]"] and wrong[-1] == "1.2e-06"
    assert "ms" not in wrong
    assert line_of(results, "fastbb compiled *")
    assert "[1] OpenVINO: stage4: error 0.02, allowed 0.0004" in lines_of(results)


def test_way_without_times_has_a_footnote() -> None:
    results = made_results(cell_with_every_kind())
    assert line_of(results, "ONNX Runtime").split() == ["ONNX", "Runtime", "-", "[3]"]
    assert line_of(results, "fastbb eager [2]")
    assert "[2] fastbb eager: some calls ran eager" in lines_of(results)
    assert "[3] ONNX Runtime: not in bf16" in lines_of(results)
    results.cells[0].ways[-1] = Way("ONNX Runtime")  # interrupted before its turn
    assert "[3] ONNX Runtime: was not measured" in lines_of(results)


@pytest.mark.parametrize(
    ("speeds", "n_rounds", "sentence"),
    [
        ({"fastbb auto": 1.2}, 10, r"fastbb auto is 1.\d\d \(.*\) times as fast as .*: faster, b"),
        ({"fastbb auto": 0.8}, 10, r"fastbb auto is 0.\d\d \(.*\) times as fast as .*: slower, b"),
        ({"fastbb auto": 1.0}, 10, r"fastbb auto and .* differ by less than the noise: \d"),
        ({"fastbb auto": 1.2}, 2, r"fastbb auto is 1.\d\d times .*; too few rounds to tell"),
        ({"timm eager": 1.2}, 10, r"No comparison: no fastbb way has times of a right result"),
    ],
    ids=["faster", "slower", "noise", "few-rounds", "none-of-ours"],
)
def test_each_cell_has_a_sentence(speeds: dict[str, float], n_rounds: int, sentence: str) -> None:
    cell = made_cell(speeds={UPSTREAM: 1.0, **speeds}, n_rounds=n_rounds)
    assert re.search(sentence, text(made_results(cell)))


def test_host_has_columns_for_its_backbone() -> None:
    results = made_results(made_host())
    assert "inside" in lines_of(results)[4] and "ratio inside" in lines_of(results)[4]
    assert " 60 % " in line_of(results, UPSTREAM)
    assert re.search(r"55 %  1\.2\d \(1\.\d\d-1\.\d\d\)", line_of(results, "fastbb auto *"))
    assert "inside" not in text(made_results(made_cell()))
    assert "compile" not in lines_of(results)[4]  # nothing compiles


def test_markdown_of_hosts_has_their_traffic_in_a_column() -> None:
    cells = [made_host(), made_host(), made_host()]
    for number, cell in enumerate(cells):
        cell.model = f"model{number}"
    cells[0].traffic = {
        UPSTREAM: {"bytes": 230_000_000, "launches": 383},
        "fastbb.accelerate": {"bytes": 90_000_000, "launches": 61},
    }
    cells[1].traffic = {"fastbb.accelerate": {"reason": "accelerate() replaces nothing in it"}}
    page = markdown(made_results(*cells))
    (hosts,) = [table for table in tables_of(page) if table[0].startswith("| host ")]
    assert hosts[0].endswith("| GPU traffic (counted), launches |")
    assert hosts[2].endswith("| 230 MB -> 90 MB, 383 -> 61 |")
    assert hosts[3].endswith("| - [1] |") and hosts[4].endswith("|  |")
    reason = "fastbb.accelerate: accelerate() replaces nothing in it"
    assert f"* [1] model1, {reason}" in page
    assert "traffic" not in markdown(made_results(made_host())) + text(made_results(*cells))


def test_markdown_of_hosts_says_whose_notes_are_whose() -> None:
    cells = [made_host(), made_host(seed=1)]
    cells[1].model = "UperNet|x"
    for cell in cells:
        cell.ways[1].note = "fastbb runs backbone"
        cell.notes.append("outputs jump")
    page = markdown(made_results(*cells))
    for number, name in enumerate(("MaskFormer", r"UperNet\|x"), 1):
        assert f"* [{number}] {name}, fastbb auto: fastbb runs backbone" in page
        assert f"* {name}, bf16, batch 1: outputs jump" in page
        assert f"| fastbb auto [{number}] |" in page


def test_halved_batches_are_told_apart() -> None:
    halved = made_cell(batch=4)
    halved.asked_batch = 8
    speeds = tables_of(markdown(made_results(made_cell(batch=4), halved)))[1]
    assert speeds[0] == "| images/s, 224x224 | fp32, batch 4 | fp32, batch 8 (ran 4) |"


def test_results_without_cells_or_environment_are_shown() -> None:
    assert text(Results("fastbb bench", {}, interrupted=True)).startswith("Interrupted")
    assert markdown(Results("fastbb bench", {})).startswith("| command | `fastbb bench` |")
    lone = made_cell(speeds={"fastbb auto": 1.0})  # upstream is not even listed
    assert "-" in text(Results("fastbb bench", {}, cells=[lone]))


def test_text_of_others_cannot_break_lines_or_markup() -> None:
    cell = cell_with_every_kind()
    cell.ways[1].wrong = "a\x1b[31m\nb | <script>"
    assert "[1] OpenVINO: a\\x1b[31m\\nb | <script>" in text(made_results(cell))
    assert "a\\x1b[31m\\nb \\| &lt;script&gt;" in markdown(made_results(cell))


def tables_of(page: str) -> list[list[str]]:
    blocks = [block.splitlines() for block in page.split("\n\n")]
    return [block for block in blocks if block[0].startswith("|")]


def test_markdown_has_a_table_for_each_model() -> None:
    cells = [cell_with_every_kind(), made_cell("resnet50"), made_cell(batch=8), made_host()]
    page = markdown(made_results(*cells))
    run, speeds, details, *_ = tables_of(page)
    assert run[0] == "| command | `fastbb bench swin --batch 1,8` |"
    assert [row.split(" | ")[0] for row in run[2:]] == ["| hardware", "| date", "| versions"]
    assert speeds[0] == "| images/s, 224x224 | fp32, batch 64 (ran 4) | fp32, batch 8 |"
    assert re.fullmatch(r"\| OpenVINO \| WRONG \[1\] \| \d+\.\d \|", speeds[3])
    assert re.fullmatch(r"\| fastbb compiled \| \*\*\d+\.\d\*\* \| \*\*\d+\.\d\*\* \|", speeds[5])
    assert re.fullmatch(r"\| ONNX Runtime \| - \[3\] \|  \|", speeds[6])
    assert speeds[7].startswith("| fastbb's best / best of the others | 1.")
    assert details[0].startswith("| cell | way | ratio | p50 | p90 | p99 | memory | cold start |")
    assert page.count("## microsoft/swin-tiny") == 1 and page.count("## resnet50") == 1
    assert "| MaskFormer | 800x1088 | 1.1" in page and "| 60 % -> 55 % |" in page
    assert "* fp32, batch 64 (ran 4): Batch 4 instead of 64: memory ran out." in page
    for table in tables_of(page):
        assert len({row.replace("\\|", "").count("|") for row in table}) == 1


def test_tables_say_how_fast_ours_is_without_openvino() -> None:
    speeds = {UPSTREAM: 1.0, "OpenVINO": 2.0, "fastbb eager": 1.5, "fastbb openvino": 2.1}
    results = made_results(made_cell(speeds=speeds), made_cell(batch=8))
    _, rows, *_ = tables_of(markdown(results))
    assert rows[-2].startswith("| fastbb's best / best of the others | 1.")
    assert rows[-1].startswith("| the same without fastbb's OpenVINO | 0.7")
    said = [line.strip() for line in text(results).splitlines()]
    assert any(line.startswith("fastbb openvino is 1.") for line in said)
    alone = [line for line in said if line.startswith("Without fastbb's OpenVINO: ")]
    assert len(alone) == 1 and "fastbb eager is 0.7" in alone[0]


def test_markdown_of_a_host_that_fails_has_the_reason() -> None:
    cell = made_host()
    cell.ways[1].rounds_s, cell.ways[1].reason = [], "no such op"
    page = markdown(made_results(cell))
    assert "| MaskFormer | 800x1088 | - [1] | - | - |" in page
    assert "* [1] MaskFormer, fastbb auto: no such op" in page
