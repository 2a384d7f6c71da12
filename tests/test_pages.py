"""README.md and docs/: Python blocks run as they stand, commands parse, no public name is missing.

The blocks of a page run one after the other, as a reader would type them, in a folder with
photo.jpg and photos/. `page_models.MODELS` stands in for the Hub.
"""

import ast
import importlib.util
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import benchmark_pages
import click
import model_types_page
import numpy as np
import page_models
import pytest
from hub_server import HubServer
from PIL import Image
from torch import Tensor
from torch.utils._pytree import tree_leaves

import fastbb
import fastbb_kernels
from fastbb.bench.markdown import markdown
from fastbb.bench.results import Results
from fastbb.cli import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "kernels" / "README.md"),
    *sorted((ROOT / "docs").rglob("*.md")),
]
LANGUAGES = {"python", "sh", "text", "json", ""}
README_LINES = 180  # long tables and lists live in docs/


class Block(NamedTuple):
    """A fenced block of a page; `line` is that of its first line of code."""

    language: str
    line: int
    text: str


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(text: str) -> list[Block]:
    return [
        Block(match[2].strip(), text[: match.start(3)].count("\n") + 1, match[3])
        for match in re.finditer(r"^( *)```([^\n`]*)\n(.*?)^\1```$", text, re.M | re.S)
    ]


def run(block: Block, page: str, names: dict[str, Any]) -> list[Any]:
    """Runs a block in a namespace; returns the values of its statements that are expressions."""
    values = []
    for statement in ast.parse("\n" * (block.line - 1) + block.text).body:
        if isinstance(statement, ast.Expr):
            code = compile(ast.Expression(statement.value), page, "eval")
            values.append(eval(code, names))
        else:
            exec(compile(ast.Module([statement], []), page, "exec"), names)
    return values


def wants_gradient(value: Any) -> bool:
    """Whether a value is, or holds, a tensor that was computed with a graph for its gradient."""
    value = dict(value) if isinstance(value, Mapping) else value
    leaves = tree_leaves(value)
    return any(isinstance(leaf, Tensor) and leaf.grad_fn is not None for leaf in leaves)


