"""Files of a bench: timm's columns, JSON that comes back, and targets that cannot be written."""

import csv
import json
from pathlib import Path

import pytest
from bench_results import made_cell, made_host, made_results

from fastbb.bench.exports import check_targets, write_csv, write_json
from fastbb.bench.results import Results, Way
from fastbb.extraction.layout import OutputError

# of timm 1.0's benchmark.py and its published results
TIMM = (
    "model,infer_img_size,infer_samples_per_sec,infer_step_time,infer_batch_size,param_count,"
    "infer_gmacs,infer_macts"
)


def rows_of(results: Results, path: Path) -> list[dict[str, str]]:
    write_csv(results, path)
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_csv_begins_with_the_columns_of_timm_in_its_units(tmp_path: Path) -> None:
    cell = made_cell(batch=8)
    cell.size = (192, 256)
    cell.ways[0].rounds_s = [[0.5, 0.1234567, 0.1]]
    rows = rows_of(made_results(cell, made_host()), tmp_path / "a.csv")
    header = (tmp_path / "a.csv").read_text().splitlines()[0]
    assert header.startswith(f"{TIMM},fb_way,") and "traffic" not in header
    assert len(rows) == 4 + 2
    timm = [rows[0][name] for name in TIMM.split(",")]
    assert timm == [cell.model, "256", "64.8", "123.457", "8", "27.52", "4.49", "17.05"]
    assert rows[0]["fb_height"] == "192" and rows[0]["fb_p99_ms"] == "492.469"
    assert rows[0]["fb_upstream"] == "true" and rows[0]["fb_ratio"] == "1.0"
    assert rows[-1]["fb_kind"] == "host" and rows[-1]["fb_inside_share"] == "0.55"


def test_csv_has_intervals_and_the_machine(tmp_path: Path) -> None:
    row = rows_of(made_results(made_cell()), tmp_path / "a.csv")[3]
    assert row["fb_way"] == "fastbb compiled" and row["fb_ours"] == "true"
    assert float(row["fb_ratio_low"]) < float(row["fb_ratio"]) < float(row["fb_ratio_high"])
    assert row["fb_verdict"] == "faster"
    assert (row["fb_rounds"], row["fb_calls"]) == ("10", "50")
    assert (row["fb_device"], row["fb_threads"], row["fb_torch"]) == ("AMD EPYC", "2", "2.14.1")
    assert row["fb_date"].startswith("2026-11-30")


def test_csv_has_no_times_of_wrong_ways(tmp_path: Path) -> None:
    cell = made_cell()
    cell.ways[1].wrong = 'stage4 is off, "much"\nreally'
    cell.ways.append(Way("ONNX Runtime", reason="not here"))
    rows = rows_of(made_results(cell), tmp_path / "a.csv")
    wrong, missing = rows[1], rows[-1]
    assert wrong["fb_wrong"] == cell.ways[1].wrong and wrong["fb_error"] == "1.2e-06"
    assert missing["fb_reason"] == "not here" and missing["fb_wrong"] == ""
    for row in (wrong, missing):
        times = ("infer_samples_per_sec", "infer_step_time", "fb_p50_ms", "fb_ratio")
        assert {row[name] for name in times} == {""}


def test_json_comes_back_and_is_strict(tmp_path: Path) -> None:
    cell = made_cell()
    cell.ways[1].error = float("inf")
    cell.ways[1].errors = {"stage1": float("inf")}
    results = made_results(cell, made_host())
    write_json(results, tmp_path / "a.json")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse)
    assert Results.read(tmp_path / "a.json") == results
    cell.ways[1].error = float("nan")
    write_json(results, tmp_path / "a.json")
    assert Results.read(tmp_path / "a.json").cells[0].ways[1].error is None


def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    results = made_results(made_cell())
    for write in (write_csv, write_json):
        with pytest.raises(OutputError, match="cannot write"):
            write(results, tmp_path / "none" / "a")


def test_targets_that_can_be_written_pass(tmp_path: Path) -> None:
    there = tmp_path / "there.csv"
    there.write_text("old")
    check_targets({"--csv": there, "--json": tmp_path / "new.json", "--plot": "new.png"})
    assert there.read_text() == "old" and not (tmp_path / "new.json").exists()


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("none/a.csv", "--csv {path}: there is no directory {parent}; make it first"),
        ("folder", "--csv {path}: is a directory; give a file in it"),
        ("file/a.csv", "--csv {path}: there is no directory {parent}"),
        ("pipe", "--csv {path}: is no regular file"),
    ],
)
def test_targets_that_cannot_be_written_are_errors(path: str, problem: str, tmp_path: Path) -> None:
    import os

    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    target = tmp_path / path
    with pytest.raises(ValueError) as caught:
        check_targets({"--csv": target})
    assert str(caught.value).startswith(problem.format(path=target, parent=target.parent))


def test_directory_without_permission_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(ValueError, match="--json .*cannot be written; give another path"):
        check_targets({"--json": tmp_path / "a.json"})


def test_empty_and_equal_targets_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--csv: wanted a path of a file, got ''"):
        check_targets({"--csv": ""})
    with pytest.raises(ValueError, match="--json .*: --csv writes the same file"):
        check_targets({"--csv": tmp_path / "a", "--json": tmp_path / "." / "a"})
