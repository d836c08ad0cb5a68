"""The published contract, as a backend's engineer would load it: docs/asyncapi.yaml and the schemas beside it."""

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import yaml
from jsonschema import Draft7Validator

from tests.support.paths import ROOT

DOCS = ROOT / "docs"


@cache
def document() -> dict[str, Any]:
    """Load AsyncAPI's document, its references unresolved."""
    loaded: dict[str, Any] = yaml.safe_load((DOCS / "asyncapi.yaml").read_text(encoding="utf-8"))
    return loaded


@cache
def validator_of(name: str) -> Draft7Validator:
    """Build the validator of the messages of one name: job, cancel, progress, complete or failed."""
    return Draft7Validator(json.loads((DOCS / "schemas" / f"{name}.json").read_text(encoding="utf-8")))


@cache
def header_validator() -> Draft7Validator:
    """Build the validator of a webhook's headers, by the names that the document writes them with."""
    return Draft7Validator(document()["components"]["messageBindings"]["webhook"]["http"]["headers"])


def examples() -> Iterator[tuple[str, str, Any]]:
    """Yield message, name and payload of every example in the document."""
    for message, described in document()["components"]["messages"].items():
        for example in described["examples"]:
            yield message, example["name"], example["payload"]


def assert_webhook_fits(kind: str, body: Any, headers: dict[str, str]) -> None:
    """Fail with what is wrong where a webhook is not one of the contract. Names of headers count in any case."""
    validator_of(kind).validate(body)
    written = {name.lower(): name for name in header_validator().schema["properties"]}
    header_validator().validate({written.get(name.lower(), name): value for name, value in headers.items()})
