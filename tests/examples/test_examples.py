"""The examples for backends: receivers that accept no forgery and act once, alone and around a worker."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest
import requests

from clients.webhook_signature import sign_payload, signing_key
from clients.webhooks import Webhook, WebhookKind, WebhookResult
from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS
from tests.examples.test_parts import assert_nothing_runs_below, processes_below
from tests.faults.station import start_light_worker
from tests.support.contract_schemas import examples
from tests.support.example_programs import RECEIVERS, SECRET, TOKEN, Receiver, run_publisher
from tests.support.paths import ROOT
from tests.support.world import HANG_SECONDS, World, eventually, new_world

BODIES = {name: payload for name, _, payload in examples()}
URL = BODIES["complete"]["result_url"]
EFFECTS = {"progress": "75 %", "complete": URL, "failed": "CANCELLED"}
COMPLETE_PATH = "/api/webhooks/inference/complete"
NUM_AT_ONCE = 8


@pytest.fixture(scope="module", params=RECEIVERS)
def receiver(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Receiver]:
    """Run a receiver of either language."""
    made = Receiver(request.param, tmp_path_factory.mktemp("receiver"))
    made.start()
    yield made
    made.stop()


@pytest.fixture
def generation_id(receiver: Receiver) -> int:
    """Register a generation of the test's own with the receiver."""
    number = uuid.uuid4().int % 2**31
    receiver.expect(number)
    return number


def webhook_of(kind: str, generation_id: int, webhook_id: str = "") -> Webhook:
    body = BODIES[kind] | {"generation_id": generation_id}
    return Webhook(WebhookKind(kind), webhook_id or f"{uuid.uuid4()}:{kind}", body)


# --- Receivers alone, told by the worker's own client


@pytest.mark.parametrize("kind", EFFECTS)
def test_webhook_delivered_three_times_has_one_effect(receiver: Receiver, generation_id: int, kind: str) -> None:
    webhook = webhook_of(kind, generation_id)

    attempts = [receiver.client().send(webhook) for _ in range(3)]

    assert [attempt.result for attempt in attempts] == [WebhookResult.DELIVERED] * 3
    assert receiver.effects(generation_id) == [(kind, EFFECTS[kind])]


def test_one_address_takes_every_kind(receiver: Receiver, generation_id: int) -> None:
    client = receiver.client(WEBHOOK_URL="/hooks/darkroom")

    attempts = [client.send(webhook_of(kind, generation_id)) for kind in EFFECTS]

    assert [attempt.result for attempt in attempts] == [WebhookResult.DELIVERED] * len(EFFECTS)
    assert receiver.effects(generation_id) == [*EFFECTS.items()]


def test_webhook_delivered_at_once_on_many_connections_has_one_effect(receiver: Receiver, generation_id: int) -> None:
    webhook = webhook_of("complete", generation_id)

    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        attempts = list(pool.map(lambda _: receiver.client().send(webhook), range(NUM_AT_ONCE)))

    assert {attempt.result for attempt in attempts} == {WebhookResult.DELIVERED}
    assert receiver.effects(generation_id) == [("complete", URL)]


def test_effects_outlive_a_restart(receiver: Receiver, generation_id: int) -> None:
    webhook = webhook_of("complete", generation_id)
    receiver.client().send(webhook)

    receiver.stop()
    receiver.start()

    assert receiver.client().send(webhook).result is WebhookResult.DELIVERED
    assert receiver.effects(generation_id) == [("complete", URL)]


def test_a_second_task_of_the_same_generation_has_its_own_effect(receiver: Receiver, generation_id: int) -> None:
    for kind in ("failed", "complete"):
        receiver.client().send(webhook_of(kind, generation_id))

    assert receiver.effects(generation_id) == [("failed", "CANCELLED"), ("complete", URL)]


def test_unknown_generation_is_answered_404_and_delivered_later(receiver: Receiver) -> None:
    number = uuid.uuid4().int % 2**31
    webhook = webhook_of("complete", number)

    early = receiver.client().send(webhook)
    receiver.expect(number)
    late = receiver.client().send(webhook)

    assert (early.status, early.result, late.result) == (404, WebhookResult.RETRY, WebhookResult.DELIVERED)
    assert receiver.effects(number) == [("complete", URL)]


