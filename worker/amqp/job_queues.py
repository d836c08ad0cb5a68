"""The queues of jobs that a session takes from by weight: one that cannot be used is left out, and tried again."""

import logging
import time
from collections.abc import Callable

import pika.exceptions

from config.logs import log_event
from worker.amqp.connection import Channel, Connection
from worker.amqp.declared import inspect_declaration
from worker.amqp.error_messages import ErrorMessages, QueueUnusable
from worker.amqp.fair_share import FairShare
from worker.amqp.intake import Intake, Message
from worker.amqp.subscriptions import Subscription, WeightedSubscription
from worker.amqp.topology import QueueNames, ensure_queues

RETRY_SECONDS = 30.0

logger = logging.getLogger(__name__)


class JobQueues:
    """Opens the intake of each session, with the queues that can be used. For the consuming thread alone.

    A queue cannot be used while its node is down, while the user may not take from it, or where no worker can take from
    it by weight as it is declared. The others' jobs go on without it.
    """

    def __init__(self, names: QueueNames, weighted: WeightedSubscription, error_messages: ErrorMessages) -> None:
        self._names = names
        self._places = weighted.places
        self._subscriptions = {name: Subscription(name, 1, weighted.on_delivery) for name, _ in weighted.queues}
        self._share = FairShare(weighted.queues)
        self._error_messages = error_messages
        self._reasons: dict[str, str] = {}  # by queue that is left out; kept beyond a session, so as to warn once
        self._retry_at = 0.0
        self._connection: Connection
        self._watch: Callable[[Channel], None]
        self._intake: Intake

    def open(
        self,
        connection: Connection,
        watch: Callable[[Channel], None],
        on_message: Callable[..., None],
        *,
        is_stopped: bool,
    ) -> Intake:
        """Begin a session. `watch` gets the channel of each queue that joins.

        Raises pika's `ChannelClosedByBroker` or `QueueUnusable` where no queue can be used.
        """

        def start(message: Message) -> None:
            queue, channel, method, properties, body, received_at = message
            on_message(self._subscriptions[queue], channel, method, properties, body, received_at=received_at)

        self._connection, self._watch = connection, watch
        self._intake = Intake(self._share, self._places, start, is_stopped=is_stopped)
        # Without a message that is asked for it is not seen whether a queue can be used again.
        self._try([name for name in self._subscriptions if not (is_stopped and name in self._reasons)])
        return self._intake

    def fill(self) -> None:
        """Try the queues that are left out, where it is time; then start messages while places are free."""
        if self._reasons and not self._intake.is_stopped and time.monotonic() >= self._retry_at:
            self._try(list(self._reasons))
        self._intake.fill()

    def _try(self, names: list[str]) -> None:
        """Have those of the queues join that can be used; raise the last refusal where no queue at all can be."""
        refusals: list[Exception] = []
        for name in names:
            try:
                self._join(name)
            except pika.exceptions.ChannelClosedByBroker as error:
                refusals.append(error)
                self._leave_out(name, self._error_messages.queue_refused(name, error))
            except QueueUnusable as error:
                refusals.append(error)
                self._leave_out(name, str(error))
            else:
                if self._reasons.pop(name, ""):
                    log_event(logger, "queue available again", queue=name)
        if refusals and not self._intake.queues:
            raise refusals[-1]
        self._retry_at = time.monotonic() + RETRY_SECONDS

    def _join(self, name: str) -> None:
        ensure_queues(self._connection, self._names, self._names.family(name))
        if warning := inspect_declaration(self._connection, name):
            raise QueueUnusable(f"{warning}; jobs cannot be taken from it by weight at all")
        channel = self._connection.channel()
        self._intake.join(name, channel)
        self._watch(channel)

    def _leave_out(self, name: str, reason: str) -> None:
        if self._reasons.get(name) != reason:
            log_event(logger, "queue left out", logging.WARNING, queue=name, reason=reason)
        self._reasons[name] = reason
