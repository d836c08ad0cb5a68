"""Decode the content headers of AMQP messages, whatever bytes a publisher put into them.

pika decodes all properties of a message before it delivers the message, and an exception there ends the connection:
the broker redelivers the message, which ends the next one, without end. RabbitMQ accepts far more than pika decodes:
timestamps of any 64 bits, tables nested thousands deep, names that are no UTF-8. Here a value that has no Python form
stays bytes or a number, and what follows a field of unknown length is left out.

The field types are those of RabbitMQ: AMQP 0-9-1 errata, section 3. `l` and `L` are signed there, `s` is a short
integer. `U` is the specification's own short integer, which RabbitMQ refuses and other brokers may pass on.
"""

import struct
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, NamedTuple

import pika.frame
import pika.spec
from pika.adapters.select_connection import SelectConnection

# Deeper values stay bytes: publishers nest tables a few levels, and each level takes stack to decode.
MAX_DEPTH = 16

_FRAME_START = struct.Struct(">BHI")  # type, channel, bytes of payload
_CONTENT_START = struct.Struct(">HHQ")  # class, weight, bytes of body
_IS_CONTINUED = 1  # the lowest bit of a word of flags: another word follows
_FORMATS = {
    b"t": "?",
    b"b": "b",
    b"B": "B",
    b"s": "h",
    b"U": "h",
    b"u": "H",
    b"I": "i",
    b"i": "I",
    b"l": "q",
    b"L": "q",
    b"f": "f",
    b"d": "d",
}
_BASIC = pika.spec.BasicProperties
_OCTETS = (_BASIC.FLAG_DELIVERY_MODE, _BASIC.FLAG_PRIORITY)
_FLAGS = tuple(1 << bit for bit in range(15, 1, -1))  # the order in which the properties follow one another


class _EndUnknown(Exception):
    """A length points past the end, or a type is unknown: the next field's offset is undefined."""


class _Field(NamedTuple):
    """A field of a table, and its encoded bytes: name, type and value."""

    name: str
    value: Any
    encoded: bytes


class Properties(pika.spec.BasicProperties):  # type: ignore[misc]
    """The properties of a message, decoded from any bytes; missing properties are absent.

    A subclass, since pika asserts that type on returned messages; all of its behaviour is replaced.

    `headers` holds text, integers, floats, `Decimal`, `datetime`, bytes, None, and lists and dicts of them. Of fields
    with the same name the first counts, as for the broker. `timestamp` and `priority` are the properties: whatever
    numbers were given.
    """

    def __init__(self, encoded: bytes) -> None:
        self._parts: dict[int, bytes] = {}  # by flag, as they came
        with suppress(_EndUnknown):
            reader = _Reader(encoded)
            given = word = reader.number("H")
            while word & _IS_CONTINUED:
                word = reader.number("H")  # AMQP 0-9-1 has no properties for these flags
            for flag in _FLAGS:
                if given & flag:
                    self._parts[flag] = reader.part(flag)
        self._fields = _fields_of(self._parts.get(_BASIC.FLAG_HEADERS, b"")[4:])
        stamp = self._parts.get(_BASIC.FLAG_TIMESTAMP)
        self.timestamp: int | None = None if stamp is None else int.from_bytes(stamp)
        octet = self._parts.get(_BASIC.FLAG_PRIORITY)
        self.priority: int | None = None if octet is None else octet[0]

    @property
    def headers(self) -> Mapping[str, Any]:
        """The header table."""
        return _as_dict(self._fields)

    def for_copy(self, *, without: tuple[str, ...]) -> "Properties":
        """Return the properties for a copy of the message, without the headers named.

        The user id is left out too: the broker accepts it only from that user.
        """
        table = b"".join(field.encoded for field in self._fields if field.name not in without)
        parts = {flag: part for flag, part in self._parts.items() if flag != _BASIC.FLAG_USER_ID}
        if _BASIC.FLAG_HEADERS in parts:
            parts[_BASIC.FLAG_HEADERS] = len(table).to_bytes(4) + table
        return Properties(b"".join((sum(parts).to_bytes(2), *parts.values())))

    def encode(self) -> list[bytes]:
        """Encode for publishing, as pika's frames require it."""
        return [sum(self._parts).to_bytes(2), *self._parts.values()]


