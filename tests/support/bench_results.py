"""Made-up results of a bench: speeds with realistic noise, and an extraction."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fastbb.bench.end_to_end import EndToEnd, Stage
from fastbb.bench.results import Cell, Results, Way

UPSTREAM = "transformers eager"
SPEEDS = {UPSTREAM: 1.0, "OpenVINO": 1.6, "fastbb eager": 1.2, "fastbb compiled": 1.8}
ENVIRONMENT = {
    "cpu": "AMD EPYC",
    "capability": "AVX512",
    "flags": ["avx512_bf16"],
    "threads": 2,
    "cores": 2,
    "python": "3.12.3",
    "versions": {"torch": "2.14.1", "transformers": "5.23.0", "openvino": "2026.4"},
    "date": "2026-11-30T10:00:00+00:00",
    "fastbb_commit": "acbc478",
}


def made_ways(
    speeds: Mapping[str, float],
    seed: int = 0,
    n_rounds: int = 10,
    n_calls: int = 5,
    base_s: float = 0.08,
) -> list[Way]:
    """Ways with times; noise: 2.5 % that all share in a round, 2 % of their own, 1 % a call.

    Args:
        speeds: times as fast as `base_s`, by name; fastbb's begin with "fastbb".
    """
    rng = np.random.default_rng(seed)
    common = rng.normal(0, 0.025, n_rounds)
    ways = []
    for name, times_as_fast in speeds.items():
        own = rng.normal(0, 0.02, n_rounds)
        calls = rng.normal(0, 0.01, (n_rounds, n_calls))
        rounds = base_s / times_as_fast * np.exp(common[:, None] + own[:, None] + calls)
        ways.append(
            Way(
                name,
                ours=name.startswith("fastbb"),
                error=1.2e-6,
                allowed=5e-6,
                cold_start_s=12.3,
                compile_s=45.0 if "compiled" in name else 0.0,
                memory_bytes=412_000_000,
                rounds_s=rounds.tolist(),
            )
        )
    return ways


def made_cell(
    model: str = "microsoft/swin-tiny-patch4-window7-224",
    precision: str = "fp32",
    batch: int = 1,
    speeds: Mapping[str, float] = SPEEDS,
    seed: int = 0,
    n_rounds: int = 10,
) -> Cell:
    return Cell(
        model,
        "backbone",
        precision,
        batch,
        batch,
        (224, 224),
        UPSTREAM,
        made_ways(speeds, seed, n_rounds),
        stages=("stage1", "stage2", "stage3", "stage4"),
        params=27_520_890,
        macs=4_489_798_656,
        activations=17_054_352,
    )


def made_host(seed: int = 0) -> Cell:
    """A host of which fastbb replaces about 60 % of the time."""
    ways = made_ways({UPSTREAM: 1.0, "fastbb auto": 1.15}, seed)
    for way, share in zip(ways, (0.6, 0.55)):
        way.inside_s = [[share * seconds for seconds in calls] for calls in way.rounds_s]
    return Cell("MaskFormer", "host", "bf16", 1, 1, (800, 1088), UPSTREAM, ways)


def made_results(*cells: Cell) -> Results:
    return Results("fastbb bench swin --batch 1,8", dict(ENVIRONMENT), {}, list(cells))


def made_extraction(null_model: bool = False, **rates: float) -> EndToEnd:
    """The speed of an extraction with four decode threads, by images/s of its stages."""
    given = {"read": 4000, "decode": 230, "resize": 2500, "copy": 9000, "model": 800, "write": 9999}
    given |= rates
    together = given.pop("together", 210)

    def stage(name: str, rate: float) -> Stage:
        return Stage(name, rate, 1.0, 10, 4, [rate * 0.9, rate, rate * 1.1])

    result = EndToEnd(
        *("org/model", "photos", "fp32", "eager", "cpu", 32, ["embedding"], 1000, 512, 512),
        null_model,
        stages=[stage(*item) for item in given.items()],
        together=stage("together", together),
        errors={"corrupt": 2},
        failed=["a.png: corrupt, cut"],
    )
    result.bound_by = result.find_bound()
    return result
