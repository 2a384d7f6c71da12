"""Number of files that a family takes, lengths of files, and folders of tests.

docs/contributing/family.md lists the files of a new family. Each family of the tree is counted
here: four files of its own, four for each of its ops, and further ones only with a reason.
"""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "kernels" / "fastbb_kernels"
OWN, PER_OP = 4, 4  # files of a family by itself, and of each of its ops
LONGEST = {  # lines of a file, by folder
    "fastbb": 600,
    "kernels/fastbb_kernels": 600,
    "kernels/fastbb_kernels/ops": 500,
    "bench": 600,
    "scripts": 600,
    "tests": 400,
}
# folders of tests beside those of fastbb's packages
OTHER_TESTS = {"ops", "harness", "support"}

# files beyond that, each with its reason
PUBLIC = {
    "fastbb/__init__.py": "typed exports of its classes, which are found without",
    "fastbb/hosts/model_types.py": "the table of transformers' model types",
    "fastbb/hosts/libraries.py": "a class of transformers that is run as a whole, not replaced",
    "fastbb/images/spec_readers.py": "the image processor of old checkpoints that name none",
    "kernels/fastbb_kernels/check.py": "one of the models that the command counts on a device",
}
FURTHER: dict[str, dict[str, str]] = {
    "convnext": {
        "fastbb/images/spec_readers.py": PUBLIC["fastbb/images/spec_readers.py"],
        "fastbb/hosts/model_types.py": "the model types of transformers",
        "fastbb/models/convnext_parts.py": "its layers in two libraries",
        "fastbb/models/convnext_forward.py": "its forward",
        "fastbb/models/convnext_modules.py": "its modules",
        "fastbb/models/convnext_timm.py": "its layers and names in timm",
        "fastbb/models/convnext_cpu.py": "the MLP of a block on a CPU",
        "tests/models/test_convnext_ways.py": "its kernels, the MLP on a CPU, graphs",
        "tests/support/convnext_models.py": "its tiny models",
    },
    "resnet": {
        **PUBLIC,
        "fastbb/models/resnet_parts.py": "its layers in four libraries",
        "fastbb/models/resnet_forward.py": "its forward",
        "tests/models/test_resnet_on_triton.py": "its kernels, in the interpreter",
    },
    "swin": {
        **PUBLIC,
        "fastbb/cli/models.py": "the example of a name",
        "fastbb/hosts/heads.py": "transformers' classes that `heads.register` replaces",
        "fastbb/models/swin_config.py": "the configurations of four types",
        "fastbb/models/swin_parts.py": "its layers in four libraries",
        "fastbb/models/swin_forward.py": "its forward",
        "fastbb/models/swin_modules.py": "its modules",
        "fastbb/models/swin_cpu.py": "a block on a CPU",
        "fastbb/models/swin_names.py": "names of its weights in files and in torchvision",
        "fastbb/models/swin_v2.py": "the backbone of V2",
        "fastbb/models/swin_v2_parts.py": "the layers of V2 in three libraries",
        "fastbb/models/swin_v2_forward.py": "the forward of V2",
        "fastbb/models/swin_v2_modules.py": "the modules of V2",
        "kernels/fastbb_kernels/swin_v2_cases.py": "the calls of V2",
        "tests/models/test_swin_v2.py": "V2 against its libraries",
        "tests/models/test_swin_v2_on_triton.py": "the kernels of V2, and its bugs",
        "tests/support/swin_v2_models.py": "tiny models of V2",
        "kernels/fastbb_kernels/__init__.py": "typed exports of its ops, which are found without",
        "tests/models/test_swin_cpu.py": "the block on a CPU",
        "tests/models/test_swin_on_triton.py": "its kernels, in the interpreter",
        "tests/ops/test_window_attention_kernel.py": "the kernel of window attention",
    },
    "vit": {
        "fastbb/__init__.py": "typed exports of its classes, which are found without",
        "fastbb/hosts/libraries.py": "classes of transformers that are run as a whole",
        "fastbb/hosts/model_types.py": "the table of transformers' model types",
        "fastbb/hosts/transformers_backbone.py": "another type whose name has the word",
        "fastbb/hosts/transformers_loading.py": "other types whose names have the word",
        "fastbb/images/spec_readers.py": "the image processor of old checkpoints that name none",
        "fastbb/models/vit_config.py": "the configurations of eight types",
        "fastbb/models/vit_build.py": "its modules, of a configuration",
        "fastbb/models/vit_modules.py": "its layers as modules",
        "fastbb/models/vit_ends.py": "its poolers, heads and pyramid",
        "fastbb/models/vit_names.py": "a row for each type: names in transformers and in files",
        "fastbb/models/vit_parts.py": "its layers, as the forward takes them",
        "fastbb/models/vit_positions.py": "absolute, rotary and relative positions",
        "fastbb/models/vit_forward.py": "its forward",
        "fastbb/models/vit_cpu.py": "a layer on a CPU",
        "fastbb/models/vit_libraries.py": "its layers in two libraries",
        "fastbb/models/vit_timm.py": "timm's model with its weights",
        "tests/support/vit_models.py": "tiny models of eight types",
        "tests/models/test_vit_canaries.py": "bugs that ViTs are prone to",
        "tests/models/test_vit_cpu.py": "a layer on a CPU",
        "tests/models/test_vit_files.py": "its checkpoints",
        "tests/models/test_vit_on_triton.py": "its kernels, in the interpreter",
        "tests/models/test_vit_libraries.py": "timm's models of it",
        "tests/hosts/test_vit_hosts.py": "its layers in hosts",
    },
}


