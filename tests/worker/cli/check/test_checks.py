"""`darkroom check` on real parts: a sound world is green, and of each breakage the right row is red with its remedy."""

import json
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from email.utils import formatdate
from functools import cache, partial
from pathlib import Path
from typing import Any

import pika
import pytest
import torch

from clients.backend_probe import BackendProbe
from clients.management import effective_policies
from config.backend import BackendSettings
from config.model import ModelSettings
from config.settings import SECTIONS, Settings
from config.store import StoreSettings
from examples.parts.backend import Backend
from examples.parts.ports import free_port
from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS
from inference.engine.local_engine import LocalEngine
from inference.request import ModelFacts
from tests.faults.proxy import UP, Proxy, Sign
from tests.faults.station import answers
from tests.support.models.tiny_models import build_tiny_sd
from tests.support.servers.clients_servers import AnsweringServer, answer, refused_url
from tests.support.unusable_queues import PASSWORD, USER, all_but, permit, set_state
from tests.support.world import eventually
from worker.amqp.topology import QueueNames, ensure_queues
from worker.cli.check.backend import check_backend, classify_answer
from worker.cli.check.broker import BrokerProbe
from worker.cli.check.checks import Check, CheckFailed, CheckResult, CheckUnsure, State, run_checks
from worker.cli.check.command import every_part
from worker.cli.check.policies import limits_in
from worker.cli.check.store import MAX_SKEW_SECONDS, StoreProbe

PRIVATE, RESULTS = "private", "results"
READER, READERS_SECRET = "reader", "readers-secret"
NARROW, NARROWS_PASSWORD = "narrow", "narrow-password"
BEHIND_BROKER = ("queue", "own queues")
NOT_IMPLEMENTED = b"<?xml version='1.0'?><Error><Code>NotImplemented</Code><Message>no</Message></Error>"


class GuardedStore(SeaweedFS):
    """With a second identity, which may do everything in the private bucket and only look into the results'."""

    def _command(self) -> list[str]:
        guest = [f"{right}:{PRIVATE}" for right in ("Read", "Write", "List")] + [f"Read:{RESULTS}", f"List:{RESULTS}"]
        identities = [
            _identity(self.access_key_id, self.secret_access_key, ["Admin", "Read", "Write", "List"]),
            _identity(READER, READERS_SECRET, guest),
        ]
        config = self.folder / "identities.json"
        config.write_text(json.dumps({"identities": identities}))
        return [*super()._command(), f"-s3.config={config}"]


def _identity(key: str, secret: str, actions: list[str]) -> dict[str, Any]:
    return {"name": key, "credentials": [{"accessKey": key, "secretKey": secret}], "actions": actions}


@dataclass
class WorkingSetup:
    """Everything a worker needs, whole: two buckets, a queue with a job in it, a backend, a model."""

    rabbitmq: RabbitMQ
    store: GuardedStore
    backend: Backend
    queue: str
    model: Path
    folder: Path

    def env(self) -> dict[str, str]:
        return (
            self.rabbitmq.env()
            | self.store.env(PRIVATE)
            | self.backend.env()
            | {
                "AWS_RESULTS_BUCKET_NAME": RESULTS,
                "RABBITMQ_QUEUE": self.queue,
                "MODEL_ID": str(self.model),
                "DEVICE": "cpu",
                "METRICS_PORT": "0",
                "CACHE_DIR": str(self.folder / "cache" / "not-made-yet"),
                "CACHE_MAX_GB": "0.001",
            }
        )

    def check(self, **env: object) -> dict[str, CheckResult]:
        """Run every check; queues, buckets and backend must be as before, and no job may have been taken."""
        before = self.contents()
        settings = settings_of(self.env() | {name: str(value) for name, value in env.items()})
        found = {finding.part: finding for finding in run_checks(every_part(settings, load_here))}
        eventually(lambda: self.contents() == before, lambda: f"{before} became {self.contents()}")
        assert not (self.folder / "cache").exists()
        return found

    def contents(self) -> dict[str, Any]:
        """List every queue with its depth, every bucket with its keys, every call the backend took as a webhook."""
        client = self.store.client()
        buckets = [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]
        keys = {name: [e["Key"] for e in client.list_objects_v2(Bucket=name).get("Contents", ())] for name in buckets}
        webhooks = [call for kind in ("progress", "complete", "failed") for call in self.backend.calls(kind)]
        return {"queues": self.rabbitmq.queues(), "buckets": keys, "webhooks": webhooks}


