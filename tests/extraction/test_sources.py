import datetime
from decimal import Decimal

import pytest

from fastbb.extraction.sources import json_value, redact

SECRET_URL = "https://user:pa55@host.org:8080/a/b.jpg?X-Signature=s3cret&x=1#frag"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (SECRET_URL, "https://host.org:8080/a/b.jpg"),
        ("s3://key:s3cret@bucket/x@2x.png", "s3://bucket/x@2x.png"),
        ("https://host.org?token=s3cret", "https://host.org"),
        ("pipe:x.jpg", "pipe:x.jpg"),
        ("a/b?c@d.jpg", "a/b?c@d.jpg"),
    ],
)
def test_redact_removes_credentials(text: str, expected: str) -> None:
    assert redact(text) == expected


def test_values_of_columns_become_json() -> None:
    utc = datetime.datetime(2024, 1, 2, 3, 4, 5, tzinfo=datetime.timezone.utc)
    values = {
        "number": [1, True, 2.5, float("nan"), float("inf"), None, 2**70],
        "time": (utc, utc.date(), utc.time(), datetime.timedelta(minutes=1)),
        3: Decimal("1.10"),
    }
    assert json_value(values) == {
        "number": [1, True, 2.5, None, None, None, 2**70],
        "time": ["2024-01-02T03:04:05+00:00", "2024-01-02", "03:04:05", 60.0],
        "3": "1.10",
    }


def test_values_without_a_json_form_are_refused() -> None:
    nested: list = []
    for _ in range(33):
        nested = [nested]
    for value in (b"x", {1, 2}, nested):
        with pytest.raises(ValueError, match="no JSON value|nested more than 32"):
            json_value(value)