class TolerantConnection(SelectConnection):  # type: ignore[misc]
    """pika's connection with our decoding of content headers. `_read_frame` is pika's own name, up to 1.4."""

    def _read_frame(self) -> Any:
        """Decode the frame that the buffer begins with, and return its length and it; None where it is incomplete."""
        buffer = self._frame_buffer
        if buffer[:1] == bytes((pika.spec.FRAME_HEADER,)) and len(buffer) >= _FRAME_START.size:
            _, channel_number, num_bytes = _FRAME_START.unpack_from(buffer)
            begin, end = _FRAME_START.size, _FRAME_START.size + num_bytes
            if num_bytes >= _CONTENT_START.size and buffer[end : end + 1] == bytes((pika.spec.FRAME_END,)):
                _, _, body_bytes = _CONTENT_START.unpack_from(buffer, begin)
                properties = Properties(buffer[begin + _CONTENT_START.size : end])
                return end + 1, pika.frame.Header(channel_number, body_bytes, properties)
        return super()._read_frame()


class _Reader:
    """A reader of AMQP's elements in sequence. Every method but `is_at_end` and `items` raises `_EndUnknown`."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.offset = 0

    @property
    def is_at_end(self) -> bool:
        return self.offset == len(self._content)

    def taken_since(self, offset: int) -> bytes:
        return self._content[offset : self.offset]

    def number(self, format_: str) -> Any:
        return struct.unpack(f">{format_}", self._take(struct.calcsize(f">{format_}")))[0]

    def short_string(self) -> bytes:
        return self._take(self.number("B"))

    def long_string(self) -> bytes:
        return self._take(self.number("I"))

    def part(self, flag: int) -> bytes:
        """Return the bytes of the flag's property."""
        begin = self.offset
        if flag in _OCTETS:
            self._take(1)
        elif flag == _BASIC.FLAG_TIMESTAMP:
            return self._take(8)
        elif flag == _BASIC.FLAG_HEADERS:
            self.long_string()
        else:
            self.short_string()
        return self.taken_since(begin)

    def value(self, depth: int) -> Any:
        """Decode a field's type and value. `depth` counts the tables and arrays around it."""
        match kind := self._take(1):
            case b"S":
                return _text_or_bytes(self.long_string())
            case b"x":
                return self.long_string()
            case b"F" | b"A":
                content = self.long_string()
                if depth >= MAX_DEPTH:
                    return content
                return _as_dict(_fields_of(content, depth + 1)) if kind == b"F" else _Reader(content).items(depth + 1)
            case b"T":
                return _moment_or_number(self.number("Q"))
            case b"D":
                scale, digits = self.number("B"), self.number("I")
                return Decimal(digits).scaleb(-scale)
            case b"V":
                return None
            case _ if kind in _FORMATS:
                return self.number(_FORMATS[kind])
        raise _EndUnknown

    def items(self, depth: int) -> list[Any]:
        """Decode an array's items; those from one of unknown length on are left out."""
        found = []
        with suppress(_EndUnknown):
            while not self.is_at_end:
                found.append(self.value(depth))
        return found

    def _take(self, num_bytes: int) -> bytes:
        taken = self._content[self.offset : self.offset + num_bytes]
        if len(taken) < num_bytes:
            raise _EndUnknown
        self.offset += num_bytes
        return taken


def _fields_of(table: bytes, depth: int = 0) -> list[_Field]:
    reader, fields = _Reader(table), []
    with suppress(_EndUnknown):
        while not reader.is_at_end:
            begin = reader.offset
            name = reader.short_string().decode("utf-8", "backslashreplace")
            value = reader.value(depth)
            fields.append(_Field(name, value, reader.taken_since(begin)))
    return fields


def _as_dict(fields: list[_Field]) -> dict[str, Any]:
    return {field.name: field.value for field in reversed(fields)}


def _text_or_bytes(content: bytes) -> str | bytes:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content


def _moment_or_number(seconds: int) -> datetime | int:
    """Return the time, or the number where it is out of range, as from publishers that count in milliseconds."""
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):
        return seconds
