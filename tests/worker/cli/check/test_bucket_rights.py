"""The policy in docs/bucket-rights.md is enough for every check, and each right that it lacks is named by one."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from clients.storage.client import Storage
from config.store import StoreSettings
from tests.support.servers.policy_store import PolicyStore, documented_policy
from worker.cli.check.checks import CheckFailed
from worker.cli.check.result_address import check_result_address
from worker.cli.check.store import StoreProbe

WHOLE = "whole"


class Right(NamedTuple):
    """One action on one resource."""

    action: str
    resource: str

    @property
    def statement(self) -> dict[str, str]:
        return {"Effect": "Allow", "Action": self.action, "Resource": self.resource}


RIGHTS = [
    Right(action, resource)
    for statement in documented_policy()["Statement"]
    for action in statement["Action"]
    for resource in statement["Resource"]
]
# What is there is known to jobs alone.
UNTRIED = [Right("s3:GetObject", f"arn:aws:s3:::media/{folder}/*") for folder in ("models", "signatures", "uploads")]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PolicyStore]:
    policies: dict[str, dict[str, Any]] = {
        f"without-{number}": {
            "Version": "2012-10-17",
            "Statement": [other.statement for other in RIGHTS if other != right],
        }
        for number, right in enumerate(RIGHTS)
    }
    with PolicyStore(tmp_path_factory.mktemp("store"), policies | {WHOLE: documented_policy()}) as running:
        running.make_buckets()
        yield running


def results_of(store: PolicyStore, name: str) -> Iterator[tuple[str, str]]:
    """Yield what each check of the store says of a worker with that policy, and whether it failed."""
    settings = StoreSettings(**store.env_of(name), RESULT_URL_MODE="presigned:60")  # type: ignore[call-arg, arg-type]
    probe = StoreProbe(settings, has_previews=True)
    checks: dict[str, Callable[[], str]] = {
        "bucket": probe.bucket,
        "results bucket": probe.results_bucket,
        "input buckets": probe.input_buckets,
        "conditional writes": probe.conditional_writes,
        "result address": lambda: check_result_address(settings),
    }
    for part, check in checks.items():
        try:
            yield part, f"good: {check()}"
        except CheckFailed as error:
            yield part, f"bad: {error}"


def test_documented_policy_passes_every_check(store: PolicyStore) -> None:
    said = dict(results_of(store, WHOLE))

    assert [part for part, result in said.items() if not result.startswith("good")] == [], said
    assert said["input buckets"] == "good: styles can be listed and read"
    assert said["result address"].endswith("/pictures/generations/\u2026 opens for 60 s")
    for bucket in ("media", "pictures"):
        assert [*Storage(store_settings(store)).list_objects(bucket, "")] == [], "a probe is left"


def store_settings(store: PolicyStore) -> StoreSettings:
    return StoreSettings(**store.env("media"))  # type: ignore[arg-type]


@pytest.mark.parametrize("right", [right for right in RIGHTS if right not in UNTRIED], ids=" on ".join)
def test_each_missing_right_is_named(store: PolicyStore, right: Right) -> None:
    # A folder's whole, where the right is for some of its objects.
    wanted = f"{right.action} on {right.resource.replace('*.lease', '*').replace('check-*', '*')}"
    said = []
    for part, result in results_of(store, f"without-{RIGHTS.index(right)}"):
        said.append((part, result))
        if wanted in result:
            return
    raise AssertionError(said)
