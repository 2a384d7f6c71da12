"""Time and memory of reading a large features directory: open, ids, search, export, verification.

    python bench/features_scale.py [--rows 1000000] [--width 768] [--directory DIR]

It writes the directory of random features (3 GB), measures each operation in a process of its own,
with the files in the page cache, and removes everything. Memory is the peak of the resident set
above that of the imports, and includes mapped files.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastbb.extraction import export_features, open_features, verify_features
from fastbb.extraction.sources import Source
from fastbb.extraction.store import FeatureWriter

SHARD_ROWS = 4096
EVERY_FAILED = 1000  # one row in so many has failed


def write(directory: Path, n_rows: int, width: int) -> None:
    """Writes a features directory of random vectors."""
    names = ("image_processor_type", "resize", "size", "crop_size")
    plan = {
        "model": {"name": "random", "class": "none", "weights_sha256": "0" * 64},
        "preprocessing": dict.fromkeys(names, "none"),
        "versions": {"torch": torch.__version__},
        "outputs": {"embedding": {"shape": [width], "dtype": "float32"}},
        "shard_rows": SHARD_ROWS,
        "batch_size": 32,
        "precision": "fp32",
        "device": "cpu",
        "mode": "eager",
        "runs": "eager",
    }
    torch.manual_seed(0)
    with FeatureWriter(directory) as writer:
        writer.start(plan)
        rows = ((i, Source(f"{i // 1000:04d}/{i:07d}.jpg", "/images")) for i in range(n_rows))
        writer.append("start", rows, inputs=["/images"])
        commits = []
        for shard in writer.shards:
            first, index, ok = shard.shard * SHARD_ROWS, [], []
            for row, source in writer.rows(shard):
                entry: dict[str, Any] = {"row": row, "id": source.id}
                if row % EVERY_FAILED:
                    entry |= {"status": "ok", "pos": len(ok)}
                    ok.append(row - first)
                else:
                    entry |= {"status": "error", "kind": "corrupt", "message": "no image"}
                index.append(entry)
            tensors = {"row_id": torch.tensor(ok) + first, "embedding": torch.randn(len(ok), width)}
            commits.append(writer.commit(shard, tensors, index))
        writer.finish(writer.totals(commits))


def measured(what: str, directory: Path) -> dict[str, float]:
    """Returns seconds and MB of memory of one operation, in this process."""
    out = directory.with_name("export")
    actions: dict[str, Callable[[], Any]] = {
        "open": lambda: len(open_features(directory)),
        "describe": lambda: open_features(directory).describe(),
        "ids": lambda: len(open_features(directory).ids),
        "first row": lambda: open_features(directory)[0],
        "tensor": lambda: open_features(directory)["embedding"].sum(),
        "search": lambda: open_features(directory).search(query),
        "search of 100": lambda: open_features(directory).search(query.expand(100, -1)),
        "export parquet": lambda: export_features(directory, "parquet", out),
        "export npy": lambda: export_features(directory, "npy", out),
        "export faiss": lambda: export_features(directory, "faiss", out),
        "verify": lambda: verify_features(directory),
    }
    query = torch.ones(open_features(directory).plan["outputs"]["embedding"]["shape"][0])
    before = _peak_kb()
    start = time.perf_counter()
    actions[what]()
    seconds = time.perf_counter() - start
    peak = _peak_kb()
    return {"seconds": seconds, "mb": (peak - before) / 1e3, "peak": peak / 1e3}


def _peak_kb() -> int:
    # getrusage would include the peak of the process that started this one
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


OPERATIONS = (
    *("open", "describe", "ids", "first row", "tensor", "search", "search of 100"),
    *("export parquet", "export npy", "export faiss", "verify"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures reading of many rows.")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--directory", type=Path, help="where to write; default: a temporary one")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measured(args.measure, args.directory)))
        return
    root = Path(tempfile.mkdtemp(dir=args.directory))
    try:
        start = time.perf_counter()
        write(root / "features", args.rows, args.width)
        print(f"{args.rows:,} x {args.width} fp32, torch {torch.__version__}, {_cpu()}")
        print(f"written in {time.perf_counter() - start:.0f} s")
        for what in OPERATIONS:
            command = [sys.executable, __file__, "--measure", what]
            command += ["--directory", str(root / "features")]
            found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            print(
                f"{what:16} {found['seconds']:7.2f} s  {found['mb']:7.0f} MB more, peak "
                f"{found['peak']:.0f} MB",
                flush=True,
            )
            export = root / "export"
            shutil.rmtree(export) if export.is_dir() else export.unlink(missing_ok=True)
    finally:
        shutil.rmtree(root)


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
