"""How many pages the settings and the memory give, decided by figures alone."""

import logging

import pytest

from inference.errors import EngineStartFailed
from inference.lora.adapter_memory import AdapterMemory

PAGE = 60_000_000


@pytest.mark.parametrize(
    ("max_bytes", "num_pages"),
    [
        (None, 512),
        (513 * PAGE, 512),
        (100_000_000 * PAGE, 512),
        (513 * PAGE - 1, 511),
        (33 * PAGE, 32),
    ],
)
@pytest.mark.parametrize("is_chosen", [False, True])
def test_the_pages_are_those_of_all_slots_or_those_that_the_limit_holds_beside_the_zero_page(
    max_bytes: int | None, num_pages: int, is_chosen: bool
) -> None:
    memory = AdapterMemory(num_slots=16, max_rank=256, max_bytes=max_bytes, is_chosen=is_chosen)

    assert memory.num_pages(PAGE) == num_pages


@pytest.mark.parametrize(
    ("max_bytes", "expected"),
    [
        (1_500_000_000, "set ADAPTER_MEMORY_GB to 1.98 or more, or ADAPTER_MAX_RANK to 192 or less"),
        (100_000_000, "set ADAPTER_MEMORY_GB to 1.98 or more"),
    ],
)
def test_a_chosen_limit_that_does_not_hold_one_adapter_is_refused_with_what_would_be_right(
    max_bytes: int, expected: str
) -> None:
    memory = AdapterMemory(num_slots=16, max_rank=256, max_bytes=max_bytes, is_chosen=True)

    with pytest.raises(EngineStartFailed) as caught:
        memory.num_pages(PAGE)

    assert str(caught.value).startswith(f"ADAPTER_MEMORY_GB {max_bytes / 1e9:g} does not hold one adapter of")
    assert str(caught.value).endswith(f"ADAPTER_MAX_RANK 256 in this model, which may take 1.98 GB: {expected}")


@pytest.mark.parametrize(("max_bytes", "num_pages"), [(33 * PAGE - 1, 31), (2 * PAGE, 1), (PAGE, 1), (0, 1)])
def test_small_share_of_free_memory_lowers_the_maximum_rank_with_a_warning(
    max_bytes: int, num_pages: int, caplog: pytest.LogCaptureFixture
) -> None:
    memory = AdapterMemory(num_slots=16, max_rank=256, max_bytes=max_bytes)

    assert memory.num_pages(PAGE) == num_pages

    (record,) = caplog.records
    fields = vars(record)["fields"]
    assert record.levelno == logging.WARNING
    assert (fields["max_rank"], fields["needed_gb"]) == (8 * num_pages, 1.98)