def families() -> list[str]:
    """Modules of `fastbb.models` that register a family; timm is left out, a library."""
    files = (ROOT / "fastbb" / "models").glob("*.py")
    return sorted(p.stem for p in files if "register(" in p.read_text() and p.stem != "timm")


def searched() -> list[Path]:
    """The package, the kernels and the tests; bench and scripts use families as anyone does."""
    folders = (ROOT / "fastbb", KERNELS, ROOT / "tests")
    return [
        path
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".py", ".json") and "assets" not in path.parts
    ]


def belongs(path: Path, name: str) -> bool:
    """Whether a file is named after a family or an op."""
    stem = path.stem.removeprefix("test_")
    return stem == name or stem.startswith(f"{name}_")


@cache
def imported_ops(path: Path) -> set[str]:
    """The ops that a module imports from the kernels."""
    names = {path.stem for path in (KERNELS / "ops").glob("*.py")}
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastbb_kernels"):
            found |= {alias.name for alias in node.names} & names
    return found


def ops_of(family: str) -> set[str]:
    """The ops that this family alone imports."""
    own, others = set(), set()
    for path in (ROOT / "fastbb").rglob("*.py"):
        ops = imported_ops(path)
        own, others = (own | ops, others) if belongs(path, family) else (own, others | ops)
    return own - others


@cache
def names_in(path: Path) -> set[str]:
    """Identifiers and strings of a module without its docstrings, in lower case."""
    tree = ast.parse(path.read_text())
    found: set[str] = set()
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        for text in (
            getattr(node, "id", None),
            getattr(node, "attr", None),
            getattr(node, "name", None),
            getattr(node, "module", None),
            getattr(node, "value", None) if id(node) not in docstrings else None,
        ):
            if isinstance(text, str):
                found |= set(re.split(r"[^a-z0-9]+|(?<=[a-z])(?=[A-Z])", text.lower()))
    return found


def shared_files_that_name(family: str) -> set[Path]:
    """Modules of the package and the kernels that name a family without being its own."""
    return {
        path
        for path in searched()
        if path.suffix == ".py"
        and "tests" not in path.relative_to(ROOT).parts
        and not belongs(path, family)
        and family in names_in(path)
    }


def files_of(family: str) -> set[Path]:
    """Every file that adding this family would create or edit."""
    ops = ops_of(family)
    own = {path for path in searched() if any(belongs(path, name) for name in (family, *ops))}
    return own | shared_files_that_name(family)


def limit(family: str) -> int:
    """Most files that a family may take: 12 for one with two ops and nothing further."""
    return OWN + PER_OP * len(ops_of(family)) + len(FURTHER.get(family, {}))


@pytest.mark.parametrize("family", families())
def test_a_family_takes_no_more_files_than_it_may(family: str) -> None:
    files = files_of(family)
    further = {ROOT / name for name in FURTHER.get(family, {})}
    assert further <= files, f"not its files any more: {sorted(map(str, further - files))}"
    names = "\n".join(str(path.relative_to(ROOT)) for path in sorted(files))
    assert len(files) <= limit(family), f"{len(files)} files, at most {limit(family)}:\n{names}"


@pytest.mark.parametrize("family", families())
@pytest.mark.parametrize("where", ["own", "shared", "op"])
def test_extra_file_of_a_family_is_counted(
    family: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = min(ops_of(family))
    planted = {
        "own": ROOT / "fastbb" / "engine" / f"{family}_engine.py",
        "shared": ROOT / "fastbb" / "engine" / "planted.py",
        "op": KERNELS / f"{op}_more.py",
    }[where]
    assert not planted.exists()
    before, names = searched(), names_in
    monkeypatch.setitem(globals(), "searched", lambda: [*before, planted])
    monkeypatch.setitem(
        globals(), "names_in", lambda path: {family} if path == planted else names(path)
    )
    assert len(files_of(family)) == limit(family) + 1


def test_the_families_are_found() -> None:
    assert {"resnet", "swin"} <= set(families())


def attributes(path: Path) -> list[str]:
    return [n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)]


def test_one_class_decides_when_a_cpu_compiles() -> None:
    """`Chooser` hands the number of images on to `CompileCost`, and nothing else reads it."""
    engine = ROOT / "fastbb" / "engine"
    readers = [
        path.name
        for path in engine.glob("*.py")
        for name in attributes(path)
        if name == "expected_images" and path.name != "settings.py"
    ]
    assert readers == ["choose.py"]
    costs = [path.name for path in engine.glob("*.py") if "USUAL" in path.read_text()]
    assert costs == ["compile_cost.py"]


def test_only_library_and_family_files_name_host_classes() -> None:
    """Import paths of model classes stand in `libraries.py` and in the files of families."""
    hosts = ROOT / "fastbb" / "hosts"
    allowed = {"libraries.py", *(f"{family}.py" for family in families())}
    wrong = [
        (path.name, node.value)
        for path in hosts.glob("*.py")
        if path.name not in allowed
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if re.match(
            r"(transformers|timm|torchvision|segmentation_models_pytorch)\.(models|encoders)",
            node.value,
        )
    ]
    assert not wrong


@pytest.mark.parametrize("folder", LONGEST)
def test_no_file_is_longer_than_its_limit(folder: str) -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in (ROOT / folder).rglob("*.py")}
    assert lengths
    assert not {str(path): n for path, n in lengths.items() if n > LONGEST[folder]}


def test_folders_of_tests_have_the_names_of_the_packages() -> None:
    packages = {path.parent.name for path in (ROOT / "fastbb").glob("*/__init__.py")}
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/*.py")}
    assert folders == packages | OTHER_TESTS
