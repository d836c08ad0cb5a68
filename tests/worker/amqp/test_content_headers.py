"""Content headers are decoded whatever is in them: the properties alone, and through a real broker."""

import queue
import random
import struct
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal

import pika
import pytest
from pika.data import encode_table

from config.broker import BrokerSettings
from examples.parts.rabbitmq import RabbitMQ
from tests.hostile.fuzzing import Target, fuzz
from tests.hostile.raw_properties import (
    DEEP,
    FROM_THE_FIELD,
    HEADERS,
    TIMESTAMP,
    USER_ID,
    Raw,
    damaged_properties,
    feed_properties,
    field,
    fuzzed_properties,
    headers,
    long,
    nested,
    properties,
    short,
)
from tests.support.long import IS_LONG
from tests.support.world import HANG_SECONDS, eventually
from worker.amqp.connection import connect
from worker.amqp.consumer import Consumer
from worker.amqp.content_headers import MAX_DEPTH, Properties
from worker.amqp.delivery import Delivery
from worker.amqp.subscriptions import Broadcast, Subscription
from worker.amqp.topology import QueueNames

NUM_FUZZED = 3000 if IS_LONG else 1000
# A text, a truth, negatives, what no double holds exactly, fractions, moments and containers.
ODD_NUMBERS = (
    (b"S", long(b"3")),
    (b"t", b"\x01"),
    (b"I", b"\xff\xff\xff\xff"),
    (b"l", (2**63 - 1).to_bytes(8)),
    (b"d", struct.pack(">d", 1e300)),
    (b"d", struct.pack(">d", 3.5)),
    (b"D", b"\x00\x00\x00\x00\x03"),
    (b"T", (3).to_bytes(8)),
    (b"T", b"\xff" * 8),
    (b"F", nested(3)),
    (b"A", nested(DEEP, b"A")),
    (b"V", b""),
)


class Consumed:
    """A consumer on the outbox of a queue of its own."""

    def __init__(self, rabbitmq: RabbitMQ) -> None:
        names = QueueNames(f"test-{uuid.uuid4().hex[:12]}")
        self._deliveries: queue.Queue[Delivery] = queue.Queue()
        self._queue = names.outbox
        self.consumer = Consumer(
            BrokerSettings(**rabbitmq.env()),  # type: ignore[arg-type]
            names,
            [Subscription(names.outbox, 10, self._deliveries.put)],
            Broadcast(names.cancel_exchange, lambda _: None),
        )
        self.consumer.start()
        eventually(lambda: self.consumer.is_connected)
        self.connection = pika.BlockingConnection(pika.URLParameters(f"{rabbitmq.url}?heartbeat=0"))
        self._channel = self.connection.channel()

    def deliver(self, encoded: bytes) -> Delivery:
        """Return what becomes of a message with these properties."""
        self._channel.basic_publish("", self._queue, b"", Raw(encoded))
        delivery = self._deliveries.get(timeout=HANG_SECONDS)
        self.consumer.ack(delivery)
        return delivery


@pytest.fixture(scope="module")
def consumed(rabbitmq: RabbitMQ) -> Iterator[Consumed]:
    made = Consumed(rabbitmq)
    yield made
    made.consumer.close()
    made.connection.close()


@pytest.mark.parametrize(
    ("kind", "payload", "value"),
    [
        (b"t", b"\x02", True),
        (b"b", b"\xff", -1),
        (b"B", b"\xff", 255),
        (b"s", b"\xff\xfe", -2),
        (b"U", b"\xff\xfe", -2),
        (b"u", b"\xff\xfe", 65534),
        (b"I", b"\xff\xff\xff\xff", -1),
        (b"i", b"\xff\xff\xff\xff", 2**32 - 1),
        (b"l", b"\xff" * 8, -1),
        (b"L", b"\xff" * 8, -1),
        (b"f", struct.pack(">f", 1.5), 1.5),
        (b"d", struct.pack(">d", 1e300), 1e300),
        (b"D", b"\x02\x00\x00\x00\x7b", Decimal("1.23")),
        (b"S", long("서울".encode()), "서울"),
        (b"S", long(b"\xff"), b"\xff"),
        (b"x", long(b"text"), b"text"),
        (b"T", struct.pack(">Q", 1_772_000_000), datetime.fromtimestamp(1_772_000_000, UTC)),
        (b"T", struct.pack(">Q", 1_772_000_000_000), 1_772_000_000_000),
        (b"T", struct.pack(">Q", 2**64 - 14_256_000), 2**64 - 14_256_000),
        (b"V", b"", None),
        (b"F", long(field(b"a", b"V", b"") + field(b"b", b"t", b"\0")), {"a": None, "b": False}),
        (b"A", long(b"V" + b"b\x01" + b"A" + long(b"V")), [None, 1, [None]]),
    ],
)
def test_every_field_type_of_the_broker_has_its_value(kind: bytes, payload: bytes, value: object) -> None:
    assert Properties(headers(field(b"it", kind, payload))).headers == {"it": value}


def test_properties_written_by_pika_are_read_back() -> None:
    table = {"text": "a", "small": -7, "big": 2**40, "is": True, "none": None, "list": [1, "b", {"c": [None]}]}
    pieces: list[bytes] = []
    encode_table(pieces, table)

    assert Properties(properties({HEADERS: b"".join(pieces)})).headers == table


