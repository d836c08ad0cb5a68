"""Publish jobs and take ends from Celery: `celery --app tasks worker`, `python tasks.py GENERATION_ID PROMPT`.

Needs celery. Reads RABBITMQ_URL, or RABBITMQ_HOST, _PORT, _USER, _PASS and _VHOST; RABBITMQ_QUEUE; and DATABASE
(celery.sqlite3), in the place of the application's own.

The jobs' queue is not Celery's: `send_task` and `task.apply_async(queue="image_generation")` write Celery's own message
format there, which is a dead letter to the worker.
"""

import json
import os
import sqlite3
import sys
import uuid
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from celery import Celery, Task
from kombu import Queue

QUEUE = os.environ.get("RABBITMQ_QUEUE", "image_generation")


def broker() -> str:
    url = os.environ.get("RABBITMQ_URL")
    if url:
        return url
    user, password = os.environ.get("RABBITMQ_USER", "guest"), os.environ.get("RABBITMQ_PASS", "guest")
    host, port = os.environ.get("RABBITMQ_HOST", "localhost"), os.environ.get("RABBITMQ_PORT", "5672")
    vhost = os.environ.get("RABBITMQ_VHOST", "/")
    return f"amqp://{quote(user, safe='')}:{quote(password, safe='')}@{host}:{port}/{quote(vhost, safe='')}"


# The name of this module, which its tasks have in the worker too when it is started as a script here.
app = Celery("tasks", broker=broker())
app.conf.update(
    task_default_queue=f"{QUEUE}-celery",
    task_ignore_result=True,
    # A task is acked when it is done, not when it begins: a worker that dies loses none.
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    # A publish waits for the broker's confirm.
    broker_transport_options={"confirm_publish": True},
)
# Durable and without arguments, as the worker declares it: RabbitMQ refuses any other declaration.
JOBS = Queue(QUEUE, durable=True)


@app.task(bind=True, autoretry_for=(Exception,), retry_backoff=True, max_retries=None)
def publish_job(self: Task, job: dict[str, Any]) -> None:
    """Publish a job. To do it twice, after a crash or in doubt, does the job once: it has its task id already.

    Django calls it by `transaction.on_commit(lambda: publish_job.delay(job))`, or `publish_job.delay_on_commit(job)`.
    """
    with self.app.producer_or_acquire() as producer:
        producer.publish(
            job,
            exchange="",
            routing_key=QUEUE,
            declare=[JOBS],
            serializer="json",
            delivery_mode="persistent",
            mandatory=True,  # a message that reaches no queue raises instead of vanishing
            message_id=job["task_id"],
        )


@app.task(autoretry_for=(Exception,), retry_backoff=True, max_retries=None)
def take_end(webhook_id: str, body: dict[str, Any]) -> None:
    """Act on a `complete` or `failed`, once. The view verifies the webhook, calls `.delay` and answers 2xx."""
    with sqlite3.connect(os.environ.get("DATABASE", "celery.sqlite3")) as database:  # one transaction
        database.execute("CREATE TABLE IF NOT EXISTS webhooks (id TEXT PRIMARY KEY)")
        noted = database.execute("INSERT INTO webhooks VALUES (?) ON CONFLICT DO NOTHING", (webhook_id,))
        if noted.rowcount == 1:
            # One text: Celery logs each part of a print by itself.
            print(f"ended {body['generation_id']} {body.get('error_code', 'complete')}", flush=True)


if __name__ == "__main__":
    given_id, prompt, *more = sys.argv[1:]
    made: dict[str, Any] = {
        "task_id": str(uuid.uuid4()),
        "type": "image_generation",
        # A number or text: it is told back as it is published.
        "data": {"generation_id": int(given_id) if given_id.isdecimal() else given_id, "prompt": prompt}
        | (json.loads(more[0]) if more else {}),
        "created_at": datetime.now(UTC).isoformat(),
    }
    publish_job.delay(made)
    print(made["task_id"])
