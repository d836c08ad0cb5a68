"""`darkroom cancel`: broadcast a cancel order, by task or by generation."""

import json
import re
import uuid
from contextlib import suppress

from rich.console import Console

from config.broker import BrokerSettings
from worker.amqp.publisher import PublishFailed, broadcast
from worker.amqp.topology import QueueNames
from worker.messages.generation_id import ID_RULE, is_generation_id

# As a program writes one: 007 is text.
NUMBER = re.compile(r"[1-9][0-9]{0,18}")


class InvalidId(ValueError):
    """The argument is no id; the message says what one is."""


def orders_of(text: str, *, is_task: bool = False, is_generation: bool = False) -> list[dict[str, str | int]]:
    """Return the orders for an id. A UUID may be a task's or a generation's: without a flag both are sent.

    Raises `InvalidId`. Pure.
    """
    task_id: str | None = None
    with suppress(ValueError):
        task_id = str(uuid.UUID(text))
    if is_task and task_id is None:
        raise InvalidId(f"{text!r:.60} is no task id, which is a UUID like 660f9511-f3ac-52e5-b827-557766551111")
    orders: list[dict[str, str | int]] = []
    if task_id is not None and not is_generation:
        orders.append({"task_id": task_id})
    generation_id = int(text) if NUMBER.fullmatch(text) and is_generation_id(int(text)) else text
    if not is_task and is_generation_id(generation_id):
        orders.append({"generation_id": generation_id})
    if not orders:
        raise InvalidId(f"{text!r:.60} is neither a task id (a UUID) nor a generation id ({ID_RULE})")
    return orders


def cancel(settings: BrokerSettings, orders: list[dict[str, str | int]], console: Console) -> bool:
    """Broadcast the orders to all workers and print what was sent; False where no worker received them."""
    exchange = QueueNames.of(settings).cancel_exchange
    try:
        is_received = broadcast(settings, exchange, [json.dumps(order).encode() for order in orders])
    except PublishFailed as error:
        console.print("[bold red]Not cancelled:[/]", end=" ")
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        return False
    sent = " and ".join(json.dumps(order) for order in orders)
    if not is_received:
        console.print("[bold red]Not cancelled:[/]", end=" ")
        reason = f"no worker listens on the exchange {exchange}, and orders are not kept for those that start later"
        console.print(reason, markup=False, highlight=False, soft_wrap=True)
        return False
    outcome = f"{sent} was sent to the workers. A job that runs ends at its next step, one that waits before it starts."
    console.print(outcome, markup=False, highlight=False, soft_wrap=True)
    return True
