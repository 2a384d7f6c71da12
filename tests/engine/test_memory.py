"""Memory that a forward pass takes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastbb.engine.memory import TensorMemory, free_bytes, tensor_memory

X = torch.ones(1, 10)  # 40 bytes


def test_tensors_that_live_at_the_same_time_count_together() -> None:
    def run(x: Tensor) -> Tensor:
        y = x.repeat(5, 1)  # 200
        z = y * 2  # 400
        del y  # 200
        flat = z.flatten()  # a view
        del z
        return (flat[:10] + x).sum()  # 240, 244

    assert tensor_memory(run, X) == TensorMemory(largest=200, peak=400)


def test_a_view_keeps_the_memory_of_its_base() -> None:
    def run(x: Tensor) -> Tensor:
        row = x.repeat(5, 1)[0]
        return row + x.repeat(2, 1)[0]  # 200 + 80 + 40

    assert tensor_memory(run, X) == TensorMemory(largest=200, peak=320)


def test_tensors_made_in_the_first_call_only_do_not_count() -> None:
    made: list[Tensor] = []

    def run(x: Tensor) -> Tensor:
        if not made:
            made.append(torch.ones(10_000))  # folded weights, for example
        return x * made[0][0]

    assert tensor_memory(run, X) == TensorMemory(40, 40)


def test_results_without_tensors_count_nothing() -> None:
    assert tensor_memory(lambda x: x.shape, X) == TensorMemory(0, 0)


def test_cached_blocks_are_free_unless_a_graph_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def segment(total: int, device: int = 0, pool: tuple[int, int] = (0, 0)) -> dict[str, Any]:
        sizes = {"total_size": total, "allocated_size": 3}
        return {**sizes, "device": device, "segment_pool_id": pool}

    segments = [segment(7), segment(5), segment(100, device=1), segment(1000, pool=(0, 1))]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10, 20))
    assert free_bytes(torch.device("cuda", 0)) == 10 + 4 + 2