WRONG = {
    "a wrong token": {"INTERNAL_API_TOKEN": "another"},
    "a forged signature": {"WEBHOOK_SIGNING_SECRET": "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSx"},
    "no signature": {"WEBHOOK_SIGNING_SECRET": None},
    "an old timestamp": {"now": lambda: time.time() - 330},
    "one from the future": {"now": lambda: time.time() + 330},
}


# Every address is guarded, and every mistake is found at one.
@pytest.mark.parametrize(
    ("kind", "wrong"), [*product(["complete"], WRONG), ("progress", "no signature"), ("failed", "no signature")]
)
def test_invalid_webhook_is_refused_without_an_effect(
    receiver: Receiver, generation_id: int, kind: str, wrong: str
) -> None:
    webhook = webhook_of(kind, generation_id)

    assert receiver.client(**WRONG[wrong]).send(webhook).status == 401
    assert receiver.effects(generation_id) == []
    # Nor has it used up the id.
    assert receiver.client().send(webhook).result is WebhookResult.DELIVERED
    assert receiver.effects(generation_id) == [(kind, EFFECTS[kind])]


@pytest.mark.parametrize("shift_seconds", [-270, 270])
def test_clocks_may_differ_by_some_minutes(receiver: Receiver, generation_id: int, shift_seconds: int) -> None:
    client = receiver.client(now=lambda: time.time() + shift_seconds)

    assert client.send(webhook_of("complete", generation_id)).result is WebhookResult.DELIVERED


def signed_headers(webhook: Webhook, payload: bytes) -> dict[str, str]:
    """Return the headers that `payload` would be sent with."""
    now = int(time.time())
    return {
        "Authorization": f"Bearer {TOKEN}",
        "Content-Type": "application/json",
        "webhook-id": webhook.webhook_id,
        "webhook-timestamp": str(now),
        "webhook-signature": sign_payload(signing_key(SECRET), webhook.webhook_id, now, payload),
    }


Change = Callable[[dict[str, str], bytes], tuple[dict[str, str], bytes]]
TAMPERED: dict[str, Change] = {
    "another body": lambda headers, payload: (headers, payload.replace(b".png", b".PNG")),
    "the same body in other bytes": lambda headers, payload: (headers, payload + b" "),
    "another id": lambda headers, payload: (headers | {"webhook-id": "another:complete"}, payload),
    "a later timestamp": lambda headers, payload: (
        headers | {"webhook-timestamp": str(int(time.time()) + 60)},
        payload,
    ),
    "a timestamp in words": lambda headers, payload: (headers | {"webhook-timestamp": "now"}, payload),
    "an empty signature": lambda headers, payload: (headers | {"webhook-signature": ""}, payload),
    "a signature of another kind": lambda headers, payload: (
        headers | {"webhook-signature": headers["webhook-signature"].replace("v1,", "v1a,")},
        payload,
    ),
}


@pytest.mark.parametrize("change", TAMPERED)
def test_webhook_changed_in_transit_is_refused(receiver: Receiver, generation_id: int, change: str) -> None:
    webhook = webhook_of("complete", generation_id)
    headers, payload = TAMPERED[change](signed_headers(webhook, webhook.payload), webhook.payload)

    answer = requests.post(receiver.url + COMPLETE_PATH, data=payload, headers=headers, timeout=120)

    assert answer.status_code == 401
    assert receiver.effects(generation_id) == []


def test_one_right_signature_among_several_is_enough(receiver: Receiver, generation_id: int) -> None:
    webhook = webhook_of("complete", generation_id)
    headers = signed_headers(webhook, webhook.payload)
    headers["webhook-signature"] = f"v1,AAAA v2,x {headers['webhook-signature']}"

    answer = requests.post(receiver.url + COMPLETE_PATH, data=webhook.payload, headers=headers, timeout=120)

    assert answer.status_code == 200
    assert receiver.effects(generation_id) == [("complete", URL)]


