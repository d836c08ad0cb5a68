"""Message properties as bytes: what publishers of other clients send, and what a fuzzer makes of it.

RabbitMQ checks the structure and nothing else, so all that follows its field types comes through to consumers.
"""

import random
import struct
from typing import Any

import pika

from tests.hostile.fuzzing import mutated_bytes
from worker.amqp.content_headers import Properties

CONTENT_TYPE, CONTENT_ENCODING, HEADERS, DELIVERY_MODE, PRIORITY = (1 << bit for bit in (15, 14, 13, 12, 11))
CORRELATION_ID, REPLY_TO, EXPIRATION, MESSAGE_ID, TIMESTAMP = (1 << bit for bit in (10, 9, 8, 7, 6))
TYPE, USER_ID, APP_ID, CLUSTER_ID = (1 << bit for bit in (5, 4, 3, 2))
PERSISTENT = {DELIVERY_MODE: b"\x02"}
SHORT_STRINGS = (CONTENT_TYPE, CONTENT_ENCODING, CORRELATION_ID, REPLY_TO, MESSAGE_ID, TYPE, APP_ID, CLUSTER_ID)

OWN_NAMES = (b"x-darkroom-attempt", b"x-darkroom-since", b"x-darkroom-due", b"x-darkroom-lease", b"x-darkroom-reason")
BROKER_NAMES = (b"x-death", b"x-delivery-count", b"x-first-death-queue")
# Enough for Python's stack to end, and no more than fits into one frame.
DEEP = 5000
EVIL_64_BITS = (0, 1, 1_772_000_000_000, 253_402_300_800, 2**31, 2**53, 2**63 - 1, 2**63, 2**64 - 14_256_000, 2**64 - 1)


class Raw(pika.BasicProperties):  # type: ignore[misc]
    """Properties that pika sends as they are."""

    def __init__(self, encoded: bytes) -> None:
        super().__init__()
        self.encoded = encoded

    def encode(self) -> list[bytes]:
        return [self.encoded]


def properties(parts: dict[int, bytes]) -> bytes:
    """Encode properties, each given by its flag."""
    return b"".join((sum(parts).to_bytes(2), *(parts[flag] for flag in sorted(parts, reverse=True))))


def short(content: bytes) -> bytes:
    return bytes((len(content),)) + content


def long(content: bytes) -> bytes:
    return len(content).to_bytes(4) + content


def headers(*fields: bytes) -> bytes:
    """Encode persistent properties with these fields as their headers."""
    return properties(PERSISTENT | {HEADERS: long(b"".join(fields))})


def field(name: bytes, kind: bytes, payload: bytes) -> bytes:
    return short(name) + kind + payload


def nested(depth: int, kind: bytes = b"F") -> bytes:
    """Encode the payload of a table in a table, or of an array in an array, and so on."""
    content = b""
    for _ in range(depth):
        content = (short(b"") if kind == b"F" else b"") + kind + long(content)
    return long(content)


def _moment(seconds: int) -> bytes:
    return field(b"sent_at", b"T", struct.pack(">Q", seconds))


# What RabbitMQ delivers and pika 1.4.4 ends a connection over, or makes something else of.
FROM_THE_FIELD: dict[str, bytes] = {
    "milliseconds": headers(_moment(1_772_000_000_000)),
    "microseconds": headers(_moment(1_772_000_000_000_000)),
    "before 1970": headers(_moment(2**64 - 14_256_000)),
    "no moment at all": headers(_moment(2**64 - 1)),
    "in a table in an array": headers(
        field(b"x-death", b"A", long(b"F" + long(field(b"time", b"T", b"\xff" * 8)) + b"V"))
    ),
    "tables nested deep": headers(field(b"deep", b"F", nested(DEEP))),
    "arrays nested deep": headers(field(b"deep", b"A", nested(DEEP, b"A"))),
    "names and text that are no UTF-8": properties(
        PERSISTENT
        | {HEADERS: long(field(b"\xff\xfe", b"S", long(b"\xc3\x28")) + field(b"", b"V", b"")), TYPE: short(b"\xff")}
    ),
    "one name twice": headers(field(b"a", b"I", b"\0\0\0\1"), field(b"a", b"T", b"\xff" * 8)),
    "our own names": headers(
        field(b"x-darkroom-attempt", b"T", b"\xff" * 8),
        field(b"x-darkroom-since", b"d", struct.pack(">d", 1e300)),
        field(b"x-darkroom-due", b"F", nested(3)),
        field(b"x-darkroom-lease", b"A", nested(3, b"A")),
        field(b"x-darkroom-reason", b"x", long(b"\xff")),
        field(b"x-delivery-count", b"l", struct.pack(">q", -1)),
    ),
}


