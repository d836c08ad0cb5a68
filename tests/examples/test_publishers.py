"""The publishers of examples/, in six languages: what they leave in the queue, and that they lose nothing unnoticed."""

import json
import re
import uuid
from pathlib import Path

import pika
import pytest

from config.model import ModelSettings
from config.store import StoreSettings
from examples.parts.rabbitmq import RabbitMQ
from tests.support.contract_schemas import validator_of
from tests.support.example_programs import PUBLISHERS, run_publisher, skip_unless_installed, start_publisher
from tests.support.long import long
from worker.messages.decoder import decode, rules_from

# The highest that survives: Node's numbers are doubles.
HIGHEST_SEED = {"node": 2**53 - 1}
# The statement that declares the queue, in any of the languages.
DECLARATION = re.compile(
    r"^ *(channel\.queue_declare|\$channel->queue_declare|channel\.queue\(|channel\.queueDeclare).*$", re.MULTILINE
)
GO_DECLARATION = re.compile(r"^\tif _, err := channel\.QueueDeclare.*?^\t\}$", re.MULTILINE | re.DOTALL)


@pytest.fixture(params=PUBLISHERS)
def language(request: pytest.FixtureRequest) -> str:
    """Name a language that is installed."""
    skip_unless_installed(request.param)
    return str(request.param)


@pytest.mark.parametrize("generation_id", [pytest.param(456, marks=long), "550e8400-e29b-41d4-a716-446655440000"])
def test_a_publisher_leaves_a_persistent_job_in_a_durable_queue_without_arguments(
    language: str, rabbitmq: RabbitMQ, queue_name: str, generation_id: int | str
) -> None:
    env = rabbitmq.env() | {"RABBITMQ_QUEUE": queue_name}
    seed = HIGHEST_SEED.get(language, 2**63 - 1)

    task_id = run_publisher(language, env, generation_id, "서울의 밤", num_inference_steps=4, seed=seed)

    connection = pika.BlockingConnection(pika.URLParameters(rabbitmq.url))
    channel = connection.channel()
    channel.queue_declare(queue_name, durable=True)  # any other declaration would have been refused
    _, properties, body = channel.basic_get(queue_name, auto_ack=True)
    connection.close()
    validator_of("job").validate(json.loads(body))
    job = decode(body, rules_from(ModelSettings(), StoreSettings(AWS_STORAGE_BUCKET_NAME="media")))  # type: ignore[call-arg]
    assert (job.task_id, job.generation_id, job.prompt) == (task_id, generation_id, "서울의 밤")
    assert (job.num_inference_steps, job.seed) == (4, seed)
    assert job.created_at is not None
    assert uuid.UUID(task_id).version == 4
    assert (properties.delivery_mode, properties.content_type) == (2, "application/json")
    assert properties.message_id == task_id


def test_a_publisher_fails_where_its_message_reaches_no_queue(
    language: str, rabbitmq: RabbitMQ, queue_name: str, tmp_path: Path
) -> None:
    source = PUBLISHERS[language].source
    if language == "node":
        pytest.skip("a copy elsewhere finds no amqplib: Node looks for modules beside the file")
    without, num_taken_out = (GO_DECLARATION if language == "go" else DECLARATION).subn("", source.read_text())
    assert num_taken_out == 1
    copy = tmp_path / source.name
    copy.write_text(without)

    ended = start_publisher(
        language, {"RABBITMQ_URL": rabbitmq.url, "RABBITMQ_QUEUE": queue_name}, "1", "a red fox", source=copy
    )

    assert ended.returncode != 0
    assert queue_name in ended.stderr or "UnroutableError" in ended.stderr
    assert ended.stdout == ""