def settings_of(env: dict[str, str]) -> Settings:
    return Settings(**{name: section(**env) for name, section in SECTIONS.items()})  # type: ignore[arg-type]


@cache
def load_here(settings: ModelSettings) -> Mapping[str, ModelFacts]:
    """Load the engine as its process does, but in this one; the same settings only once."""
    engine = LocalEngine(settings)
    engine.close()
    return engine.facts_by_model


def declare(rabbitmq: RabbitMQ, queue: str, **arguments: Any) -> None:
    connection = pika.BlockingConnection(pika.URLParameters(rabbitmq.url))
    channel = connection.channel()
    channel.queue_declare(queue, durable=True, **arguments)
    channel.basic_publish("", queue, b"a job", pika.BasicProperties(delivery_mode=2))
    connection.close()
    # A quorum queue and a stream count their messages a moment later.
    eventually(lambda: queue in rabbitmq.queues() and rabbitmq.queues()[queue].ready == 1)


@pytest.fixture(scope="module")
def setup(rabbitmq: RabbitMQ, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkingSetup]:
    folder, queue = tmp_path_factory.mktemp("setup"), f"test-{uuid.uuid4().hex[:12]}"
    declare(rabbitmq, queue)
    with GuardedStore(folder / "store") as store, Backend() as backend:
        store.make_bucket(PRIVATE)
        store.make_bucket(RESULTS)
        store.client().put_object(Bucket=PRIVATE, Key="jobs/a.json", Body=b"{}")
        yield WorkingSetup(rabbitmq, store, backend, queue, build_tiny_sd(folder / "model"), folder)


def parts(found: dict[str, CheckResult], state: State) -> set[str]:
    return {finding.part for finding in found.values() if finding.state is state}


def assert_only(found: dict[str, CheckResult], bad: str, *words: object, blocked: tuple[str, ...] = ()) -> None:
    """Assert that only that part is bad, only those depending on it are blocked, and its row has these words."""
    assert parts(found, State.BAD) == {bad}, found
    assert parts(found, State.BLOCKED) == set(blocked), found
    missing = [word for word in words if str(word) not in found[bad].detail]
    assert not missing, f"{missing} not in: {found[bad].detail}"


# --- A sound world


def test_every_check_is_good_in_a_working_setup_and_reports_its_findings(setup: WorkingSetup) -> None:
    found = setup.check()

    assert parts(found, State.GOOD) == set(found), found
    assert list(found) == [
        "broker",
        "queue",
        "own queues",
        "store",
        "bucket",
        "results bucket",
        "result address",
        "conditional writes",
        "presets",
        "backend",
        "port",
        "fonts",
        "shaping",
        "certificate",
        "cut-outs",
        "disk",
        "GPU",
        "memory",
        "model",
    ]
    assert re.search(r": RabbitMQ \d+\.\d+\.\d+", found["broker"].detail)
    assert "1 wait in it, for 0 consumers" in found["queue"].detail
    assert "6 of 6 do not exist yet" in found["own queues"].detail
    assert "takes the token, and answers 401 without it" in found["backend"].detail
    assert "does not open without credentials (HTTP 403): RESULT_URL_MODE=presigned" in found["result address"].detail
    assert "they fit" in found["memory"].detail
    assert "on cpu as float32" in found["model"].detail


def test_undeclared_queue_is_good_and_is_not_declared(setup: WorkingSetup) -> None:
    found = setup.check(RABBITMQ_QUEUE="not-made-yet")

    assert parts(found, State.GOOD) == set(found)
    assert "not-made-yet does not exist yet" in found["queue"].detail


