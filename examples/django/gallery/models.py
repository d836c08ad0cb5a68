"""What is sold, what is still to be published, and which webhooks were acted on."""

import uuid

from django.db import models


class Account(models.Model):
    """A user's money."""

    balance = models.PositiveIntegerField()


class Generation(models.Model):
    """A picture that was paid for. Its key is the job's `generation_id`."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4)
    account = models.ForeignKey(Account, models.PROTECT)
    price = models.PositiveIntegerField()
    state = models.CharField(max_length=20, default="waiting")
    detail = models.TextField(default="")
    is_refunded = models.BooleanField(default=False)


class OutboxMessage(models.Model):
    """A job, written in the transaction that charges for it. To publish it twice does it only once."""

    task_id = models.UUIDField(primary_key=True, default=uuid.uuid4)
    body = models.JSONField()
    published_at = models.DateTimeField(null=True)


class SeenWebhook(models.Model):
    """A webhook that was acted on: the header `webhook-id`, which is the same over all tries."""

    id = models.CharField(primary_key=True, max_length=100)
