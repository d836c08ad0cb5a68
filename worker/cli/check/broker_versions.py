"""Tell which broker answers, and what of it the tests have not run on."""

import re
from collections.abc import Mapping

RABBITMQ = "RabbitMQ"
# What `make test` and `make matrix` have run on, with all tests of the broker passed.
TESTED = ((3, 10), (3, 12), (4, 0), (4, 3))


def describe_broker(properties: Mapping[str, object]) -> str:
    """Describe the broker by what it says of itself as a connection is opened."""
    product, version = str(properties.get("product", "a broker")), str(properties.get("version", ""))
    found = re.match(r"(\d{1,9})\.(\d{1,9})", version)
    named = f"{product} {version or 'of a version that it does not tell'}"
    if product != RABBITMQ or found is None:
        return f"{named}; the tests run on {RABBITMQ} {_listed()} alone"
    release = (int(found[1]), int(found[2]))
    if release in TESTED:
        return named
    if release < TESTED[0]:
        return f"{named}, older than what is supported; the tests run on {_listed()}"
    if release > TESTED[-1]:
        return f"{named}, newer than the newest that the tests run on, {_dotted(TESTED[-1])}"
    return f"{named}; the tests run on {_listed()}"


def _listed() -> str:
    *others, newest = map(_dotted, TESTED)
    return f"{', '.join(others)} and {newest}"


def _dotted(release: tuple[int, int]) -> str:
    return ".".join(map(str, release))
