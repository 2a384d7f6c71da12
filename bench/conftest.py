import pytest
import torch


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def time_op(benchmark, device):
    """Times `fn()` to the end of the device's work, and records hardware and versions."""

    def call(fn):
        fn()
        if device.type == "cuda":
            torch.cuda.synchronize()

    def run(fn):
        name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
        benchmark.extra_info.update(
            device=name, torch=torch.__version__, threads=torch.get_num_threads()
        )
        rounds = 20 if device.type == "cuda" else 5
        return benchmark.pedantic(call, args=(fn,), rounds=rounds, warmup_rounds=1)

    return run