def test_field_of_unknown_length_drops_those_behind_it_and_none_before() -> None:
    table = field(b"first", b"B", b"\x01") + field(b"odd", b"?", b"\x07") + field(b"last", b"B", b"\x02")
    inner = field(b"around", b"F", long(table)) + field(b"behind", b"B", b"\x03")

    assert Properties(headers(table)).headers == {"first": 1}
    assert Properties(headers(inner)).headers == {"around": {"first": 1}, "behind": 3}
    assert Properties(headers(field(b"first", b"B", b"\x01") + b"\xff")).headers == {"first": 1}


def test_properties_cut_anywhere_keep_what_is_whole() -> None:
    whole = properties({HEADERS: long(field(b"a", b"B", b"\x01")), TIMESTAMP: (2**64 - 1).to_bytes(8)})
    assert (Properties(whole).headers, Properties(whole).timestamp) == ({"a": 1}, 2**64 - 1)

    cut = [Properties(whole[:end]) for end in range(len(whole))]

    assert [one.timestamp for one in cut] == [None] * len(cut)
    assert cut[-1].headers == {"a": 1}
    assert cut[0].headers == {}


def test_flags_of_a_second_word_change_nothing() -> None:
    table = long(field(b"a", b"B", b"\x01"))

    assert Properties(b"\x20\x01\xff\xff\x00\x00" + table).headers == {"a": 1}
    assert Properties(b"\xff\xff" * 50).headers == {}


@pytest.mark.parametrize("kind", [b"F", b"A"])
def test_nesting_ends_in_bytes_however_deep_it_is(kind: bytes) -> None:
    value = Properties(headers(field(b"deep", kind, nested(20_000, kind)), field(b"b", b"B", b"\x01"))).headers["deep"]

    for _ in range(MAX_DEPTH):
        (value,) = value.values() if kind == b"F" else value
    assert isinstance(value, bytes)


def test_first_of_fields_with_one_name_counts() -> None:
    """The broker puts its own count in the place of the first."""
    twice = headers(field(b"x-delivery-count", b"B", b"\x05"), field(b"x-delivery-count", b"B", b"\xff"))

    assert Properties(twice).headers == {"x-delivery-count": 5}


def test_a_copy_has_all_properties_byte_by_byte_but_the_user_and_what_is_left_out() -> None:
    odd = field(b"\xff", b"T", b"\xff" * 8)
    whole = {HEADERS: long(odd + field(b"CC", b"A", long(b""))), TIMESTAMP: b"\xff" * 8, USER_ID: short(b"guest")}

    copy = Properties(properties(whole)).for_copy(without=("CC",))

    assert b"".join(copy.encode()) == properties({HEADERS: long(odd), TIMESTAMP: b"\xff" * 8})
    assert b"".join(Properties(b"").for_copy(without=("CC",)).encode()) == b"\0\0"


@pytest.mark.parametrize("make", [fuzzed_properties, damaged_properties])
def test_any_bytes_are_read(make: object) -> None:
    tally = fuzz(Target("properties", make, feed_properties), NUM_FUZZED)  # type: ignore[arg-type]

    assert tally.crashes == []
    assert len(tally.outcomes) > 5


def test_properties_of_other_clients_are_read_whole() -> None:
    for name, encoded in FROM_THE_FIELD.items():
        assert Properties(encoded).headers, name
    assert Properties(FROM_THE_FIELD["milliseconds"]).headers == {"sent_at": 1_772_000_000_000}
    assert feed_properties(random.Random(1).randbytes(100_000))


def own(name: bytes, kind: bytes, payload: bytes) -> bytes:
    return headers(field(b"x-darkroom-" + name, kind, payload))


@pytest.mark.parametrize(
    "encoded",
    [
        *(own(b"attempt", kind, payload) for kind, payload in ODD_NUMBERS),
        *(own(b"since", kind, payload) for kind, payload in ODD_NUMBERS),
        *(own(b"due", kind, payload) for kind, payload in ODD_NUMBERS),
        *(headers(field(b"x-delivery-count", kind, payload)) for kind, payload in ODD_NUMBERS),
    ],
)
def test_invalid_number_in_our_headers_counts_as_absent(consumed: Consumed, encoded: bytes) -> None:
    before = int(time.time())

    delivery = consumed.deliver(encoded)

    assert (delivery.attempt, delivery.num_deliveries, delivery.due) == (1, 0, 0.0)
    assert before <= delivery.since <= time.time()


def test_the_numbers_that_workers_write_are_read(consumed: Consumed) -> None:
    fields = (
        field(b"x-darkroom-attempt", b"I", (3).to_bytes(4)),
        field(b"x-darkroom-since", b"l", (1_700_000_000).to_bytes(8)),
        field(b"x-darkroom-due", b"I", (1_700_000_060).to_bytes(4)),
    )

    delivery = consumed.deliver(headers(*fields))

    assert (delivery.attempt, delivery.since, delivery.due) == (3, 1_700_000_000.0, 1_700_000_060.0)


def test_parking_time_in_the_future_is_read_as_now(consumed: Consumed) -> None:
    """An event expires a day after it was parked: this one would never expire."""
    delivery = consumed.deliver(own(b"since", b"l", (2**53 - 1).to_bytes(8)))

    assert delivery.since <= time.time()


def test_a_message_that_the_broker_returns_is_known_to_be_unroutable(rabbitmq: RabbitMQ) -> None:
    """pika asserts the type of a returned message's properties."""
    connection = connect(BrokerSettings(**rabbitmq.env()), "returns")  # type: ignore[arg-type]
    try:
        channel = connection.channel()
        channel.confirm_delivery()
        with pytest.raises(pika.exceptions.UnroutableError) as raised:
            channel.basic_publish("", f"missing-{uuid.uuid4()}", b"x", mandatory=True)
        assert [message.body for message in raised.value.messages] == [b"x"]
    finally:
        connection.close()
