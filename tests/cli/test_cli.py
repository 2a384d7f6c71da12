import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from fastbb.cli import main
from fastbb.extraction import open_features, pipeline

MODEL = "nano-swin-digits"


def fastbb(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_version_and_help_need_no_torch() -> None:
    program = (
        "import sys; from fastbb.cli import main\n"
        "try: main(['--version'])\n"
        "finally: assert not {'torch', 'timm', 'numpy'} & sys.modules.keys(), 'slow'"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, f"fastbb {version('fastbb')}\n"), result.stderr
    for command in ((), ("extract",), ("show",), ("list",), ("view",)):
        assert fastbb(*command, "--help").exit_code == 0
    assert "Exit codes: 0" in fastbb("extract", "-h").output


def test_python_m_fastbb_is_the_command() -> None:
    command = [sys.executable, "-m", "fastbb"]
    good, bad = (
        subprocess.run([*command, *arguments], capture_output=True, text=True)
        for arguments in (["--version"], ["no-such-command"])
    )
    assert (good.returncode, good.stdout) == (0, f"fastbb {version('fastbb')}\n"), good.stderr
    assert bad.returncode == 2 and bad.stderr.startswith("Usage: python -m fastbb "), bad.stderr


def test_the_list_of_commands_cuts_no_summary_off() -> None:
    lines = [line.split() for line in fastbb("--help").output.splitlines()]
    summaries = {words[0]: words[-1] for words in lines if words and words[0] in main.commands}
    assert summaries.keys() == main.commands.keys()
    assert all(word.endswith(".") and "..." not in word for word in summaries.values())


def test_completion_is_what_the_help_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "_FASTBB_COMPLETE=bash_source fastbb" in fastbb("--help").output
    for shell in ("bash", "zsh", "fish"):
        monkeypatch.setenv("_FASTBB_COMPLETE", f"{shell}_source")
        result = CliRunner().invoke(main, [], prog_name="fastbb")
        assert result.exit_code == 0 and "fastbb" in result.output
    monkeypatch.setenv("_FASTBB_COMPLETE", "zsh_complete")
    monkeypatch.setenv("COMP_WORDS", "fastbb tune --rand")
    monkeypatch.setenv("COMP_CWORD", "2")
    result = CliRunner().invoke(main, [], prog_name="fastbb")
    assert "--random-weights" in result.output, result.output


def test_extract_needs_a_model_for_a_first_start_only(images: Path, tmp_path: Path) -> None:
    missing = fastbb("extract", images, "--out", tmp_path / "out")
    assert missing.exit_code == 2 and "model: wanted a name or directory" in missing.stderr
    assert not (tmp_path / "out").exists()
    result = fastbb("extract", images, "--out", tmp_path / "out", "--model", MODEL)
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines()[0].startswith("running on the CPU")
    quiet = fastbb("extract", images, "--out", tmp_path / "out", "--quiet")
    assert quiet.exit_code == 0 and not quiet.stderr, quiet.stderr
    assert result.stdout.startswith(f"{tmp_path / 'out'}: 3 of 3 images have features, ")
    features = open_features(tmp_path / "out")
    assert features.ids == ["0.png", "1.png", "2.png"]
    assert features.plan["model"]["name"] == MODEL


def test_extract_options_reach_the_plan(images: Path, tmp_path: Path) -> None:
    result = fastbb(
        *("extract", images, "--out", tmp_path / "out", "--model", MODEL),
        *("--features", "maps, pooled", "--out-indices", "1,-1", "--precision", "bf16"),
        *("--batch-size", 2, "--shard-rows", 2, "--device", "cpu", "--size", "24x40"),
    )
    assert result.exit_code == 0, result.output
    assert "bundled" not in result.stderr
    features = open_features(tmp_path / "out")
    plan = features.plan
    assert plan["features"] == ["pooled", "maps"] and plan["precision"] == "bf16"
    assert (plan["batch_size"], plan["shard_rows"], plan["device"]) == (2, 2, "cpu")
    assert plan["preprocessing"]["size"] == [24, 40]
    assert len(plan["outputs"]) == 3 and features["maps.stage1"].shape[0] == 3
    assert fastbb("extract", images, "--out", tmp_path / "out").exit_code == 0
    again = fastbb("extract", images, "--out", tmp_path / "out", "--precision", "fp32")
    assert again.exit_code == 3 and "precision: 'bf16' there, 'fp32' now" in again.stderr


def failing(kind: str) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        raise {"interrupt": KeyboardInterrupt, "defect": AssertionError}[kind]

    return forward


def test_extract_failures_have_their_exit_codes(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def extract(*options: Any, out: str = "out") -> Result:
        return fastbb("extract", images, "--out", tmp_path / out, "--model", MODEL, *options)

    (images / "bad.png").write_bytes(b"")
    failed = extract()
    assert failed.exit_code == 1 and "1 failed (truncated 1)" in failed.stdout
    budget = extract("--max-error-rate", 0, out="budget")
    assert budget.exit_code == 4 and "'bad.png': truncated, the file is empty" in budget.stderr
    assert (
        "\nreason    stopped: 1 of 4 images failed, " in fastbb("show", tmp_path / "budget").stdout
    )
    (tmp_path / "file").write_text("x")
    unwritable = extract(out="file/out")
    assert unwritable.exit_code == 6 and "cannot write" in unwritable.stderr

    monkeypatch.setattr(pipeline.FeatureExtractor, "run", failing("interrupt"))
    interrupted = extract(out="interrupted")
    assert interrupted.exit_code == 130
    assert "interrupted; the same command again goes on" in interrupted.stderr
    monkeypatch.setattr(pipeline.FeatureExtractor, "run", failing("defect"))
    defect = extract(out="defect")
    assert defect.exit_code == 70 and "AssertionError" in defect.stderr
    assert defect.stderr.endswith("fastbb: this is a defect of fastbb, the lines above say where\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--size", "big"), "wanted height x width in pixels, such as 224x224, got 'big'"),
        (("--size", "0x9"), "wanted height x width in pixels"),
        (("--size", "20000x20000"), "size: wanted at most 16,777,216 pixels"),
        (("--out-indices", "1,two"), "wanted whole numbers such as 1,2 or -1, got '1,two'"),
        (("--features", "maps", "--out-indices", "1,9"), "out_indices must be valid indices"),
        (("--features", "pooled,token"), "wanted some of"),
        (("--precision", "fp64"), "is not one of 'fp32', 'bf16', 'fp16'"),
        (("--batch-size", "0"), "x>=1"),
        (("--shard-rows", "many"), "is not a valid integer"),
        (("--max-error-rate", "7"), "0<=x<=1"),
        (("--device", "gpu"), "wanted cpu, cuda or cuda:N, got 'gpu'"),
        (("--model", "nano-swin-digit"), "Did you mean nano-swin-digits"),
        (("--model", "."), "has no config.json"),
        (("--model", ""), "the name of the model is empty"),
        (("--model", "~nosuchuser/m"), "starts with the home directory of a user"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_option_values_are_usage_errors(
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no request
    model = () if "--model" in arguments else ("--model", MODEL)
    result = fastbb("extract", images, "--out", tmp_path / "out", *model, *arguments)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


def test_wrong_inputs_are_usage_errors(images: Path, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(f"path,id\n{images / '0.png'},0\n,1\n")
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ((), "Missing argument 'INPUT...'"),
        ((tmp_path / "nowhere",), "no such file or directory"),
        ((tmp_path / "empty",), "no images found"),
        ((images, tmp_path / "nowhere"), "no such file or directory"),
        ((images, tmp_path / "empty"), "no images found"),
        ((tmp_path / "list.csv",), "row 2 has no text in the column `path`"),
        (("https://me:s3cret@host.org/a.jpg?key=s3cret",), "https://host.org/a.jpg: addresses"),
    ):
        result = fastbb("extract", *arguments, "--out", tmp_path / "out", "--model", MODEL)
        assert result.exit_code == 2 and message in result.stderr
        assert "s3cret" not in result.output
        assert not (tmp_path / "out").exists()


def test_show_prints_the_plan_and_the_failures(images: Path, tmp_path: Path) -> None:
    (images / "bad.png").write_bytes(b"text")
    (images / os.fsdecode(b"caf\xe9.png")).write_bytes(b"text")
    fastbb("extract", images, "--out", tmp_path / "out", "--model", MODEL)
    result = fastbb("show", tmp_path / "out")
    assert result.exit_code == 0, result.output
    for text in (
        *("complete", MODEL, "SwinBackbone", "embedding [", "rows      5 of 5", "images/s"),
        *("failed    2", "unsupported_format   2", "'bad.png': unsupported_format, none of"),
        r"'caf\udce9.png': unsupported_format",
    ):
        assert text in result.stdout
    missing = fastbb("show", images)
    assert missing.exit_code == 2 and "no features directory" in missing.stderr


def test_control_characters_are_shown_as_escapes(images: Path, tmp_path: Path) -> None:
    out = tmp_path / os.fsdecode(b"caf\xe9\x1b[2J\xc3\xa9")
    (images / "a\nfailed    99\x1b[2J.png").write_bytes(b"text")
    result = fastbb("extract", images, "--out", out, "--model", MODEL)
    assert result.exit_code == 1, result.output
    assert r"caf\udce9\x1b[2Jé: 3 of 4 images have features" in result.stdout
    shown = fastbb("show", out).stdout
    assert r"  'a\nfailed    99\x1b[2J.png': unsupported_format" in shown and "\x1b" not in shown


def test_list_of_types_says_what_loads_each() -> None:
    lines = fastbb("list", "--type").stdout.splitlines()
    assert lines[0].split() == ["model_type", "loads", "as", "native", "needs", "for", "example"]
    assert len(lines) > 32
    rows = {words[0]: words for words in map(str.split, lines[1:])}
    assert rows["resnet"][1:4] == ["ResNetBackbone", "yes", "-"]
    assert rows["hiera"][1:4] == ["TransformersBackbone", "no", "transformers>=5.9"]
    assert len(fastbb("list", "--type", "pp_*").stdout.splitlines()) == 4
    assert fastbb("list", "--type", "no-such-*").exit_code == 2


def test_list_prints_the_names_that_match() -> None:
    result = fastbb("list", "*digits")
    assert result.exit_code == 0
    assert result.stdout.split() == ["nano-resnet-digits", "nano-swin-digits"]
    assert "resnet50" in fastbb("list").stdout.split()
    nothing = fastbb("list", "no-such-model-*")
    assert nothing.exit_code == 2 and "wanted a pattern that matches" in nothing.stderr


def test_view_writes_a_sheet_and_refuses_wrong_input(images: Path, tmp_path: Path) -> None:
    arguments = ("view", images / "1.png", "--model", MODEL, "-o", tmp_path / "sheet.png")
    result = fastbb(*arguments)
    assert result.exit_code == 0 and str(tmp_path / "sheet.png") in result.stdout, result.output
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > sheet.height > 100
    several = fastbb(
        *("view", images / "0.png", images / "2.png", "--stages", "stage2,-1"), *arguments[2:]
    )
    assert several.exit_code == 0, several.output
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height > 2 * 320
    (tmp_path / "file").touch()
    unwritable = fastbb(
        "view", images / "1.png", "--model", MODEL, "-o", tmp_path / "file" / "sheet.png"
    )
    assert unwritable.exit_code == 6 and "cannot write" in unwritable.stderr
    bad = fastbb("view", images / "none.png", "--model", MODEL)
    assert bad.exit_code == 2 and "none.png" in bad.stderr
    huge = fastbb("view", images / "1.png", "--model", MODEL, "--size", "20000x20000")
    assert huge.exit_code == 2 and "size: wanted at most 16,777,216 pixels" in huge.stderr
