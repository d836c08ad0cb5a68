"""Read a message's envelope: a JSON object, its type and its ids; of a body too large to parse, the ids alone. Pure."""

import hashlib
import json
import re
import uuid
from collections.abc import Mapping
from typing import Any

from worker.messages.generation_id import ID_RULE, is_generation_id
from worker.messages.job import JobRejected, Undecodable
from worker.messages.rules import MAX_REASON_CHARS, Identity, Rejection, shown_value

MESSAGE_TYPE = "image_generation"
# A real message is 1-2 kB; json.loads of an 11 MB one takes 256 MB of memory.
MAX_BODY_BYTES = 256 * 1024
_TASK_NAMESPACE = uuid.UUID("5b3f0f3c-2f0e-4f0b-9a55-1d7f5be1c0de")

# Skipping a token takes some microseconds: the limit keeps a hostile body under about a second.
MAX_TOKENS = 100_000
MAX_SCALAR_BYTES = 1024
# A string is skipped at the speed of memory up to its first escaped quotation mark; from there so many bytes take a
# tenth of a second.
MAX_ESCAPED_BYTES = 16_000_000
BOM = b"\xef\xbb\xbf"

# The keys whose values are read, by their place in the message. All other values become null, under their own key.
_READ_AT_TOP = frozenset({"task_id", "type", "generation_id"})
_READ_IN_DATA = frozenset({"generation_id"})
_DATA = "data"

_BLANKS = re.compile(rb"[ \t\r\n]*")
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_SIGN = re.compile(rb'["{}\[\]]')
_SCALAR = re.compile(rb"[-+.0-9A-Za-z]+")


def parse(body: bytes) -> dict[str, Any]:
    """Parse the body as a JSON object of our type. Raises `Undecodable`."""
    try:
        # Some editors and .NET put a byte order mark before UTF-8.
        message = json.loads(body.decode("utf-8-sig"), object_pairs_hook=_without_duplicates)
    except UnicodeDecodeError as error:
        raise Undecodable(f"the body is not UTF-8: {error.reason} at byte {error.start}") from error
    except RecursionError as error:
        raise Undecodable("the body is nested too deeply") from error
    except ValueError as error:
        raise Undecodable(f"the body is not JSON: {error}"[:MAX_REASON_CHARS]) from error

    if not isinstance(message, dict):
        raise Undecodable(f"the body is a JSON {type(message).__name__}, not an object")
    if message.get("type", MESSAGE_TYPE) != MESSAGE_TYPE:
        raise Undecodable(f"type is {shown_value(message['type'])}; this queue takes {MESSAGE_TYPE!r}")
    return message


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("an object names the same key twice")
    return fields


def identify(message: Mapping[str, Any], body: bytes) -> Identity:
    """Return the ids of the message: its UUID in the canonical form, or one derived from the body.

    Raises `Undecodable` without a valid `generation_id`.
    """
    fields = message.get("data")
    generation_id = fields.get("generation_id") if isinstance(fields, dict) else None
    if generation_id in (None, ""):
        generation_id = message.get("generation_id")
    if not is_generation_id(generation_id):
        raise Undecodable(f"generation_id is {shown_value(generation_id)}; it must be {ID_RULE}")

    task_id = message.get("task_id")
    if isinstance(task_id, str) and len(task_id) <= 64:
        try:
            return Identity(str(uuid.UUID(task_id)), generation_id)
        except ValueError:
            pass  # not a UUID: it would end up in object keys and headers, so it is replaced, not cleaned
    # Derived from the body: the same message gets the same id.
    return Identity(str(uuid.uuid5(_TASK_NAMESPACE, hashlib.sha256(body).hexdigest())), generation_id)


def oversized_rejection(body: bytes) -> JobRejected:
    """Return the rejection of a body beyond the limit, from its ids alone. Raises `Undecodable` where it has none."""
    size = f"the body has {len(body)} bytes; at most {MAX_BODY_BYTES} are read"
    try:
        outline = outline_of(body, MAX_BODY_BYTES)
        identity = identify(parse(outline), body)
    except (ValueError, Undecodable) as error:
        raise Undecodable(f"{size}, and its ids cannot be found: {error}"[:MAX_REASON_CHARS]) from error
    return Rejection(identity)("INVALID_INPUT", f"{size}: shorten the message")


