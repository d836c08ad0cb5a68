"""Ids of generations: which are trusted, which are the same, and the keys they make."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.messages.generation_id import GenerationId, image_key, is_generation_id, is_same

MAX_IMAGES = 8
UUID = "550e8400-e29b-41d4-a716-446655440000"
# Built of few parts, so that ids which read like others with a number behind them come up.
TEXTS = st.lists(st.sampled_from(["1", "2", "-", "a", ".", "_", UUID, "-2"]), min_size=1, max_size=4).map("".join)
IDS = (st.integers(1, 30) | st.just(2**63 - 1) | TEXTS).filter(is_generation_id)


@pytest.mark.parametrize("given_id", [1, 2**63 - 1, "1", "0", "-1", "5.0", "a", "..", "A.b-c_9", UUID, "a" * 128])
def test_a_number_or_plain_text_is_an_id(given_id: object) -> None:
    assert is_generation_id(given_id)


@pytest.mark.parametrize(
    "given_id",
    [True, 5.0, 0, -1, 2**63, None, [5], {}, "", "a b", "a/b", "a\n", "\n", "é", "５", "a" * 129, "a\0"],
    ids=repr,
)
def test_other_values_are_not_ids(given_id: object) -> None:
    assert not is_generation_id(given_id)


def test_number_and_its_text_are_one_generation_and_a_missing_id_is_not() -> None:
    assert is_same(456, "456")
    assert not is_same(456, "0456")
    assert not is_same("a", None)
    assert not is_same(None, None)


@pytest.mark.parametrize(
    ("given_id", "number", "name"),
    [
        (456, 1, "gen-456.png"),
        (456, 2, "gen-456-2.png"),
        (UUID, 1, f"gen-{UUID}.png"),
        (UUID, 3, f"gen-{UUID}-3.png"),
        ("shot", 1, "gen-shot.png"),
        ("shot", 2, "gen-shot~2.png"),
        ("shot-2", 1, "gen-shot-2.png"),
        ("456-2", 1, "gen-456-2~1.png"),
        ("..", 1, "gen-...png"),
    ],
)
def test_an_image_s_key_is_made_of_the_id(given_id: GenerationId, number: int, name: str) -> None:
    assert image_key(given_id, number) == f"generations/{name}"


@given(IDS, IDS, st.integers(1, MAX_IMAGES), st.integers(1, MAX_IMAGES))
def test_two_images_share_a_key_only_where_they_are_one(
    one: GenerationId, other: GenerationId, number: int, other_number: int
) -> None:
    is_one = is_same(one, other) and number == other_number

    assert (image_key(one, number) == image_key(other, other_number)) == is_one
    assert re.fullmatch(r"generations/gen-[A-Za-z0-9._~-]+\.png", image_key(one, number))
