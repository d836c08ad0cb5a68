"""Run the kernel of adapters in Triton's interpreter against a plain product: `TRITON_INTERPRET=1 python -m` this.

In a process of its own: Triton reads the variable when it is imported, for good.
"""

import sys
from collections.abc import Sequence

import torch
from hypothesis import HealthCheck, given, settings

from inference.lora.products.paged_products import find_paged_products
from inference.lora.products.static_table import static_products, tabulate
from tests.support.long import IS_LONG
from tests.support.models.low_rank_cases import CPU, Case, Scene, cases

NUM_CASES = 60 if IS_LONG else 12
# The interpreter knows no bfloat16.
ERRORS = {torch.float32: 2e-6, torch.float16: 4e-3}


@settings(max_examples=NUM_CASES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(cases(tuple(ERRORS), max_rank=128))
def check(case: Case) -> None:
    """Fail unless every row's outputs are those of its own adapters within rounding."""
    scene = Scene(case)
    bank = scene.bank
    runs = bank._runs_by_group(scene.rows)
    counts = {group: scene.token_counts.get(group.names[0]) for group in runs}
    for group, products in find_paged_products(runs, counts, CPU).items():
        group.products = products
    with torch.inference_mode():
        assert_right(scene, scene.draw(), ERRORS[case.dtype])
        # Of adapters that leave convolutions alone, as captured forwards take them; images are not in channels_last.
        paged = {group: own for group, own in runs.items() if group.conv is None}
        if paged and not case.is_concatenated and case.part not in {"conv", "shortcut"}:
            table = tabulate(list(paged), paged, len(scene.rows))
            assert table is not None
            for group, static in static_products(list(paged), table, len(scene.rows), ()).items():
                group.products = static
            assert_right(scene, scene.draw(), ERRORS[case.dtype])


def assert_right(scene: Scene, drawn: Sequence[torch.Tensor], most: float) -> None:
    for output, expected in zip(drawn, scene.expected(), strict=True):
        error = (output.double() - expected).abs().max() / expected.abs().max().clamp(min=1)
        assert error <= most, float(error)


if __name__ == "__main__":
    check()
    sys.stdout.write(f"{NUM_CASES} cases\n")
