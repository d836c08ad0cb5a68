"""Charge and note the job in one transaction; publish what is noted, after the commit."""

import json
import os
import uuid
from typing import Any

import pika
from django.db import transaction
from django.db.models import F
from django.utils import timezone

from gallery.models import Account, Generation, OutboxMessage

PRICE = 10
QUEUE = os.environ.get("RABBITMQ_QUEUE", "image_generation")


def request_image(account_id: int, prompt: str, **fields: Any) -> Generation:
    """Charge for a picture and order it. Raises `ValueError` where the account has too little."""
    with transaction.atomic():
        if not Account.objects.filter(pk=account_id, balance__gte=PRICE).update(balance=F("balance") - PRICE):
            raise ValueError(f"account {account_id} has less than {PRICE}")
        generation = Generation.objects.create(account_id=account_id, price=PRICE)
        task_id = uuid.uuid4()
        body = {
            "task_id": str(task_id),
            "type": "image_generation",
            "data": {"generation_id": str(generation.id), "prompt": prompt} | fields,
            "created_at": timezone.now().isoformat(),
        }
        OutboxMessage.objects.create(task_id=task_id, body=body)
        # Not before the commit: a worker may be quicker. What fails here is logged, and published by the command
        # `publish_outbox` a minute later.
        transaction.on_commit(publish_outbox, robust=True)
    return generation


def publish_outbox() -> int:
    """Publish every message that is not published yet; their number."""
    waiting = OutboxMessage.objects.filter(published_at=None)
    if not waiting.exists():
        return 0
    num_published = 0
    with pika.BlockingConnection(broker()) as connection:
        channel = connection.channel()
        # Durable and without arguments, as the worker declares it: RabbitMQ refuses any other declaration.
        channel.queue_declare(QUEUE, durable=True)
        # From here on a publish returns once the broker has the message on disk, and raises where it has not.
        channel.confirm_delivery()
        for message in waiting.iterator():
            channel.basic_publish(
                exchange="",
                routing_key=QUEUE,
                body=json.dumps(message.body).encode(),
                properties=pika.BasicProperties(
                    content_type="application/json",
                    delivery_mode=pika.DeliveryMode.Persistent,
                    message_id=str(message.task_id),
                ),
                mandatory=True,  # a message that reaches no queue raises instead of vanishing
            )
            OutboxMessage.objects.filter(pk=message.pk).update(published_at=timezone.now())
            num_published += 1
    return num_published


def broker() -> pika.connection.Parameters:
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
