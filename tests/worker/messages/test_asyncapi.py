"""docs/asyncapi.yaml: AsyncAPI's own parser finds nothing wrong, and what it says is what the code does."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from clients.webhooks import DEFAULT_ROUTES, Webhook, WebhookClient, WebhookKind
from config.backend import BackendSettings
from tests.support.contract_schemas import DOCS, assert_webhook_fits, document, examples, header_validator
from tests.support.long import long
from tests.support.pages.asyncapi import PAGE, render
from tests.support.paths import ROOT
from tests.support.servers.clients_servers import AnsweringServer, answer
from tests.support.world import NODE
from worker.amqp.topology import QueueNames

# As the parser counts: 0 is an error and 1 a warning; 2 tells that there is a newer version of AsyncAPI.
WARNING = 1
NAMES = QueueNames("image_generation")


def parser_says(path: Path) -> dict[str, Any]:
    command = [NODE, "tests/worker/messages/asyncapi_problems.mjs", str(path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, f"{ended.stderr}\nIs node_modules there? make test installs it."
    said: dict[str, Any] = json.loads(ended.stdout)
    return said


def serious(said: dict[str, Any]) -> list[dict[str, Any]]:
    return [problem for problem in said["problems"] if problem["severity"] <= WARNING]


def test_page_for_people_is_the_one_that_the_document_makes() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "run python -m tests.support.pages.asyncapi"


def test_the_official_parser_finds_no_error_and_no_warning() -> None:
    said = parser_says(DOCS / "asyncapi.yaml")

    assert serious(said) == []
    paths = [path for _, path in DEFAULT_ROUTES.values()]
    assert said["channels"] == [NAMES.jobs, NAMES.cancel_exchange, *paths]


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("method: PATCH", "method: PAT"),
        pytest.param("./schemas/cancel.json", "./schemas/none.json", marks=long),
    ],
)
def test_official_parser_finds_mistakes(tmp_path: Path, right: str, wrong: str) -> None:
    shutil.copytree(DOCS / "schemas", tmp_path / "schemas")
    text = (DOCS / "asyncapi.yaml").read_text(encoding="utf-8")
    (tmp_path / "asyncapi.yaml").write_text(text.replace(right, wrong), encoding="utf-8")

    assert serious(parser_says(tmp_path / "asyncapi.yaml")) != []


@pytest.mark.parametrize("kind", WebhookKind)
def test_each_webhook_has_its_method_and_its_path(kind: WebhookKind) -> None:
    operation = document()["operations"][f"send{kind.value.capitalize()}"]
    channel = document()["channels"][operation["channel"]["$ref"].rpartition("/")[2]]

    assert operation["action"] == "send"
    assert (operation["bindings"]["http"]["method"], channel["address"]) == DEFAULT_ROUTES[kind]


def test_queue_and_exchange_are_declared_as_the_worker_declares_them() -> None:
    queue = document()["channels"]["jobs"]["bindings"]["amqp"]["queue"]
    exchange = document()["channels"]["cancels"]["bindings"]["amqp"]["exchange"]

    assert (queue["name"], queue["durable"], NAMES.arguments[NAMES.jobs]) == (NAMES.jobs, True, {})
    assert (exchange["name"], exchange["type"]) == (NAMES.cancel_exchange, "fanout")


def test_own_queues_are_named_and_are_not_channels() -> None:
    own = [name.removeprefix(NAMES.jobs) for name in NAMES.everything if name != NAMES.jobs]

    assert len(own) >= 5
    assert [name for name in own if f"`{name}`" not in document()["info"]["description"]] == []
    addresses = {channel["address"] for channel in document()["channels"].values()}
    assert addresses & set(NAMES.everything) == {NAMES.jobs}


def test_messages_point_to_their_schemas() -> None:
    messages = document()["components"]["messages"]

    assert {name: described["payload"]["$ref"] for name, described in messages.items()} == {
        name: f"./schemas/{name}.json" for name in messages
    }


def headers_of(request: bytes) -> dict[str, str]:
    lines = request.partition(b"\r\n\r\n")[0].decode().split("\r\n")[1:]
    return dict(line.split(": ", 1) for line in lines)


@pytest.mark.parametrize("secret", [None, "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"], ids=["unsigned", "signed"])
@pytest.mark.parametrize("kind", WebhookKind)
def test_sent_webhooks_have_the_headers_of_the_document(kind: WebhookKind, secret: str | None) -> None:
    body = next(payload for name, _, payload in examples() if name == kind.value)
    with AnsweringServer([answer(200)]) as server:
        settings = BackendSettings(
            BACKEND_API_URL=server.url,  # type: ignore[call-arg]
            INTERNAL_API_TOKEN="token",
            WEBHOOK_SIGNING_SECRET=secret,
        )
        WebhookClient(settings).send(Webhook(kind, f"660f9511:{kind.value}", body))

    headers = headers_of(server.requests[0])
    assert_webhook_fits(kind.value, json.loads(server.requests[0].partition(b"\r\n\r\n")[2]), headers)
    assert ("webhook-signature" in headers) == (secret is not None)


def test_headers_that_are_wrong_do_not_fit() -> None:
    good = {
        "Authorization": "Bearer token",
        "X-Request-Source": "inference-server",
        "Content-Type": "application/json",
        "webhook-id": "660f9511:complete",
        "webhook-timestamp": "1800000000",
    }
    header_validator().validate(good)

    for name in good:
        assert not header_validator().is_valid(good | {name: "\n"})
        assert not header_validator().is_valid({other: good[other] for other in good if other != name})