# --- The parts


def test_demo_parts_run_until_interrupted_print_their_addresses_and_leave_no_process_behind(tmp_path: Path) -> None:
    dotenv = tmp_path / ".env"
    command = [sys.executable, "-m", "examples.parts"]
    own = os.environ | {"TMPDIR": str(tmp_path)}
    with dotenv.open("wb") as sink, subprocess.Popen(command, cwd=ROOT, env=own, stdout=sink) as parts:
        eventually(lambda: "GUIDANCE_SCALE" in dotenv.read_text())
        env = dict(line.split("=", 1) for line in dotenv.read_text().splitlines())

        task_id = run_publisher("python", env, 1, "a red fox")
        assert {"beam.smp", "epmd", "weed"} <= set(processes_below(tmp_path))
        parts.send_signal(signal.SIGINT)

        assert parts.wait(HANG_SECONDS) == 0
    assert_nothing_runs_below(tmp_path)
    assert uuid.UUID(task_id)
    assert Path(env["MODEL_ID"]).is_dir()
    assert signing_key(env["WEBHOOK_SIGNING_SECRET"])


# --- All of them around a running worker


@pytest.fixture(scope="module")
def world(
    receiver: Receiver, rabbitmq: RabbitMQ, s3_server: SeaweedFS, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    """Run a worker without torch whose backend is the receiver."""
    with new_world(rabbitmq, s3_server, tmp_path_factory.mktemp("world")) as made:
        start_light_worker(made, **receiver.env())
        yield made


def ends_of(receiver: Receiver, generation_id: int) -> list[tuple[str, str]]:
    return [effect for effect in receiver.effects(generation_id) if effect[0] != "progress"]


def assert_ends_once(world: World, receiver: Receiver, generation_id: int, end: tuple[str, str]) -> None:
    eventually(lambda: ends_of(receiver, generation_id) != [], world.workers[0].log_tail)
    world.wait_until_clean()
    assert ends_of(receiver, generation_id) == [end]


def url_of(world: World, generation_id: int) -> str:
    return f"{world.store.endpoint_url}/{world.bucket}/generations/gen-{generation_id}.png"


@pytest.mark.parametrize("language", RECEIVERS)
def test_a_published_job_is_followed_to_its_one_end(world: World, receiver: Receiver, language: str) -> None:
    number = uuid.uuid4().int % 2**31
    receiver.expect(number)

    run_publisher(language, world.env(), number, "a red fox", num_inference_steps=20)

    assert_ends_once(world, receiver, number, ("complete", url_of(world, number)))
    effects = receiver.effects(number)
    progress = [int(detail.removesuffix(" %")) for state, detail in effects if state == "progress"]
    assert progress
    assert progress == sorted(set(progress))
    assert set(progress) <= {0, 25, 50, 75, 90}
    assert effects[-1][0] == "complete"
    assert world.image(number).size == (128, 128)


@pytest.mark.parametrize("language", RECEIVERS)
def test_failure_is_delivered_once_with_its_code(world: World, receiver: Receiver, language: str) -> None:
    number = uuid.uuid4().int % 2**31
    receiver.expect(number)

    run_publisher(language, world.env(), number, "a red fox", num_inference_steps=151)

    assert_ends_once(world, receiver, number, ("failed", "INVALID_INPUT"))


def test_job_quicker_than_its_backend_s_transaction_is_delivered_once_it_is_known(
    world: World, receiver: Receiver
) -> None:
    def num_unknown() -> float:
        return world.workers[0].metric("darkroom_webhooks_total", kind="complete", result="retry")

    number, before = uuid.uuid4().int % 2**31, num_unknown()
    run_publisher("python", world.env(), number, "a red fox", num_inference_steps=4)
    eventually(lambda: num_unknown() > before, world.workers[0].log_tail)
    assert ends_of(receiver, number) == []

    receiver.expect(number)

    assert_ends_once(world, receiver, number, ("complete", url_of(world, number)))
