"""The measures of the load of four sizes, and its arrivals."""

import random
from itertools import pairwise

import pytest

from benchmarks.batching.mixed import SIZES, arrivals, jain_index, median_and_p95


@pytest.mark.parametrize(
    ("slowdowns", "index"), [([3.0, 3.0, 3.0], 1.0), ([1.0, 0.0, 0.0, 0.0], 0.25), ([1.0, 2.0, 3.0], 36 / 42)]
)
def test_jain_index_is_one_for_equal_slowdowns_and_one_in_n_where_one_job_has_all(
    slowdowns: list[float], index: float
) -> None:
    assert jain_index(slowdowns) == pytest.approx(index)


@pytest.mark.parametrize(("num_values", "p95"), [(1, 1), (19, 19), (20, 19), (100, 95)])
def test_percentile_is_the_smallest_value_that_enough_others_are_not_above(num_values: int, p95: int) -> None:
    assert median_and_p95(range(1, num_values + 1))["p95"] == p95


def test_arrivals_come_at_the_rate_and_in_the_shares_that_were_asked_for() -> None:
    found = arrivals(random.Random(0), 20_000, rate=4.0)

    gaps = [later.at - earlier.at for earlier, later in pairwise(found)]
    assert sum(gaps) / len(gaps) == pytest.approx(0.25, rel=0.05)
    # Of exponential gaps the variance is the mean's square.
    assert sum(gap**2 for gap in gaps) / len(gaps) == pytest.approx(2 * 0.25**2, rel=0.05)
    for size in SIZES:
        assert sum(one.size is size for one in found) / len(found) == pytest.approx(size.share, abs=0.02)


def test_arrivals_of_one_seed_keep_their_sizes_and_order_at_another_rate() -> None:
    slow, fast = (arrivals(random.Random(1), 50, rate) for rate in (1.0, 8.0))

    assert [one.size for one in slow] == [one.size for one in fast]
    assert [one.at for one in slow] == pytest.approx([8 * one.at for one in fast])
