"""The trace context of a message: what is read of its headers, whatever a publisher put there, and what goes on."""

from typing import Any

import pytest

from worker.tracing.context import NO_TRACE, TraceContext

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
STATE = "congo=t61rcWkgMzE,rojo=00f067aa0ba902b7"


def test_the_recommendations_example_is_read_and_given_on() -> None:
    headers = {"traceparent": PARENT, "tracestate": STATE}

    assert TraceContext.from_headers(headers | {"baggage": "a=b"}).headers == headers


@pytest.mark.parametrize(
    "given", [PARENT.encode(), f" {PARENT}\t", PARENT[:-2] + "00", f"cc{PARENT[2:]}-what-the-future-will-be-like"]
)
def test_a_context_in_other_forms_is_one(given: Any) -> None:
    assert TraceContext.from_headers({"traceparent": given})


@pytest.mark.parametrize(
    "given",
    [
        None,
        "",
        7,
        True,
        3.5,
        {"traceparent": PARENT},
        [PARENT],
        b"\xff\xfe",
        "00",
        PARENT.upper(),
        PARENT[:-1],
        f"{PARENT}-00",
        f"{PARENT}\r\nX-Forged: 1",
        f"ff{PARENT[2:]}",
        f"00-{'0' * 32}-b7ad6b7169203331-01",
        f"00-0af7651916cd43dd8448eb211c80319c-{'0' * 16}-01",
        f"cc{PARENT[2:]}-{'x' * 70_000}",
        PARENT.replace("0af", "０af"),
    ],
)
def test_what_is_no_traceparent_is_no_context(given: Any) -> None:
    context = TraceContext.from_headers({"traceparent": given, "tracestate": STATE})

    assert (context, bool(context), context.headers) == (NO_TRACE, False, {})


@pytest.mark.parametrize("given", [None, 7, {}, "", "x" * 513, "a=b\r\nX-Forged: 1", "한=1", b"\xff"])
def test_a_tracestate_that_no_header_can_hold_is_left_out(given: Any) -> None:
    assert TraceContext.from_headers({"traceparent": PARENT, "tracestate": given}).headers == {"traceparent": PARENT}
