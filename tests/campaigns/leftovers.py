"""What is left in the queues and in the bucket when a campaign is over."""

import hashlib
import json
import time
from io import BytesIO
from typing import Any

import pika
from PIL import Image, UnidentifiedImageError

from tests.campaigns.figures import StoredObject
from tests.support.world import HANG_SECONDS, World

SETTLE_SECONDS = 90.0  # an event whose copy waits in the outbox has its turn within 36


def wait_until_settled(world: World, *, num_parked: int) -> dict[str, int]:
    """Wait until the queues hold nothing but dead letters and parked events, or the time has run out; return their
    depths.
    """
    deadline = time.monotonic() + SETTLE_SECONDS
    num_clean = 0
    while True:
        left = {name: sum(depth) for name, depth in world.queues().items()}
        # A message on its way from one queue to another is for a moment in neither count.
        expected = {name: num_parked if name == ".outbox" else 0 for name in left if name != ".dead"}
        num_clean = num_clean + 1 if expected.items() <= left.items() else 0
        if num_clean == 3 or time.monotonic() > deadline:
            return left
        time.sleep(0.3)


def take_parked(world: World, *, num_parked: int) -> list[int]:
    """Take the generations of the events in the outbox, which is empty then; 0 for what cannot be read.

    Those that killed workers held come back in a moment: `num_parked` are waited for.
    """
    connection = pika.BlockingConnection(pika.URLParameters(world.rabbitmq.url))
    channel = connection.channel()
    deadline = time.monotonic() + HANG_SECONDS
    taken: list[int] = []
    while True:
        method, _, body = channel.basic_get(f"{world.queue}.outbox", auto_ack=True)
        if method is not None:
            taken.append(int(json.loads(body).get("generation_id", 0)))
        elif len(taken) >= num_parked or time.monotonic() > deadline:
            connection.close()
            return taken
        else:
            time.sleep(0.3)


def stored(world: World) -> dict[str, StoredObject]:
    client = world.store.client()
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=world.bucket, Prefix="generations/")
    keys = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
    return {key: _look(client.get_object(Bucket=world.bucket, Key=key)) for key in keys}


def _look(answer: Any) -> StoredObject:
    content = answer["Body"].read()
    try:
        Image.open(BytesIO(content)).load()
        is_image = True
    except (UnidentifiedImageError, OSError):
        is_image = False
    return StoredObject(hashlib.sha256(content).hexdigest(), answer["Metadata"].get("sha256", ""), is_image)
