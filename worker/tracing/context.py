"""The trace context of a message, as it travels: W3C Trace Context, `traceparent` and `tracestate`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

TRACEPARENT, TRACESTATE = "traceparent", "tracestate"
# Section 3.2 of the recommendation: ff and ids of zeros are invalid, and versions after 00 may add to the end.
_IDS = r"(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
_PARENT = re.compile(rf"00-{_IDS}|(?!00|ff)[0-9a-f]{{2}}-{_IDS}(?:-[!-~]{{1,64}})?")
_STATE = re.compile(r"[ -~]{1,512}")  # section 3.3.1.5: 512 characters at least are passed on


@dataclass(frozen=True, slots=True)
class TraceContext:
    """What a span's descendants are told; both texts are empty where nothing is traced, and fit for an HTTP header."""

    traceparent: str = ""
    tracestate: str = ""

    @classmethod
    def from_headers(cls, headers: Mapping[str, Any]) -> Self:
        """Read the headers of a message. What is no trace context is left out: headers are whatever was published."""
        parent, state = (_text(headers.get(name)) for name in (TRACEPARENT, TRACESTATE))
        if not _PARENT.fullmatch(parent):
            return cls()
        return cls(parent, state if _STATE.fullmatch(state) else "")

    @property
    def headers(self) -> dict[str, str]:
        """The headers of a message or a request; none where nothing is traced."""
        given = {TRACEPARENT: self.traceparent, TRACESTATE: self.tracestate}
        return {name: value for name, value in given.items() if value}

    def __bool__(self) -> bool:
        return bool(self.traceparent)


NO_TRACE = TraceContext()


def _text(value: Any) -> str:
    # Some clients publish text as a byte array.
    text = value.decode("latin-1") if isinstance(value, bytes) else value
    return text.strip() if isinstance(text, str) else ""