def fuzzed_properties(rng: random.Random) -> bytes:
    """Build properties that RabbitMQ takes, with any value in any place."""
    parts = dict(PERSISTENT)
    if rng.random() < 0.9:
        parts[HEADERS] = long(b"".join(_fuzzed_field(rng, 0) for _ in range(rng.randrange(6))))
    for flag in rng.sample(SHORT_STRINGS, rng.choice((0, 0, 1, 3))):
        parts[flag] = short(_fuzzed_text(rng, 255))
    if rng.random() < 0.3:
        parts[TIMESTAMP] = _eight_bytes(rng)
    if rng.random() < 0.2:
        parts[PRIORITY] = rng.randbytes(1)
    return properties(parts)


def damaged_properties(rng: random.Random) -> bytes:
    """Change some bytes of them: most of these only a broken broker would deliver."""
    kind = rng.random()
    if kind < 0.2:
        return rng.randbytes(rng.randrange(200))
    if kind < 0.3:
        return rng.choice((b"\xff", b"\x20\x00", b"\x20\x01", b"\x00\x01")) * rng.randrange(60)
    return mutated_bytes(rng, fuzzed_properties(rng))


def feed_properties(encoded: bytes) -> str:
    """Read them as every connection does, and what is read as the worker does."""
    read = Properties(encoded)
    again = Properties(b"".join(read.for_copy(without=()).encode()))
    assert repr(again.headers) == repr(read.headers)
    assert read.timestamp is None or 0 <= read.timestamp < 2**64
    assert all(isinstance(name, str) for name in read.headers)
    kinds = {type(value).__name__ for value in read.headers.values()}
    return " ".join(sorted(kinds)) if len(kinds) == 1 else "of several kinds" if kinds else "no headers"


def _fuzzed_field(rng: random.Random, depth: int) -> bytes:
    is_known = rng.random() < 0.3
    name = rng.choice(OWN_NAMES + BROKER_NAMES) if is_known else _fuzzed_text(rng, rng.choice((0, 3, 20, 128)))
    # These would have the broker send copies elsewhere.
    return short(b"x" if name in (b"CC", b"BCC") else name) + _fuzzed_value(rng, depth)


def _fuzzed_value(rng: random.Random, depth: int) -> bytes:
    """Choose a value's type and payload."""
    if rng.random() < 0.02:
        kind = rng.choice((b"F", b"A"))
        return kind + nested(rng.choice((20, 400, DEEP)), kind)
    kind = bytes((rng.choice(b"SSTTllLbBsuIifdDxVt" + (b"FA" if depth < 4 else b"")),))
    payload: bytes
    match kind:
        case b"S" | b"x":
            payload = long(_fuzzed_text(rng, rng.choice((0, 10, 600))))
        case b"T" | b"l" | b"L":
            payload = _eight_bytes(rng)
        case b"f":
            payload = struct.pack(">f", rng.choice((0.0, -1.5, 3e38, 1e-45)))
        case b"d":
            payload = struct.pack(">d", rng.choice((0.0, -1.5, 1e300, -1e308, 5e-324)))
        case b"F":
            payload = long(b"".join(_fuzzed_field(rng, depth + 1) for _ in range(rng.randrange(4))))
        case b"A":
            payload = long(b"".join(_fuzzed_value(rng, depth + 1) for _ in range(rng.randrange(4))))
        case _:
            payload = rng.randbytes({b"V": 0, b"s": 2, b"u": 2, b"I": 4, b"i": 4, b"D": 5}.get(kind, 1))
    return kind + payload


def _eight_bytes(rng: random.Random) -> bytes:
    return struct.pack(">Q", rng.choice(EVIL_64_BITS)) if rng.random() < 0.7 else rng.randbytes(8)


def _fuzzed_text(rng: random.Random, max_bytes: int) -> bytes:
    if rng.random() < 0.5:
        return rng.randbytes(rng.randint(0, max_bytes))
    text: Any = rng.choice(("", "x", "서울", "\x00", "\x1b[31m", "a" * 300, "../../x", "\r\nX: 1"))
    return str(text).encode()[:max_bytes]