def test_the_queues_of_a_worker_that_was_here_are_found(setup: WorkingSetup) -> None:
    names = QueueNames(f"test-{uuid.uuid4().hex[:12]}")
    with pika.BlockingConnection(pika.URLParameters(setup.rabbitmq.url)) as connection:
        ensure_queues(connection, names, names.everything)

    found = setup.check(RABBITMQ_QUEUE=names.jobs)

    assert found["own queues"].detail == "all 6 are there"


# --- One part broken at a time: the broker


def test_a_wrong_password_is_found(setup: WorkingSetup) -> None:
    found = setup.check(RABBITMQ_PASS="wrong")

    assert_only(found, "broker", setup.rabbitmq.port, "user guest", "RABBITMQ_PASS", blocked=BEHIND_BROKER)


def test_a_wrong_virtual_host_is_found(setup: WorkingSetup) -> None:
    found = setup.check(RABBITMQ_VHOST="nowhere")

    assert_only(found, "broker", "nowhere", "RABBITMQ_VHOST", "add_vhost", blocked=BEHIND_BROKER)


def test_a_broker_that_is_not_there_is_found(setup: WorkingSetup) -> None:
    port = free_port()

    found = setup.check(RABBITMQ_PORT=port)

    assert_only(found, "broker", f"127.0.0.1:{port}", "RABBITMQ_PORT", blocked=BEHIND_BROKER)


def test_the_url_is_named_where_the_broker_is_named_by_one(setup: WorkingSetup) -> None:
    url = f"amqp://guest:wrong-word@127.0.0.1:{setup.rabbitmq.port}/%2F"

    found = setup.check(RABBITMQ_URL=url)

    assert_only(found, "broker", "RABBITMQ_URL", blocked=BEHIND_BROKER)
    assert not any("wrong-word" in finding.detail for finding in found.values())


def test_a_queue_declared_otherwise_is_found(setup: WorkingSetup) -> None:
    other = f"test-{uuid.uuid4().hex[:12]}"
    declare(setup.rabbitmq, other, auto_delete=True)

    found = setup.check(RABBITMQ_QUEUE=other)

    assert_only(found, "queue", "auto_delete is true", other, "delete_queue")


def test_queues_with_arguments_of_their_own_are_good_and_shown(setup: WorkingSetup) -> None:
    plain = f"test-{uuid.uuid4().hex[:12]}"
    quorum = {"x-queue-type": "quorum", "x-delivery-limit": 5, "x-dead-letter-exchange": "given-up"}
    declare(setup.rabbitmq, plain, arguments={"x-max-priority": 5, "x-message-ttl": 86_400_000})
    declare(setup.rabbitmq, f"{plain}.express", arguments=quorum)

    found = setup.check(RABBITMQ_QUEUE=plain, RABBITMQ_QUEUES=f"{plain}.express:3,{plain}:1")

    assert parts(found, State.GOOD) == set(found)
    plainly, express = found["queue"].detail.split(f"{plain}.express is")
    assert "x-max-priority: 5, x-message-ttl: 86400000" in plainly
    for said in ("x-dead-letter-exchange: given-up", "x-delivery-limit: 5", "x-queue-type: quorum"):
        assert said in express


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"x-queue-type": "stream"}, "is a stream"),
        ({"x-max-priority": 5, "x-single-active-consumer": True}, "one worker gets every job"),
    ],
)
def test_queues_that_give_no_job_to_several_workers_are_found(
    setup: WorkingSetup, arguments: dict[str, Any], said: str
) -> None:
    other = f"test-{uuid.uuid4().hex[:12]}"
    declare(setup.rabbitmq, other, arguments=arguments)

    assert_only(setup.check(RABBITMQ_QUEUE=other), "queue", other, said)


def test_a_user_without_the_right_to_make_queues_is_found(setup: WorkingSetup) -> None:
    setup.rabbitmq.evaluate(
        f'User = <<"{NARROW}">>, All = <<".*">>, By = <<"test">>,'
        f' rabbit_auth_backend_internal:add_user(User, <<"{NARROWS_PASSWORD}">>, By),'
        ' rabbit_auth_backend_internal:set_permissions(User, <<"/">>, <<"^$">>, All, All, By).',
    )

    found = setup.check(RABBITMQ_USER=NARROW, RABBITMQ_PASS=NARROWS_PASSWORD)

    assert_only(found, "own queues", "ACCESS_REFUSED", NARROW, "set_permissions")


