"""`darkroom cancel`: ask the workers to end a job, by its task or by its generation."""

import json
import re
import uuid

from rich.console import Console

from config.broker import BrokerSettings
from worker.amqp.publisher import PublishFailed, broadcast
from worker.amqp.topology import QueueNames
from worker.messages.generation_id import RIGHT, is_generation_id

# As a program writes one: 007 is text.
NUMBER = re.compile(r"[1-9][0-9]{0,18}")


class NoId(ValueError):
    """What was given is no id; the message says what one is."""


def orders_of(text: str, *, is_task: bool = False, is_generation: bool = False) -> list[dict[str, str | int]]:
    """The orders that an id stands for: a UUID may be of a task and of a generation, so that both are asked for.

    `is_task` and `is_generation` say which it is. Raises `NoId`. Pure.
    """
    task_id = _uuid(text)
    if is_task and task_id is None:
        raise NoId(f"{text!r:.60} is no task id, which is a UUID like 660f9511-f3ac-52e5-b827-557766551111")
    orders: list[dict[str, str | int]] = []
    if task_id is not None and not is_generation:
        orders.append({"task_id": task_id})
    generation_id = int(text) if NUMBER.fullmatch(text) and is_generation_id(int(text)) else text
    if not is_task and is_generation_id(generation_id):
        orders.append({"generation_id": generation_id})
    if not orders:
        raise NoId(f"{text!r:.60} is neither a task id (a UUID) nor a generation id ({RIGHT})")
    return orders


def cancel(settings: BrokerSettings, orders: list[dict[str, str | int]], console: Console) -> bool:
    """Send the orders to all workers and say what was sent; False where none of them heard it."""
    exchange = QueueNames(settings.queue).cancel_exchange
    try:
        is_heard = broadcast(settings, exchange, [json.dumps(order).encode() for order in orders])
    except PublishFailed as error:
        console.print("[bold red]Not cancelled:[/]", end=" ")
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        return False
    sent = " and ".join(json.dumps(order) for order in orders)
    if not is_heard:
        console.print("[bold red]Not cancelled:[/]", end=" ")
        reason = f"no worker listens on the exchange {exchange}, and orders are not kept for those that start later"
        console.print(reason, markup=False, highlight=False, soft_wrap=True)
        return False
    told = f"{sent} was sent to the workers. A job that runs ends at its next step, one that waits before it starts."
    console.print(told, markup=False, highlight=False, soft_wrap=True)
    return True


def _uuid(text: str) -> str | None:
    try:
        return str(uuid.UUID(text))
    except ValueError:
        return None
