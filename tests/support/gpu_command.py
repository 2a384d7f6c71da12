"""Runs bench/gpu.py as a program and reads its results."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

# packages that a machine with only torch and triton lacks (tqdm included, used by torch if there)
ABSENT = (
    *("transformers", "timm", "torchvision", "huggingface_hub", "safetensors", "matplotlib"),
    *("click", "fsspec", "PIL", "scipy", "pytest"),
)
BLOCKER = f"""
import sys
from importlib.abc import MetaPathFinder

class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""


def gpu_command(
    *options: str, script: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    search = [
        environment.pop("first", ""),
        *(str(ROOT / name) for name in ("", "kernels", "bench")),
    ]
    return subprocess.run(
        [sys.executable, *([str(ROOT / "bench" / "gpu.py")] if script else []), *options],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, search)), **environment},
        capture_output=True,
        text=True,
    )


def files(out: Path) -> tuple[dict[str, Any], str]:
    (data,), (tables,) = out.glob("*.json"), out.glob("*.md")
    return json.loads(data.read_text()), tables.read_text()


def outcomes(data: dict[str, Any]) -> dict[str, str]:
    return {stage["stage"]: stage["outcome"] for stage in data["stages"]}
