"""Other ways to write a key, none of which leaves what a job may name."""

import unicodedata
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients.storage.key_variants import key_variants
from clients.storage.location import ObjectRef, check_key

NAME = "models/서울 é.safetensors"
NFD = unicodedata.normalize("NFD", NAME)


def keys_of(key: str) -> list[str]:
    return [ref.key for ref in key_variants(ObjectRef("media", key))]


def test_a_plain_key_has_one_spelling() -> None:
    assert keys_of("models/style-1/adapter_model.safetensors") == ["models/style-1/adapter_model.safetensors"]


@pytest.mark.parametrize(
    ("key", "spellings"),
    [
        (NAME, [NAME, NFD]),
        (NFD, [NFD, NAME]),
        (quote(NAME), [quote(NAME), NAME, NFD]),
        (quote(NFD), [quote(NFD), NFD, NAME]),
        ("100% wool.png", ["100% wool.png"]),
        ("a%ff.png", ["a%ff.png"]),
        ("a%0d%0ab.png", ["a%0d%0ab.png"]),
        ("a%20%252e%252e", ["a%20%252e%252e"]),
    ],
    ids=ascii,
)
def test_key_is_tried_as_it_is_then_normalised_otherwise_then_decoded(key: str, spellings: list[str]) -> None:
    assert keys_of(key) == spellings


@given(st.text(st.sampled_from("ab한é́/.%2efF5c0d "), min_size=1, max_size=30))
def test_key_variants_are_valid_keys(key: str) -> None:
    for spelling in keys_of(key):
        check_key(spelling, spelling)