def test_one_of_several_queues_that_cannot_be_used_is_found_and_so_is_what_workers_do(setup: WorkingSetup) -> None:
    express = f"{setup.queue}.express"
    declare(setup.rabbitmq, express)
    env = {"RABBITMQ_QUEUES": f"{express}:3,{setup.queue}:1", "RABBITMQ_USER": USER, "RABBITMQ_PASS": PASSWORD}
    left_out = f"leaves {express} out and takes the jobs of {setup.queue}"
    probe = BrokerProbe(settings_of(setup.env() | env).broker)

    permit(setup.rabbitmq, all_but(express))
    with pytest.raises(CheckFailed, match=f"access to queue '{express}'.*set_permissions.*{left_out}"):
        probe.queue()
    # RabbitMQ 4.3 refuses to look at a queue, those before it to make one
    with pytest.raises(CheckFailed, match=rf"{express}\.(\*|retry\.\d+): ACCESS_REFUSED.*set_permissions"):
        probe.own_queues()

    permit(setup.rabbitmq, ".*")
    set_state(setup.rabbitmq, express, "crashed")
    with pytest.raises(CheckFailed, match=f"queue '{express}' in vhost '/' has crashed.*{left_out}"):
        probe.queue()

    set_state(setup.rabbitmq, express, "live")
    assert probe.queue().count("is durable without arguments") == 2
    assert setup.rabbitmq.queues()[express] == (1, 0)


def test_a_missing_queue_that_the_user_may_not_make_is_found_and_not_made(setup: WorkingSetup) -> None:
    permit(setup.rabbitmq, "^amq[.].*")
    missing = f"test-{uuid.uuid4().hex[:12]}"
    env = {"RABBITMQ_QUEUE": missing, "RABBITMQ_USER": USER, "RABBITMQ_PASS": PASSWORD}

    with pytest.raises(CheckFailed, match=f"access to queue '{missing}' .*set_permissions") as failed:
        BrokerProbe(settings_of(setup.env() | env).broker).queue()

    assert "leaves" not in str(failed.value)
    assert missing not in setup.rabbitmq.queues()


def test_a_policy_that_limits_the_worker_s_queues_is_found(setup: WorkingSetup) -> None:
    limits = '[{<<"delivery-limit">>, 3}, {<<"max-length">>, 10}]'
    named = '<<"/">>, <<"limits">>'
    setup.rabbitmq.evaluate(
        f'ok = rabbit_policy:set({named}, <<"^{setup.queue}">>, {limits}, 0, <<"all">>, <<"test">>).'
    )
    try:
        found = setup.check()
    finally:
        setup.rabbitmq.evaluate(f'ok = rabbit_policy:delete({named}, <<"test">>).')

    assert_only(found, "own queues", "10 were kept", "returned 4 times", f"^{setup.queue}$", "list_operator_policies")


def test_policies_from_the_management_api_are_reported_for_the_worker_s_queues_alone() -> None:
    names = QueueNames("jobs")
    limited = {"delivery-limit": 3, "expires": 1000, "ha-mode": "all"}
    policies = [
        {"name": names.outbox, "effective_policy_definition": limited},
        {"name": names.dead, "effective_policy_definition": []},
        {"name": names.recover},
        {"name": names.jobs, "effective_policy_definition": limited},
        {"name": "of-another-service", "effective_policy_definition": limited},
    ]
    with AnsweringServer([answer(200, json.dumps(policies).encode())]) as server:
        definitions = effective_policies("127.0.0.1", "/", user="guest", password="guest", port=server.port)

    assert server.requests[0].startswith(b"GET /api/queues/%2F HTTP/1.1")
    assert limits_in(definitions, names) == [f"{names.outbox} has delivery-limit: 3, expires: 1000"]


