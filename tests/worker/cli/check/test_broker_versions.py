"""The row "broker": which version answers, and what of it the tests have not run on."""

import pytest

from worker.cli.check.broker_versions import TESTED, describe_broker


def described(version: object, product: str = "RabbitMQ") -> str:
    return describe_broker({"product": product, "version": version})


@pytest.mark.parametrize(("major", "minor"), TESTED)
def test_a_tested_release_is_named_alone_whatever_its_patch(major: int, minor: int) -> None:
    assert described(f"{major}.{minor}.31") == f"RabbitMQ {major}.{minor}.31"
    assert described(f"{major}.{minor}.0-rc.1") == f"RabbitMQ {major}.{minor}.0-rc.1"


@pytest.mark.parametrize(
    ("version", "note"),
    [
        ("3.9.29", "older than what is supported; the tests run on 3.10, 3.12, 4.0 and 4.3"),
        ("2.8.4", "older than what is supported"),
        ("3.11.0", "; the tests run on 3.10, 3.12, 4.0 and 4.3"),
        ("4.1.4", "; the tests run on 3.10, 3.12, 4.0 and 4.3"),
        ("4.4.0", "newer than the newest that the tests run on, 4.3"),
        ("4.10.0", "newer than the newest that the tests run on, 4.3"),
        ("5.0.1", "newer than the newest"),
    ],
)
def test_what_the_tests_have_not_run_on_is_said(version: str, note: str) -> None:
    assert described(version).startswith(f"RabbitMQ {version}")
    assert note in described(version)


@pytest.mark.parametrize("version", ["", "unknown", "v4", 4, b"\xff"])
def test_a_version_that_cannot_be_read_is_no_failure(version: object) -> None:
    assert "the tests run on RabbitMQ 3.10, 3.12, 4.0 and 4.3 alone" in described(version)


def test_another_broker_is_named() -> None:
    assert described("2.4.1", "LavinMQ") == "LavinMQ 2.4.1; the tests run on RabbitMQ 3.10, 3.12, 4.0 and 4.3 alone"
    assert describe_broker({}).startswith("a broker of a version that it does not tell; the tests run on RabbitMQ")
