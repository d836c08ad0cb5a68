"""A body that is too large to parse, cut down to what names the job: its other values are skipped, not read. Pure."""

import json
import re

# Skipping takes some microseconds for each; what is nested in a hundred thousand values is worth no more time.
MAX_TOKENS = 100_000
MAX_SCALAR_BYTES = 1024
# A text is skipped at memory's speed up to its first escaped quotation mark, and from there at a tenth of a second for
# so many bytes.
MAX_ESCAPED_BYTES = 16_000_000
BOM = b"\xef\xbb\xbf"

# By the place in the message: what is read there. Everything else becomes null, under its own name.
_READ_AT_TOP = frozenset({"task_id", "type", "generation_id"})
_READ_IN_DATA = frozenset({"generation_id"})
_DATA = "data"

_BLANKS = re.compile(rb"[ \t\r\n]*")
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_SIGN = re.compile(rb'["{}\[\]]')
_SCALAR = re.compile(rb"[-+.0-9A-Za-z]+")


def outline_of(body: bytes, max_bytes: int) -> bytes:
    """The message in `body` as JSON of its ids alone: keys stay, so that a repeated one is still seen.

    Takes no more memory than `max_bytes`, and about a second for 128 MB. Raises `ValueError` for what is no JSON object
    as far as it is looked at, and where there is more than `MAX_TOKENS` to skip.
    """
    return _Reader(body, max_bytes).outline()


class _Reader:
    """Walks once over the body; nothing of it is copied but what goes into the outline."""

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
            self._keep(self._scalar())
        else:
            self._skip_value()
            self._keep(b"null")

    def _scalar(self) -> bytes:
        """A value that is read: text or a number. null for what is nested or long, which is no id."""
        self._skip_blanks()
        began_at = self._at
        self._skip_value()
        value = self._body[began_at : self._at] if self._at - began_at <= MAX_SCALAR_BYTES else b"null"
        return b"null" if value.startswith((b"{", b"[")) else value

    def _skip_value(self) -> None:
        if self._next() in (b"{", b"["):
            self._skip_nested()
        else:
            self._string() if self._next() == b'"' else self._match(_SCALAR)

    def _skip_nested(self) -> None:
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
