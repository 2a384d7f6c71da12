"""transformers' eager time over ours on this machine, interleaved in one run.

    python bench/eager_ratio.py --model resnet50 --dtype float32 --batch 1 --batch 8

Both compute the same weights on the same image; they take turns, so that what else the machine does
meets both. Medians count. All four stages are returned.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import product

import torch
from bench_backbone import TIMM, fastbb_model, transformers_model
from ledger import table


def interleaved_times(calls: list[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Seconds of every call in every round, after one that does not count."""
    times: list[list[float]] = [[] for _ in calls]
    for counts in [False] + [True] * rounds:
        for call, taken in zip(calls, times):
            start = time.perf_counter()
            call()
            if counts:
                taken.append(time.perf_counter() - start)
    return times


def measure(model: str, dtype: torch.dtype, batch: int, size: int, rounds: int) -> list[str]:
    """A row of the table."""
    theirs = transformers_model(model).eval().to(dtype)
    ours = fastbb_model(model).eval().to(dtype)
    ours.load_state_dict(theirs.state_dict())
    pixels = torch.randn(batch, 3, size, size).to(dtype)
    with torch.inference_mode():
        times = interleaved_times([lambda: theirs(pixels), lambda: ours(pixels)], rounds)
    medians = [statistics.median(taken) for taken in times]
    ratios = sorted(a / b for a, b in zip(*times))
    return [
        f"{model}, {size}, {str(dtype).removeprefix('torch.')}, batch {batch}",
        *(f"{1e3 * median:.0f} ms" for median in medians),
        f"{medians[0] / medians[1]:.2f}",
        f"{ratios[0]:.2f} ... {ratios[-1]:.2f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", action="append", choices=list(TIMM), help="default: all")
    parser.add_argument(
        "--dtype", action="append", choices=["float32", "bfloat16"], help="default: both"
    )
    parser.add_argument("--batch", action="append", type=int, help="default: 1 and 8")
    parser.add_argument("--size", type=int, default=224, help="of the images, pixels")
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    cells = product(
        options.model or list(TIMM),
        options.dtype or ["float32", "bfloat16"],
        options.batch or [1, 8],
    )
    rows = [
        measure(model, getattr(torch, dtype), batch, options.size, options.rounds)
        for model, dtype, batch in cells
    ]
    print(f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    print(table(["eager", "transformers", "fastbb", "ratio", "ratios of all rounds"], rows))


if __name__ == "__main__":
    main()