@pytest.mark.parametrize(
    "said", [answer(401), answer(200, b"<html>"), answer(200, b'{"queues": 1}'), answer(200, b"[1]")]
)
def test_port_with_another_service_yields_no_policies(said: bytes) -> None:
    with AnsweringServer([said]) as server:
        assert effective_policies("127.0.0.1", "/", user="guest", password="guest", port=server.port) == {}
    assert effective_policies("127.0.0.1", "/", user="guest", password="guest", port=server.port) == {}


# --- The store


def test_a_missing_bucket_is_found_and_not_made(setup: WorkingSetup) -> None:
    found = setup.check(AWS_STORAGE_BUCKET_NAME="nobody-made-it")

    assert_only(found, "bucket", "nobody-made-it", "AWS_STORAGE_BUCKET_NAME", blocked=("conditional writes",))


def test_a_results_bucket_that_can_be_read_and_not_written_is_found(setup: WorkingSetup) -> None:
    found = setup.check(AWS_ACCESS_KEY_ID=READER, AWS_SECRET_ACCESS_KEY=READERS_SECRET)

    words = (f"{RESULTS} cannot be written", f"rights of {READER}: it needs s3:PutObject", "AWS_ACCESS_KEY_ID")
    assert_only(found, "results bucket", *words, blocked=("result address",))


def test_a_store_without_conditional_writes_is_found(setup: WorkingSetup) -> None:
    with Proxy(setup.store.port) as proxy:
        proxy.when(Sign(UP, b"If-None-Match: *"), do=answers(501, NOT_IMPLEMENTED), times=None)
        found = setup.check(AWS_S3_ENDPOINT_URL=f"http://127.0.0.1:{proxy.port}")

    assert_only(found, "conditional writes", "NotImplemented", "If-None-Match", "run one worker")


def test_a_store_that_overwrites_in_spite_of_the_condition_is_found() -> None:
    with AnsweringServer([answer(200, ETag='"a"')]) as server:
        with pytest.raises(CheckFailed, match=f"{server.url} overwrites in spite of If-None-Match"):
            probe_of(server).conditional_writes()

        assert [request.split(b" ")[0] for request in server.requests] == [b"GET", b"PUT", b"PUT", b"DELETE"]


@pytest.mark.parametrize(("seconds", "word"), [(1200, "ahead of"), (-1200, "behind")])
def test_a_clock_that_the_store_refuses_is_found_by_the_refusal_itself(seconds: int, word: str) -> None:
    theirs = formatdate(time.time() - seconds, usegmt=True)

    # Not to the second: the machine may be busy between the two looks at the clock.
    said = rf"1(19|20|21)\d s {word} the store's.*RequestTimeTooSkewed.*NTP"
    with AnsweringServer([answer(403, Date=theirs)]) as server, pytest.raises(CheckFailed, match=said):
        probe_of(server).answer()


def test_a_clock_within_the_bounds_is_no_fault() -> None:
    theirs = formatdate(time.time() - MAX_SKEW_SECONDS + 10, usegmt=True)

    with AnsweringServer([answer(200, Date=theirs)]) as server:
        assert "the clocks agree" in probe_of(server).answer()


def test_an_object_that_cannot_be_removed_is_named() -> None:
    sound = answer(200, ETag='"a"')
    said = r"private cannot be cleaned.* s3://private/jobs/check-\S+\.lease stays: remove it"
    answers_in_turn = [sound, sound, answer(200, b"{}", ETag='"a"'), answer(403)]
    with AnsweringServer(answers_in_turn) as server, pytest.raises(CheckFailed, match=said):
        probe_of(server).bucket()


def probe_of(server: AnsweringServer) -> StoreProbe:
    env = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_STORAGE_BUCKET_NAME": PRIVATE,
        "AWS_S3_ENDPOINT_URL": server.url,
    }
    return StoreProbe(StoreSettings(**env))  # type: ignore[arg-type]


# --- The backend


def test_a_backend_that_is_down_is_found(setup: WorkingSetup) -> None:
    url = refused_url()

    found = setup.check(BACKEND_API_URL=url)

    assert_only(found, "backend", url, "ConnectionRefusedError", "BACKEND_API_URL")