@pytest.fixture
def desk(
    hub: HubServer,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """The reader's working directory, with photo.jpg and two images in photos/."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    pixels = np.random.default_rng(0).integers(0, 256, (3, 240, 320, 3), dtype=np.uint8)
    (tmp_path / "photos").mkdir()
    for name, image in zip(("photo.jpg", "photos/a.jpg", "photos/b.jpg"), pixels):
        Image.fromarray(image).save(name)
    return tmp_path


@pytest.mark.filterwarnings(
    "error::fastbb.engine.settings.EngineWarning", "error::fastbb.AccelerateWarning"
)
@pytest.mark.parametrize(
    "page", [page for page in PAGES if "```python" in page.read_text()], ids=name_of
)
def test_the_python_blocks_of_a_page_run(
    page: Path, desk: Path, hub: HubServer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    pytest.importorskip("transformers")
    text = page.read_text()
    page_models.publish(hub, text, tmp_path_factory.mktemp)
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(text):
        if block.language != "python":
            continue
        before = dict(names)
        values = run(block, name_of(page), names)
        new = [value for name, value in names.items() if before.get(name) is not value]
        if ".backward()" not in block.text:
            # kernels need it, and readers copy what they see
            assert not any(map(wants_gradient, [*new, *values])), (
                f"{name_of(page)}:{block.line}: a model is called without torch.inference_mode()"
            )


def test_a_block_that_calls_a_model_with_gradients_is_found() -> None:
    names: dict[str, Any] = {}
    (value,) = run(
        Block("python", 1, "import torch\ntorch.nn.Linear(1, 1)(torch.ones(1))"), "", names
    )
    assert wants_gradient(fastbb.BackboneOutput((value,)))
    assert not wants_gradient(fastbb.BackboneOutput((value.detach(),)))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_has_a_known_language(page: Path) -> None:
    text = page.read_text()
    found = blocks(text)
    assert len(re.findall(r"^ *```", text, re.M)) == 2 * len(found)
    assert {block.language for block in found} <= LANGUAGES


# --- commands


def commands(text: str) -> Iterator[tuple[str, bool]]:
    """Command lines in blocks, and in the text; and whether they are whole, as in a block."""
    for block in blocks(text):
        for line in block.text.splitlines():
            if block.language == "sh" or line.startswith("$ "):
                yield line.removeprefix("$ "), True
    for line in text.splitlines():
        for code in re.findall(r"`([^`\n]+)`", line):
            yield code, False


def check_command(line: str, whole: bool) -> None:
    """Raises where a command line cannot be given: a command, option, target or file is missing."""
    match shlex.split(line.split(" | ")[0], comments=True):
        case ["fastbb", "COMMAND", *_] | ["fastbb"] | ["fastbb", "--help" | "--version"]:
            pass
        case ["fastbb", name, *arguments]:
            try:
                # click keeps the names of the help option that the first context of a command has
                parent = click.Context(main, info_name="fastbb", **main.context_settings)
                main.commands[name].make_context(name, arguments, parent)
            except click.MissingParameter:
                if whole:
                    raise
        case ["make", *targets]:
            rules = (ROOT / "Makefile").read_text()
            for target in targets:
                assert "=" in target or re.search(rf"^{target}:", rules, re.M), line
        case ["python", "-m", "fastbb", *rest]:
            check_command(shlex.join(["fastbb", *rest]), whole)
        case ["python", "-m", module, *_]:
            assert importlib.util.find_spec(module) is not None, line
        case ["python", path, *options] if path.endswith(".py"):
            script = (ROOT / path).read_text()
            assert all(o in script for o in options if o.startswith("--")), line


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_of_a_page_parse(page: Path, desk: Path) -> None:
    for line, whole in commands(page.read_text()):
        if line.split(" ")[0] in ("fastbb", "make", "python"):
            check_command(line, whole)


@pytest.mark.parametrize(
    "line",
    [
        "fastbb extract photos/ --out features/ --modell resnet50",
        "fastbb extract photos/",
        "fastbb tune resnet50 --batch 1,8",
        "fastbb warmup resnet50 --arch 91",
        "fastbb view nothing.jpg",
        "fastbb examine",
        "make everything",
        "python bench/none.py",
        "fastbb bench resnet50 --againstt timm",
        "python bench/speed_of_light.py --archh 90",
        "python -m fastbb_kernels.chek --quick",
        "python -m fastbb veiw photo.jpg",
    ],
)
def test_wrong_command_is_found(line: str, desk: Path) -> None:
    with pytest.raises((click.UsageError, KeyError, AssertionError, OSError)):
        check_command(line, whole=True)


# --- the reference and the links


def test_every_public_name_is_in_the_reference() -> None:
    pages = (ROOT / "docs" / "reference").glob("*.md")
    shown = {name for page in pages for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M)}
    heads = ("build", "register", "unregister", "MaskFormerConfig")
    heads = (*heads, "MaskFormerForInstanceSegmentation")
    public = [f"fastbb.{name}" for name in fastbb.__all__]
    public += [f"fastbb_kernels.{name}" for name in fastbb_kernels.__all__]
    public += [f"fastbb.hosts.heads.{name}" for name in heads]
    assert not sorted(set(public) - shown)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_named_by_a_page_exist(page: Path) -> None:
    """Links, and paths of files of the repository in code."""
    text = page.read_text()
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)
    assert not [link for link in links if not (page.parent / link).exists()]
    paths = re.findall(r"`((?:tests|docs|bench|scripts|fastbb|kernels)/[\w./-]+\.\w+)`", text)
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES


@pytest.mark.parametrize("name", benchmark_pages.MEASURED)
def test_measured_pages_show_the_results_beside_them(name: str) -> None:
    results = Results.read(benchmark_pages.PAGES / f"{name}.json")
    page = (benchmark_pages.PAGES / f"{name}.md").read_text()
    assert benchmark_pages.with_measured(page, markdown(results)) == page
    if name == "backbones":
        readme = benchmark_pages.README.read_text()
        table = benchmark_pages.readme_table(results)
        assert benchmark_pages.with_measured(readme, table) == readme


def test_the_table_of_model_types_is_that_of_the_command() -> None:
    page = model_types_page.PAGE.read_text()
    assert model_types_page.with_table(page) == page
    assert page.count("| `") > 32
