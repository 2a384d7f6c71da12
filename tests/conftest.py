"""Fixtures of every test: seeds, one thread, no network, and NaN in fresh memory."""

import ipaddress
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import hub
from PIL import Image

__all__ = ["hub"]

pytest.register_assert_rewrite("contract", "conv_reference", "tolerance")

OPS = Path(__file__).parent / "ops"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-architectures",
        action="store_true",
        help="compile kernels for every GPU, not only for two (`make test-all`)",
    )


def pytest_configure() -> None:
    # Daft and Ray report their use, Daft when it is imported
    os.environ |= {"DAFT_ANALYTICS_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    # a Ray of its own for each test: that of another one, or a dead one, would be joined
    os.environ["RAY_ADDRESS"] = "local"
    # OpenVINO reports its use when it is imported, unless this package cannot be
    modules: dict[str, Any] = sys.modules
    modules["openvino_telemetry"] = None
    # the workers of pytest-xdist share the cores
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Seeds random numbers, so that every run of a test draws the same."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fills `torch.empty` with NaN in tests/ops, so that no op passes by reading a lucky zero."""
    if OPS not in request.path.parents:
        yield
        return
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # pyright: ignore[reportAttributeAccessIssue] - set by torch through a module property
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A directory of three plain images."""
    directory = tmp_path / "images"
    directory.mkdir()
    for i in range(3):
        Image.new("RGB", (9, 8), (80 * i, 40, 200)).save(directory / f"{i}.png")
    return directory


@pytest.fixture(autouse=True, scope="session")
def loopback_only() -> Iterator[None]:
    """Refuses every connection that would leave this machine, at once and with its address."""
    connect, getaddrinfo = socket.socket.connect, socket.getaddrinfo

    def guarded_connect(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not is_loopback(address[0]):
            raise OSError(f"tests do not use the network: connection to {address} refused")
        connect(self, address)

    def guarded_getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_loopback(host):
            raise OSError(f"tests do not use the network: no address for {host}")
        return getaddrinfo(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded_connect)
        patch.setattr(socket, "getaddrinfo", guarded_getaddrinfo)
        yield


def is_loopback(host: Any) -> bool:
    """Whether a host of a socket address is this machine; None and "" are, as wildcards."""
    host = host.decode() if isinstance(host, bytes) else host
    if host in (None, "", "localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
