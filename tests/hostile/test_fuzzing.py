"""The short form of the fuzzing that `make hostile` does: nothing comes out of a reader but what it says it raises."""

from pathlib import Path

import pytest

from examples.parts.rabbitmq import RabbitMQ
from tests.hostile.fuzzed_deliveries import run
from tests.hostile.fuzzing import Tally, adapter_target, fuzz, pure_targets
from tests.support.long import IS_LONG, long

NUM_MESSAGES = 1000
NUM_OTHERS = 500
NUM_ADAPTERS = 50
NUM_DELIVERIES = 300 if IS_LONG else 100
# A hostile input is refused in milliseconds; what it aims at takes minutes or gigabytes.
MAX_SECONDS = 20.0
MAX_GROWTH_MB = 200.0


def assert_harmless(tally: Tally) -> None:
    assert tally.crashes == []
    assert tally.slowest_seconds < MAX_SECONDS
    assert tally.grown_mb < MAX_GROWTH_MB
    assert len(tally.outcomes) > 1, "everything ends alike: the mutations are too crude or too tame"


@pytest.mark.parametrize("name", pure_targets())
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_text_and_images_are_read_or_refused(name: str) -> None:
    assert_harmless(fuzz(pure_targets()[name], NUM_MESSAGES if name == "messages" else NUM_OTHERS))


@pytest.mark.parametrize("family", ["sd", pytest.param("sdxl", marks=long), "z-image"])
def test_damaged_adapters_are_read_or_refused(family: str, tmp_path: Path) -> None:
    assert_harmless(fuzz(adapter_target(tmp_path, family), NUM_ADAPTERS))


def test_deliveries_with_fuzzed_properties_all_end_on_one_connection(rabbitmq: RabbitMQ) -> None:
    figures = run(rabbitmq, NUM_DELIVERIES)

    assert figures["deliveries"] == NUM_DELIVERIES
    assert figures["connections lost"] == 0
    assert min(figures["outcomes"].values()) > 0
