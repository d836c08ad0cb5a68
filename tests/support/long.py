"""The mark of tests that `make test` leaves out: each has a shorter form beside it. `make long` runs them all."""

import os
from collections.abc import Iterable
from typing import Any

import pytest

IS_LONG = "LONG" in os.environ
long = pytest.mark.skipif(not IS_LONG, reason="long: `make long` runs it")


def long_but(cases: Iterable[Any], *short: Any) -> list[Any]:
    """List the cases for `parametrize`, all but the short ones marked `long`."""
    listed = list(cases)
    assert set(map(str, short)) <= set(map(str, listed)), f"{short} are not all among {listed}"
    return [
        pytest.param(*(one if isinstance(one, tuple) else (one,)), marks=() if one in short else long) for one in listed
    ]
