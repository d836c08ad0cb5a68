"""Read final HTTP responses: interim ones are skipped, and a head that is cut off is an error.

`http.client` skips 100 alone and takes every other 1xx for the final response, and the end of the connection for the
end of the headers. RFC 9110 15.2 has a client parse any number of 1xx before the final response; RFC 9112 8 has it
treat a head that was cut off as incomplete.
"""

import http.client
from typing import Any

SWITCHING_PROTOCOLS = 101
NO_CONTENT, NOT_MODIFIED = 204, 304
# A server that sends an interim response every second stays below both within any deadline.
MAX_INTERIM_RESPONSES = 100
MAX_HEAD_BYTES = 1 << 20
MAX_LINE_BYTES = 1 << 16


class IncompleteHead(ConnectionResetError):
    """The connection ended inside a response's head."""


class FinalResponse(http.client.HTTPResponse):
    """The final response to a request. Raises `http.client.HTTPException` where none is valid HTTP."""

    fp: Any
    headers: Any
    length: Any
    will_close: Any

    def __init__(self, sock: Any, *arguments: Any, **options: Any) -> None:
        super().__init__(sock, *arguments, **options)
        self.fp = _Head(self.fp)
        self._num_interim = 0
        self._status_line: tuple[str, int, str] | None = None

    def begin(self) -> None:
        if self.headers is not None:
            return
        head = self.fp
        super().begin()
        self.fp = head.content
        headers: Any = self.headers
        lengths = [one for line in headers.get_all("Content-Length", ()) for one in line.split(",")]
        if len({length.strip() for length in lengths}) > 1:
            # Where the body ends is not known, so that it ends with the connection (RFC 9112 6.3).
            del headers["Content-Length"]
            self.length, self.will_close = None, True
        claims_body = headers.get("Content-Length", "0").strip() != "0" or "Transfer-Encoding" in headers
        # Such a response has no body, whatever its headers say: what follows is not the next response.
        if self.status in (NO_CONTENT, NOT_MODIFIED) and claims_body:
            self.will_close = True

    def is_interim_next(self) -> bool:
        """Read one status line; return True where it was an interim response's, whose head is skipped then."""
        self.fp.is_at_status = True
        status_line: tuple[str, int, str] = super()._read_status()  # type: ignore[misc]
        if status_line[1] == SWITCHING_PROTOCOLS:
            # No request has an `Upgrade`, so what follows cannot be parsed.
            raise http.client.BadStatusLine("101 where no other protocol was asked for")
        if not 100 <= status_line[1] < 200:
            self._status_line = status_line
            return False
        self._num_interim += 1
        if self._num_interim > MAX_INTERIM_RESPONSES:
            raise http.client.HTTPException(f"more than {MAX_INTERIM_RESPONSES} interim answers")
        while self.fp.readline(MAX_LINE_BYTES) not in (b"\r\n", b"\n"):
            pass
        return True

    def _read_status(self) -> tuple[str, int, str]:
        """Return the final response's status line to `begin` of the base class, which skips 100 alone itself."""
        while self._status_line is None and self.is_interim_next():
            pass
        assert self._status_line is not None, "what is not interim was kept"  # noqa: S101
        found, self._status_line = self._status_line, None
        return found


class _Head:
    """Reader of the lines before a response's body: `readline` raises where they end too early or do not end.

    Only before a status line may the connection end: `http.client` handles that case itself.
    """

    def __init__(self, content: Any) -> None:
        self.content = content
        self.is_at_status = True
        self._num_bytes = 0

    def readline(self, max_bytes: int) -> bytes:
        line: bytes = self.content.readline(max_bytes)
        self._num_bytes += len(line)
        if self._num_bytes > MAX_HEAD_BYTES:
            raise http.client.HTTPException(f"more than {MAX_HEAD_BYTES} bytes of headers")
        if not line.endswith(b"\n") and len(line) < max_bytes and not (self.is_at_status and not line):
            raise IncompleteHead("the connection ended inside the head of an answer")
        self.is_at_status = False
        return line

    def flush(self) -> None:
        """Do nothing; `http.client` calls it before `close`."""

    def close(self) -> None:
        self.content.close()
