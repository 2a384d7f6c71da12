"""Bench of the host's time: it measures launches that reach a driver, without a GPU."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MEASURE = """
import json, sys
import torch
sys.path.insert(0, "bench")
import host_time

tiny = host_time.SwinConfig(image_size=56, embed_dim=32, depths=[1, 1], num_heads=[1, 2])
pixels = torch.zeros(1, 3, 56, 56, dtype=host_time.DTYPE)
row = host_time.host_time(host_time.make_backbone(tiny), pixels, "tiny", seconds=0.1)
print(json.dumps(vars(row)))
print(host_time.markdown([row]))
"""


def test_launches_of_a_forward_are_counted_and_timed() -> None:
    # in a process of its own: the dispatcher keeps what the bench registers
    command = [sys.executable, "-W", "ignore", "-c", MEASURE]
    output = subprocess.check_output(command, cwd=ROOT, text=True).splitlines()
    row = json.loads(output[0])
    assert row["launches"] >= 5  # patches, and in each of two stages attention and an MLP at least
    times = [row[f"{name}_us"] for name in ("forward", "looked_up", "replay", "relu")]
    assert all(time > 0 for time in times)
    assert output[-1].startswith("| tiny | 1 |")
