"""bench/hosts.py measures a host and counts its backbone; a host that fails loses only its row."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import hosts

    return hosts


def tiny_swin() -> nn.Module:
    import transformers

    config = transformers.SwinConfig(embed_dim=32, depths=[1, 2], num_heads=[1, 2])
    return transformers.SwinForImageClassification(config)


def broken() -> nn.Module:
    raise RuntimeError("no such weights")


def test_table_has_measured_hosts_and_the_reason_of_a_failed_one(
    hosts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(
        hosts,
        "HOSTS",
        {
            "swin": hosts.Host("tiny Swin", tiny_swin, (64, 64)),
            "broken": hosts.Host("broken", broken, (64, 64)),
        },
    )
    path = tmp_path / "hosts.json"
    monkeypatch.setattr(sys, "argv", ["hosts.py", "--rounds", "1", "--json", str(path)])
    assert hosts.main() == 0
    rows = json.loads(path.read_text())["hosts"]
    for dtype in ("float32", "bfloat16"):
        row = rows["swin"][dtype]
        assert row["ratio"] == row["upstream"]["ms"] / row["fastbb"]["ms"] > 0
        assert 0 < row["upstream"]["inside_ms"] < row["upstream"]["ms"]
        assert "SwinLayer" in row["report"]
        assert rows["broken"][dtype]["reason"].startswith("RuntimeError: no such weights")
    counted = rows["swin"]["ledger"]
    assert 0 < counted["fastbb"]["launches"] < counted["upstream"]["launches"]
    assert 0 < counted["fastbb"]["bytes"] < counted["upstream"]["bytes"]
    printed = capsys.readouterr().out
    assert "| tiny Swin | 64x64 |" in printed and "does not run" in printed
    assert torch.is_grad_enabled()
