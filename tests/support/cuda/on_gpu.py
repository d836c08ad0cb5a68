"""Which cases of a test belong to `pytest -m gpu`, where it takes a minute and not all of them."""

from collections.abc import Iterable
from typing import Any

import pytest


def on_gpu(cases: Iterable[Any], *chosen: Any) -> list[Any]:
    """List the cases for `parametrize`, the chosen ones marked `gpu`; those of `long_but` stay marked as they are."""
    listed = [one if hasattr(one, "marks") else pytest.param(*_values(one)) for one in cases]
    wanted = [_values(one) for one in chosen]
    assert all(values in [one.values for one in listed] for values in wanted), f"{chosen} are not all among {listed}"
    return [
        pytest.param(*one.values, marks=(*one.marks, pytest.mark.gpu) if one.values in wanted else one.marks)
        for one in listed
    ]


def _values(case: Any) -> tuple[Any, ...]:
    return case if isinstance(case, tuple) else (case,)
