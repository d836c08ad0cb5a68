"""A real Prometheus scrapes a real worker and answers the dashboard's queries; and the broker's own metrics.

The worker has an engine without torch: all that is scraped is the supervisor's.
"""

import json
import math
import re
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pika
import pytest
import requests
import yaml

from examples.parts.part import Part
from examples.parts.ports import free_port
from examples.parts.processes import ServerProcess
from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS
from tests.faults.station import start_light_worker
from tests.support.promql import PROMETHEUS, alert_rules, dashboard_queries
from tests.support.world import HANG_SECONDS, World, eventually, new_world
from worker.amqp.topology import QueueNames

NUM_JOBS = 2
# A machine without a GPU shows nothing of one, and a worker without MODELS nothing of each.
EMPTY_PANELS = {
    "GPU memory",
    "Models on the GPU",
    "Jobs that wait for a model",
    "Pictures and adapters of each model",
    "Switches a minute",
}
STEPS = "darkroom_denoise_lane_steps_total"
COMPLETE = 'darkroom_jobs_total{outcome="complete"}'


class Prometheus(Part):
    """Debian's Prometheus with the project's own configuration, but looking at one worker, every second."""

    def __init__(self, folder: Path, target: str) -> None:
        self._folder = folder
        self._target = target
        self._port = free_port()
        self._server: ServerProcess | None = None

    def start(self) -> None:
        config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(PROMETHEUS / "alerts.yaml")]
        [workers] = [job for job in config["scrape_configs"] if job["job_name"] == "darkroom"]
        del workers["dns_sd_configs"]
        workers["static_configs"] = [{"targets": [self._target]}]
        config["scrape_configs"] = [workers]
        (self._folder / "prometheus.yml").write_text(yaml.safe_dump(config))

        self._server = ServerProcess(
            [
                "prometheus",
                f"--config.file={self._folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={self._folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{self._port}",
            ],
            env={"PATH": "/usr/bin:/bin", "HOME": str(self._folder)},
            log=self._folder / "prometheus.log",
            cwd=self._folder,
        )
        self._server.wait_until(self._is_ready, timeout_seconds=HANG_SECONDS)

    def stop(self) -> None:
        if self._server is not None:
            self._server.kill()

    def get(self, path: str, **parameters: str) -> dict[str, Any]:
        """Return the answer of `/api/v1/{path}`; a refused query fails here with Prometheus's own message."""
        answer = requests.get(f"http://127.0.0.1:{self._port}/api/v1/{path}", params=parameters, timeout=120).json()
        assert answer["status"] == "success", answer
        return answer["data"]  # type: ignore[no-any-return]

    def query(self, query: str) -> list[float]:
        return [float(series["value"][1]) for series in self.get("query", query=query)["result"]]

    def _is_ready(self) -> bool:
        try:
            return requests.get(f"http://127.0.0.1:{self._port}/-/ready", timeout=120).status_code == 200
        except requests.ConnectionError:
            return False


def publish_dated(world: World, generation_id: int) -> None:
    """Publish a job as a backend does, with the moment it was made, from which the waiting is counted."""
    message = {
        "task_id": str(uuid.uuid4()),
        "created_at": datetime.now(UTC).isoformat(),
        "data": {"generation_id": generation_id, "prompt": "a red fox", "num_inference_steps": 8},
    }
    world.publish_raw(json.dumps(message).encode())