def test_a_refused_token_is_found(setup: WorkingSetup) -> None:
    found = setup.check(INTERNAL_API_TOKEN="another")

    assert_only(found, "backend", setup.backend.url, "401", "INTERNAL_API_TOKEN")
    assert "another" not in found["backend"].detail


@pytest.mark.parametrize(
    ("status", "stranger_status", "words"),
    [
        (405, 401, "takes the token"),
        (200, 403, "takes the token"),
        (405, 405, "whether it takes the token, the first webhook will tell"),
        (501, 501, "whether it takes the token, the first webhook will tell"),
    ],
)
def test_backend_check_reports_its_findings_and_no_more(status: int, stranger_status: int, words: str) -> None:
    assert words in classify_answer("http://backend", BackendProbe(status, stranger_status))


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (403, "INTERNAL_API_TOKEN"),
        (301, "final address"),
        (302, "final address"),
        (400, "ALLOWED_HOSTS.*Name backend there"),
        (410, "given up"),
        (421, "does not serve this host"),
        (426, "https"),
        (500, "log"),
        (503, "outbox"),
    ],
)
def test_a_backend_that_would_take_no_webhook_is_bad(status: int, words: str) -> None:
    with pytest.raises(CheckFailed, match=rf"http://backend answers {status}.*{words}"):
        classify_answer("http://backend", BackendProbe(status, status))


def test_a_path_twice_in_the_address_is_found(setup: WorkingSetup) -> None:
    found = setup.check(BACKEND_API_URL=f"{setup.backend.url}/api")

    assert parts(found, State.UNSURE) == {"backend"}
    assert "must not end in a part of it" in found["backend"].detail


def backend_settings(url: str, **others: str) -> BackendSettings:
    return BackendSettings(BACKEND_API_URL=url, INTERNAL_API_TOKEN="token", **others)  # type: ignore[call-arg, arg-type]


def test_every_address_that_a_setting_names_is_tried_and_named_without_its_query() -> None:
    with AnsweringServer([answer(405), answer(401)] * 2) as shared, AnsweringServer([answer(405), answer(401)]) as own:
        settings = backend_settings(
            "http://never.invalid",
            WEBHOOK_URL=f"{shared.url}/hook?code=a-secret",
            WEBHOOK_FAILED_URL=f"{own.url}/refund",
        )

        said = check_backend(settings)

    assert f"{shared.url}/hook… takes the token" in said
    assert f"{own.url}/refund takes the token" in said
    assert "a-secret" not in said
    assert [len(server.requests) for server in (shared, own)] == [2, 2]


@pytest.mark.parametrize(
    ("answers_in_turn", "error", "words"),
    [
        ([answer(404)] * 3, CheckUnsure, "where WEBHOOK_COMPLETE_URL has a wrong path"),
        ([answer(200)] * 3, CheckUnsure, "WEBHOOK_COMPLETE_URL must name the one"),
        ([answer(426)] * 2, CheckFailed, "should WEBHOOK_COMPLETE_URL begin with https"),
    ],
)
def test_an_address_that_takes_no_webhook_is_told_by_its_own_setting(
    answers_in_turn: list[bytes], error: type[Exception], words: str
) -> None:
    with AnsweringServer(answers_in_turn) as server, pytest.raises(error, match=words):
        check_backend(backend_settings("http://never.invalid", WEBHOOK_COMPLETE_URL=f"{server.url}/hook"))


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (BackendProbe(404, 404, 404), "BACKEND_API_URL has a wrong path.*/api"),
        (BackendProbe(404, 401, 404), "BACKEND_API_URL has a wrong path.*/api"),
        (BackendProbe(404, 401, 501), "BACKEND_API_URL has a wrong path.*/api"),
        (BackendProbe(200, 200, 200), "web pages"),
        (BackendProbe(429, 429), "later"),
    ],
)
def test_backend_check_in_doubt_reports_both_meanings(found: BackendProbe, words: str) -> None:
    with pytest.raises(CheckUnsure, match=rf"http://backend answers {found.status}.*{words}"):
        classify_answer("http://backend", found)


