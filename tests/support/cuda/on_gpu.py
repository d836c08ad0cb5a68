"""Which cases of a test belong to `pytest -m gpu`, where it takes a minute and not all of them."""

from collections.abc import Iterable
from typing import Any

import pytest


def on_gpu(cases: Iterable[Any], *chosen: Any) -> list[Any]:
    """List the cases for `parametrize`, the chosen ones marked `gpu`."""
    listed = list(cases)
    assert set(map(str, chosen)) <= set(map(str, listed)), f"{chosen} are not all among {listed}"
    return [
        pytest.param(*(one if isinstance(one, tuple) else (one,)), marks=pytest.mark.gpu if one in chosen else ())
        for one in listed
    ]
