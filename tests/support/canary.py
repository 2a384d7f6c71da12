"""Canary: a kernel bug that a check of the harness must catch."""

from collections.abc import Callable
from typing import NamedTuple

import pytest


class Canary(NamedTuple):
    """A bug, the check that runs it, and the error that it must raise."""

    check: Callable[[str], None]
    caught_by: type[Exception]
    message: str

    def assert_caught(self, bug: str) -> None:
        with pytest.raises(self.caught_by, match=self.message) as caught:
            self.check(bug)
        assert type(caught.value) is self.caught_by
