"""Imports point in one direction: from the command line and public API down to the ops."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FASTBB, KERNELS = ROOT / "fastbb", ROOT / "kernels" / "fastbb_kernels"

# a package imports only what stands before it here
LAYERS = [
    "fastbb_kernels",
    "fastbb.weights",
    "fastbb.backbone",
    "fastbb.models",
    "fastbb.engine",
    "fastbb.hosts",
    "fastbb.auto",
    "fastbb.images",
    "fastbb.extraction",
    "fastbb.inspect",
    "fastbb.bench",
    "fastbb.integrations",
    "fastbb.cli",
    "fastbb.__main__",
]
# methods of a backbone import the function that they hand the call to
HANDED_ON = {
    "fastbb.backbone.base": {
        "fastbb.engine.prepare.prepare",
        "fastbb.engine.prepare.explain",
        "fastbb.inspect.verify.verify",
    }
}
RANK = {name: rank for rank, name in enumerate(LAYERS)}
NEVER_AT_IMPORT = {"timm", "transformers", "click", "tqdm", "ray", "daft", "datasets", "pyarrow"}
NEVER_AT_IMPORT |= {"openvino"}
NEVER = {"transformers"}
# modules that are imported at first use only, and that need the package
CLI_MODULES = ("bench", "features", "machine", "models", "options", "shell")
CLI = ("fastbb.cli", *(f"fastbb.cli.{name}" for name in CLI_MODULES))
TRANSFORMERS = ("fastbb.hosts.heads", "fastbb.hosts.transformers_config")
IMPORTED_WITH = {
    "click": CLI,
    "transformers": TRANSFORMERS,
    "daft": ("fastbb.integrations.daft",),  # its class derives from Daft's
}


def python_files() -> list[Path]:
    return sorted([*FASTBB.rglob("*.py"), *KERNELS.rglob("*.py")])


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts = parts[1:] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, inside_functions: bool) -> Iterator[tuple[int, str]]:
    """Absolute names that a file imports; "package.name" for `from package import name`."""

    def walk(node: ast.AST) -> Iterator[tuple[int, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((child.lineno, alias.name) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                yield from ((child.lineno, name) for name in from_import(child))
            elif is_type_checking(child):
                continue
            elif inside_functions or not isinstance(
                child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
            ):
                yield from walk(child)

    def from_import(node: ast.ImportFrom) -> list[str]:
        package = module_name(path).split(".")
        if path.name != "__init__.py":
            package = package[:-1]
        base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
        prefix = ".".join(filter(None, (base, node.module)))
        return [f"{prefix}.{alias.name}" for alias in node.names]

    return walk(ast.parse(path.read_text(), str(path)))


def is_type_checking(node: ast.AST) -> bool:
    if not isinstance(node, ast.If):
        return False
    test = node.test
    name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", None)
    return name == "TYPE_CHECKING"


def layer(module: str) -> str | None:
    """The entry of `LAYERS` that a dotted name falls under."""
    parts = module.split(".")
    depth = 1 if parts[0] == "fastbb_kernels" else 2
    name = ".".join(parts[:depth])
    return name if name in RANK else None


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def test_package_has_at_most_twelve_entries() -> None:
    usual = {"__init__.py", "__main__.py", "py.typed", "cli", "__pycache__"}
    rooms = {entry.name for entry in FASTBB.iterdir()} - usual
    known = {name.partition(".")[2] for name in LAYERS[1:]} - {"cli", "__main__"}
    known |= {"assets"}
    assert {name.removesuffix(".py") for name in rooms} == known and len(rooms) <= 12


def test_every_module_has_a_layer() -> None:
    names = [module_name(path) for path in python_files()]
    lost = [name for name in names if layer(name) is None and name != "fastbb"]
    assert not lost, f"give these modules a place in LAYERS: {lost}"


def test_packages_import_only_lower_layers() -> None:
    wrong = []
    for path in python_files():
        own = layer(module_name(path))
        for line, name in imports(path, inside_functions=True):
            other = layer(name)
            if name in HANDED_ON.get(module_name(path), ()):
                continue
            if own is not None and other is not None and RANK[other] > RANK[own]:
                wrong.append(f"{where(path, line)}: {own} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_no_module_imports_the_lazy_names_of_fastbb() -> None:
    modules = {module_name(path) for path in python_files()}
    wrong = [
        f"{where(path, line)}: {name}"
        for path in python_files()
        if module_name(path) != "fastbb"
        for line, name in imports(path, inside_functions=True)
        if name == "fastbb" or (name.startswith("fastbb.") and layer(name) is None)
    ]
    assert "fastbb" in modules and not wrong, "\n".join(wrong)


def test_imports_have_no_cycles() -> None:
    modules = {module_name(path) for path in python_files()}
    graph = {
        module_name(path): {
            target
            for _, name in imports(path, inside_functions=False)
            for target in (name, name.rpartition(".")[0])
            if target in modules - {"fastbb", "fastbb_kernels", module_name(path)}
        }
        for path in python_files()
    }
    TopologicalSorter(graph).prepare()  # CycleError shows the cycle


def test_kernels_import_only_torch_triton_and_themselves() -> None:
    wrong = [
        f"{where(path, line)}: {name}"
        for path in KERNELS.rglob("*.py")
        for line, name in imports(path, inside_functions=True)
        if name.split(".")[0] in ("fastbb", "timm", "transformers", "torchvision")
    ]
    assert not wrong, "\n".join(wrong)


def test_only_checks_import_the_harness() -> None:
    """`fastbb_kernels.testing` needs the extra "testing", so only checks may import it."""
    users = ("fastbb_kernels.testing", "fastbb_kernels.check")
    wrong = [
        f"{where(path, line)}: {name}"
        for path in python_files()
        if not module_name(path).startswith(users)
        for line, name in imports(path, inside_functions=True)
        if name.startswith("fastbb_kernels.testing")
    ]
    assert not wrong, "\n".join(wrong)


def family(module: str) -> str | None:
    """swin for fastbb.models.swin and for fastbb.models.swin_anything."""
    if not module.startswith("fastbb.models."):
        return None
    name = module.split(".")[2].split("_")[0]
    return None if name in ("layers", "lookup", "parts", "stage") else name  # they are shared


def test_families_never_import_each_other() -> None:
    files = {path: family(module_name(path)) for path in (FASTBB / "models").glob("*.py")}
    assert set(files.values()) >= {"swin", "resnet", "timm"}
    wrong = [
        f"{where(path, line)}: {name}"
        for path, own in files.items()
        for line, name in imports(path, inside_functions=True)
        if own is not None and family(name) not in (None, own)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", sorted(NEVER_AT_IMPORT))
def test_slow_packages_are_imported_inside_functions(package: str) -> None:
    wrong = [
        where(path, line)
        for path in python_files()
        for line, name in imports(path, inside_functions=package in NEVER)
        if name.split(".")[0] == package and module_name(path) not in IMPORTED_WITH.get(package, ())
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_is_pickled() -> None:
    wrong = []
    for path in python_files():
        for line, name in imports(path, inside_functions=True):
            if name.split(".")[0] in ("cloudpickle", "dill", "joblib", "marshal", "shelve"):
                wrong.append(f"{where(path, line)}: {name}")
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Attribute | ast.Call):
                continue
            code = ast.unparse(node)
            allowed = code == "pickle.UnpicklingError" or "weights_only=True" in code
            if code.startswith(("pickle.", "torch.load(", "torch.save(")) and not allowed:
                wrong.append(f"{where(path, node.lineno)}: {code}")
    assert not wrong, "\n".join(wrong)