@pytest.mark.parametrize(
    "found", [BackendProbe(404, 404, 200), BackendProbe(404, 401, 405), BackendProbe(200, 200, 404)]
)
def test_backend_that_reveals_its_routes_by_another_method_is_good(found: BackendProbe) -> None:
    assert classify_answer("http://backend", found)


def test_doubtful_check_is_yellow_and_not_good() -> None:
    def look() -> str:
        raise CheckUnsure("either way")

    (found,) = run_checks([Check("a", look)])

    assert (found.state, found.detail) == (State.UNSURE, "either way")


# --- The machine and the model


def test_several_models_are_tried_each_and_a_bad_one_is_named(setup: WorkingSetup, tmp_path: Path) -> None:
    found = setup.check(MODELS=f"photo={setup.model}")
    assert f"; photo is {setup.model.name} on cpu" in found["model"].detail
    assert "; of MODELS photo 0.01 GB, in turns" in found["memory"].detail

    found = setup.check(MODELS=f"photo={tmp_path / 'nothing'}")
    assert_only(found, "model", "Look at MODELS photo=", tmp_path / "nothing")


def test_a_folder_without_a_font_is_found(setup: WorkingSetup, tmp_path: Path) -> None:
    found = setup.check(FONT_DIRS=tmp_path)

    assert_only(found, "fonts", tmp_path, "서", "FONT_DIRS", "fonts-nanum")


def test_a_cache_that_cannot_be_written_is_found(setup: WorkingSetup, tmp_path: Path) -> None:
    in_its_place = tmp_path / "cache"
    in_its_place.write_text("a file")

    found = setup.check(CACHE_DIR=in_its_place)

    assert_only(found, "disk", "CACHE_DIR", in_its_place, "Not a directory")
    assert in_its_place.read_text() == "a file"


def test_a_disk_that_is_smaller_than_the_cache_may_become_is_found(setup: WorkingSetup) -> None:
    found = setup.check(CACHE_MAX_GB=1e9)

    assert_only(found, "disk", "CACHE_MAX_GB is 1e+09", "has room for", "set CACHE_MAX_GB below")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_configured_gpu_that_is_missing_is_found(setup: WorkingSetup) -> None:
    found = setup.check(DEVICE="cuda", CUDA_VISIBLE_DEVICES="3")

    assert_only(found, "GPU", "DEVICE is cuda", "CUDA_VISIBLE_DEVICES=3", "nvidia-smi", blocked=("model",))
    assert "first the GPU" in found["model"].detail


def test_a_model_that_is_not_there_is_found(setup: WorkingSetup, tmp_path: Path) -> None:
    found = setup.check(MODEL_ID=tmp_path / "nothing")

    assert_only(found, "model", tmp_path / "nothing", "MODEL_ID")


def test_a_model_with_a_file_that_is_cut_off_is_found_before_anything_is_loaded(
    setup: WorkingSetup, tmp_path: Path
) -> None:
    model = shutil.copytree(setup.model, tmp_path / "model")
    [weights] = (model / "unet").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1000])

    found = setup.check(MODEL_ID=model)

    assert_only(found, "model", weights, "cut off", "copy or download it again")


# --- The rows


def test_a_part_behind_a_bad_one_is_blocked_where_it_fails_and_good_where_it_does_not() -> None:
    def fail(word: str) -> str:
        raise CheckFailed(word)

    checks = [
        Check("a", partial(fail, "no a")),
        Check("b", partial(fail, "no b"), ("a",)),
        Check("c", partial(fail, "no c"), ("b",)),
        Check("d", lambda: "seen", ("a",)),
        Check("e", partial(fail, "no e"), ("d",)),
    ]

    found = list(run_checks(checks))

    assert [finding.state for finding in found] == [State.BAD, State.BLOCKED, State.BLOCKED, State.GOOD, State.BAD]
    assert found[2].detail == "first the b; seen here: no c"


def test_a_bug_in_one_check_hides_no_other_part() -> None:
    def stumble() -> str:
        return str({}["nothing"])

    found = list(run_checks([Check("a", stumble), Check("b", lambda: "seen")]))

    assert [(finding.part, finding.state) for finding in found] == [("a", State.BAD), ("b", State.GOOD)]
    assert "KeyError" in found[0].detail