@pytest.fixture(scope="module")
def prometheus(
    rabbitmq: RabbitMQ, s3_server: SeaweedFS, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    """Run Prometheus until it has scraped a worker that drew its jobs."""
    with new_world(rabbitmq, s3_server, tmp_path_factory.mktemp("world")) as world:
        worker = start_light_worker(world)
        with Prometheus(tmp_path_factory.mktemp("prometheus"), f"127.0.0.1:{worker.port}") as running:
            eventually(lambda: running.query("darkroom_ready") == [1.0])
            # One after the other: Prometheus sees an increase only in a series that was there before.
            for num_jobs in range(1, NUM_JOBS + 1):
                publish_dated(world, num_jobs)
                world.wait_for_end(num_jobs)
                eventually(lambda n=num_jobs: running.query(COMPLETE) == [n], worker.log_tail)
            eventually(lambda: running.query(STEPS) == [NUM_JOBS * 8], worker.log_tail)
            yield running


@pytest.mark.parametrize(
    ("title", "query"), [*dashboard_queries()], ids=[f"{title}-{n}" for n, (title, _) in enumerate(dashboard_queries())]
)
def test_prometheus_answers_every_query_of_the_dashboard(prometheus: Prometheus, title: str, query: str) -> None:
    def is_answered() -> bool:
        values = prometheus.query(query)
        return title in EMPTY_PANELS or (values != [] and all(math.isfinite(value) for value in values))

    # A rate needs two scrapes, and the queues are counted every few seconds.
    eventually(is_answered, lambda: f"{title}: {query} gives {prometheus.query(query)}")


@pytest.mark.parametrize(
    ("query", "is_right"),
    [
        ('sum(darkroom_jobs_total{outcome="complete"})', lambda value: value == NUM_JOBS),
        ("sum(darkroom_denoise_lane_steps_total)", lambda value: value == NUM_JOBS * 8),
        (
            "sum(darkroom_denoise_lane_steps_total) / sum(darkroom_denoise_steps_total)",
            lambda value: 1 <= value <= NUM_JOBS,
        ),
        ("sum(darkroom_queue_wait_seconds_count)", lambda value: value == NUM_JOBS),
        ('sum(darkroom_idle_seconds_total{reason="no_jobs"})', lambda value: value > 0),
        ("sum(darkroom_ready)", lambda value: value == 1),
        ("max(darkroom_outbox_age_seconds)", lambda value: value == 0),
    ],
)
def test_prometheus_values_match_the_worker_s_jobs(
    prometheus: Prometheus, query: str, is_right: Callable[[float], bool]
) -> None:
    [value] = prometheus.query(query)

    assert is_right(value), value


def test_a_second_of_a_worker_is_denoising_or_idle_for_one_reason(prometheus: Prometheus) -> None:
    [idle] = prometheus.query("sum(rate(darkroom_idle_seconds_total[10s]))")

    assert 0 <= idle <= 1.2  # the clocks of scrape and tick are not the same


def test_every_alert_rule_is_evaluated_and_none_fires_for_a_healthy_worker(prometheus: Prometheus) -> None:
    def evaluated() -> list[dict[str, Any]]:
        rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
        return [rule for rule in rules if rule["health"] != "unknown"]

    eventually(lambda: len(evaluated()) == len(alert_rules()))
    for rule in evaluated():
        assert (rule["name"], rule["health"], rule["state"]) == (rule["name"], "ok", "inactive")


@pytest.fixture
def broker_metrics(rabbitmq: RabbitMQ) -> Iterator[int]:
    """Enable the broker's metrics while the test runs; return their port."""

    def use_plugins(names: str, prepare: str = "") -> None:
        plugins = rabbitmq.folder / "plugins"
        plugins.write_text(f"[{names}].\n")
        rabbitmq.evaluate(f'{prepare} rabbit_plugins:ensure("{plugins}").')

    port = free_port()
    address = f'[{{ip,"127.0.0.1"}},{{port,{port}}}]'
    # Persistent: what the application's own file says would replace it when the plugin is loaded.
    setting = f"application:set_env(rabbitmq_prometheus,tcp_config,{address},[{{persistent,true}}]),"
    use_plugins("rabbitmq_prometheus", setting)
    yield port
    use_plugins("")


def test_the_broker_shows_each_queues_messages_and_consumers_as_the_alert_asks_for_them(
    rabbitmq: RabbitMQ, broker_metrics: int, queue_name: str
) -> None:
    # Given a broker with the plugin, asked as prometheus.yml says
    [job] = [
        job
        for job in yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"]
        if job["job_name"] == "rabbitmq"
    ]

    # When three jobs wait that nobody consumes, and a worker consumes `recover`
    names = QueueNames(queue_name)
    connection = pika.BlockingConnection(pika.URLParameters(rabbitmq.url))
    channel = connection.channel()
    for name in (names.jobs, names.dead, names.recover):
        channel.queue_declare(name, durable=True, arguments=names.arguments[name])
    for _ in range(3):
        channel.basic_publish("", queue_name, b"{}")
    channel.basic_consume(names.recover, lambda *_: None)

    # Then the two samples of the alert say so, with the label they are joined by
    def shown() -> dict[tuple[str, str], float]:
        connection.process_data_events()
        url = f"http://127.0.0.1:{broker_metrics}{job['metrics_path']}"
        lines = requests.get(url, params=job["params"], timeout=120).text.splitlines()
        samples = [re.fullmatch(r'(\w+){vhost="/",queue="(.+)"} (\S+)', line) for line in lines]
        return {(found[2], found[1]): float(found[3]) for found in samples if found}

    eventually(
        lambda: (
            shown().get((names.jobs, "rabbitmq_detailed_queue_messages_ready")) == 3
            and shown().get((names.jobs, "rabbitmq_detailed_queue_consumers")) == 0
            and shown().get((names.recover, "rabbitmq_detailed_queue_consumers")) == 1
        ),
        lambda: str(shown()),
    )
    connection.close()