def outline_of(body: bytes, max_bytes: int) -> bytes:
    """Return the message in `body` as JSON of its ids alone. Keys stay, so that a repeated one is still detected.

    Takes no more memory than `max_bytes`, and about a second for 128 MB. Raises `ValueError` for what is no JSON object
    as far as it is read, and where there is more than `MAX_TOKENS` to skip.
    """
    return _OutlineReader(body, max_bytes).outline()


class _OutlineReader:
    """One pass over the body, which copies only what goes into the outline."""

    def __init__(self, body: bytes, max_bytes: int) -> None:
        self._body = body
        self._at = len(BOM) if body.startswith(BOM) else 0
        self._tokens_left = MAX_TOKENS
        self._bytes_left = max_bytes
        self._pieces: list[bytes] = []

    def outline(self) -> bytes:
        self._object(is_data=False)
        self._skip_blanks()
        if self._at != len(self._body):
            raise ValueError("something follows the JSON object")
        return b"".join(self._pieces)

    def _object(self, *, is_data: bool) -> None:
        self._take(b"{")
        self._keep(b"{")
        if self._next() != b"}":
            self._member(is_data=is_data)
            while self._next() == b",":
                self._take(b",")
                self._keep(b",")
                self._member(is_data=is_data)
        self._take(b"}")
        self._keep(b"}")

    def _member(self, *, is_data: bool) -> None:
        self._skip_blanks()
        began_at = self._at
        self._string()
        if self._at - began_at > MAX_SCALAR_BYTES:
            raise ValueError(f"a name at byte {began_at} is longer than {MAX_SCALAR_BYTES} bytes")
        key = self._body[began_at : self._at]
        self._take(b":")
        self._keep(key + b":")
        name = json.loads(key.decode())
        if not is_data and name == _DATA and self._next() == b"{":
            self._object(is_data=True)
        elif name in (_READ_IN_DATA if is_data else _READ_AT_TOP):
            self._skip_blanks()
            value_at = self._at
            self._skip_value()
            is_nested = self._body[value_at : value_at + 1] in (b"{", b"[")
            # A nested or long value is no id.
            is_id = not is_nested and self._at - value_at <= MAX_SCALAR_BYTES
            self._keep(self._body[value_at : self._at] if is_id else b"null")
        else:
            self._skip_value()
            self._keep(b"null")

    def _skip_value(self) -> None:
        if self._next() not in (b"{", b"["):
            self._string() if self._next() == b'"' else self._match(_SCALAR)
            return
        depth = 0
        while True:
            found = _SIGN.search(self._body, self._at)
            if found is None:
                raise ValueError("the JSON is cut off")
            if found[0] == b'"':
                self._at = found.start()
                self._string()
                continue
            self._at = found.end()
            self._count_token()
            depth += 1 if found[0] in b"{[" else -1
            if depth == 0:
                return

    def _string(self) -> None:
        quote = self._body.find(b'"', self._at + 1)
        if self._next() == b'"' and quote > 0 and self._body[quote - 1 : quote] != b"\\":
            self._at = quote + 1
            self._count_token()
        else:
            self._match(_STRING, MAX_ESCAPED_BYTES)

    def _match(self, pattern: re.Pattern[bytes], max_bytes: int = MAX_SCALAR_BYTES) -> None:
        found = pattern.match(self._body, self._at, self._at + max_bytes)
        if found is None:
            raise ValueError(f"no JSON at byte {self._at}")
        self._at = found.end()
        self._count_token()

    def _take(self, sign: bytes) -> None:
        if self._next() != sign:
            raise ValueError(f"no {sign.decode()} at byte {self._at}")
        self._at += 1

    def _next(self) -> bytes:
        self._skip_blanks()
        return self._body[self._at : self._at + 1]

    def _skip_blanks(self) -> None:
        blanks = _BLANKS.match(self._body, self._at)
        assert blanks is not None, "it matches nothing as well"  # noqa: S101
        self._at = blanks.end()

    def _count_token(self) -> None:
        self._tokens_left -= 1
        if self._tokens_left < 0:
            raise ValueError(f"it has more than {MAX_TOKENS} values")

    def _keep(self, piece: bytes) -> None:
        self._bytes_left -= len(piece)
        if self._bytes_left < 0:
            raise ValueError("its names alone are too long")
        self._pieces.append(piece)
