"""Publish a job: `python publisher.py GENERATION_ID PROMPT ['{"seed": 7, …}']`. Prints its task id.

Needs pika. Reads the worker's own variables: RABBITMQ_URL, or RABBITMQ_HOST, _PORT, _USER, _PASS and _VHOST;
RABBITMQ_QUEUE. The third argument are more fields of `data`, as docs/fields.md lists them.
"""

import json
import os
import sys
import uuid
from datetime import UTC, datetime
from typing import Any

import pika

QUEUE = os.environ.get("RABBITMQ_QUEUE", "image_generation")


def broker() -> pika.ConnectionParameters:
    url = os.environ.get("RABBITMQ_URL")
    if url:
        return pika.URLParameters(url)
    return pika.ConnectionParameters(
        host=os.environ.get("RABBITMQ_HOST", "localhost"),
        port=int(os.environ.get("RABBITMQ_PORT", "5672")),
        virtual_host=os.environ.get("RABBITMQ_VHOST", "/"),
        credentials=pika.PlainCredentials(
            os.environ.get("RABBITMQ_USER", "guest"), os.environ.get("RABBITMQ_PASS", "guest")
        ),
    )


def publish(message: dict[str, Any]) -> None:
    """Return once the broker has the message on disk; raises `pika.exceptions.AMQPError` where it has not."""
    with pika.BlockingConnection(broker()) as connection:
        channel = connection.channel()
        # Durable and without arguments, as the worker declares it: RabbitMQ refuses any other declaration.
        channel.queue_declare(QUEUE, durable=True)
        # From here on a publish waits for the broker's confirm.
        channel.confirm_delivery()
        channel.basic_publish(
            exchange="",
            routing_key=QUEUE,
            body=json.dumps(message).encode(),
            properties=pika.BasicProperties(
                content_type="application/json",
                delivery_mode=pika.DeliveryMode.Persistent,
                message_id=message["task_id"],
            ),
            mandatory=True,  # a message that reaches no queue raises instead of vanishing
        )


def main() -> None:
    given_id, prompt, *more = sys.argv[1:]
    fields = json.loads(more[0]) if more else {}
    message = {
        # Made and stored together with the generation: to publish a task again, even in doubt, does it only once.
        "task_id": str(uuid.uuid4()),
        "type": "image_generation",
        # A number or text: it is told back as it is published.
        "data": {"generation_id": int(given_id) if given_id.isdecimal() else given_id, "prompt": prompt} | fields,
        "created_at": datetime.now(UTC).isoformat(),
    }
    publish(message)
    print(message["task_id"])


if __name__ == "__main__":
    main()
