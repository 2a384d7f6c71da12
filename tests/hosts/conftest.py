"""Fixtures of the host models' tests."""

from collections.abc import Callable
from typing import Any

import pytest
from tiny_hosts import HOSTS


@pytest.fixture(params=HOSTS.values(), ids=list(HOSTS))
def make(request: pytest.FixtureRequest) -> Callable[[], Any]:
    """Builds a tiny host, with the same weights each time."""
    return request.param
