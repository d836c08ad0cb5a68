"""An answer is the final one, read whole: whatever comes before it, and wherever it is cut off."""

import socket
from collections.abc import Iterable

import pytest

from clients.responses import MAX_INTERIM_RESPONSES
from clients.storage.client import Storage
from clients.storage.location import ObjectRef
from clients.webhooks import Webhook, WebhookAttempt, WebhookClient, WebhookKind, WebhookResult
from config.backend import BackendSettings
from config.store import StoreSettings
from tests.support.servers.clients_servers import AnsweringServer, Server, answer, body_of, header

DONE = Webhook(WebhookKind.COMPLETE, "660f9511:complete", {"generation_id": 456})
NEXT = Webhook(WebhookKind.FAILED, "770f9511:failed", {"generation_id": 457})

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
PROCESSING = b"HTTP/1.1 102 Processing\r\n\r\n"
EARLY_HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: </a>; rel=preload\r\nLink: </b>\r\n\r\n"
RESUMPTION = b"HTTP/1.1 104 Upload Resumption Supported\r\nLocation: /u/1\r\n\r\n"
UNREGISTERED = b"HTTP/1.1 199 \r\n\r\n"
BARE_LINES = b"HTTP/1.1 103 Early Hints\nLink: </a>\n\n"
SWITCHING = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
INTERIM = (CONTINUE, PROCESSING, EARLY_HINTS, RESUMPTION, UNREGISTERED, BARE_LINES, EARLY_HINTS * 3 + CONTINUE)


def client_of(server: Server) -> WebhookClient:
    return WebhookClient(BackendSettings(BACKEND_API_URL=server.url, INTERNAL_API_TOKEN="token"))  # type: ignore[call-arg]


def send(server: Server, *, deadline_seconds: float = 60.0) -> WebhookAttempt:
    return client_of(server).send(DONE, deadline_seconds=deadline_seconds)


@pytest.mark.parametrize("interim", INTERIM)
@pytest.mark.parametrize(
    ("status", "result"), [(200, WebhookResult.DELIVERED), (503, WebhookResult.RETRY), (422, WebhookResult.REJECTED)]
)
def test_final_answer_decides_the_result_whatever_comes_before_it(
    interim: bytes, status: int, result: WebhookResult
) -> None:
    with AnsweringServer([interim + answer(status), answer(200)]) as server:
        client = client_of(server)
        attempt = client.send(DONE)
        after = client.send(NEXT)

    assert (attempt.result, attempt.status) == (result, status)
    assert (after.result, after.status) == (WebhookResult.DELIVERED, 200)
    # The interim answer does not pass for the next one's, and costs no connection.
    assert (len(server.requests), server.num_connections) == (2, 1)


class PiecemealServer(Server):
    """Sends its pieces one after the other, each alone, and closes."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        super().__init__()
        self._pieces = list(pieces)

    def converse(self, peer: socket.socket) -> None:
        self.receive(peer)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in self._pieces:
            peer.sendall(piece)


def test_an_interim_answer_that_comes_alone_is_skipped() -> None:
    with PiecemealServer([PROCESSING, EARLY_HINTS, answer(200)]) as server:
        assert send(server).result is WebhookResult.DELIVERED


UNANSWERED = {
    "another protocol that nobody asked for": SWITCHING + answer(200),
    "only an interim answer": EARLY_HINTS,
    "cut off in an interim answer": b"HTTP/1.1 103 Early Hints\r\nLink: </a>",
    "interim answers without end": PROCESSING * (MAX_INTERIM_RESPONSES + 1) + answer(200),
    "too long an interim answer": b"HTTP/1.1 103 Early Hints\r\n" + b"Link: </a>\r\n" * 100_000 + b"\r\n" + answer(200),
    "cut off behind the status": b"HTTP/1.1 200 OK\r\n",
    "cut off in the status": b"HTTP/1.1 200",
    "cut off in a header": b"HTTP/1.1 200 OK\r\nContent-Length: 1",
    "cut off before the empty line": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n",
    "no status": b"HTTP/1.1 OK\r\n\r\n",
    "status 0": answer(0),
    "status 99": answer(99),
    "status 1000": answer(1000),
    "HTTP/0.9": b"<html>well</html>",
    "HTTP/2": b"HTTP/2 200\r\n\r\n",
    "nothing": b"",
}


@pytest.mark.parametrize("content", UNANSWERED.values(), ids=UNANSWERED.keys())
def test_incomplete_response_head_is_ambiguous(content: bytes) -> None:
    with PiecemealServer([content]) as server:
        attempt = send(server)

    assert (attempt.result, attempt.status, attempt.is_ambiguous) == (WebhookResult.RETRY, None, True)


DELIVERED = {
    "no reason": b"HTTP/1.1 200 \r\nContent-Length: 0\r\n\r\n",
    "neither reason nor space": b"HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n",
    "HTTP/1.0": b"HTTP/1.0 200 OK\r\n\r\nwell",
    "a folded header": b"HTTP/1.1 200 OK\r\nX-Note: one\r\n  two\r\nContent-Length: 0\r\n\r\n",
    "a header without a colon": b"HTTP/1.1 200 OK\r\nnonsense\r\nContent-Length: 0\r\n\r\n",
    "a body shorter than said": b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nwell",
    "a length that is none": b"HTTP/1.1 200 OK\r\nContent-Length: ten\r\n\r\nwell",
    "a negative length": b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\nwell",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 5, 6\r\n\r\nwell",
    "two lines of lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nwell",
    "a broken chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nwell\r\n",
    "a body that is no gzip": b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nwell",
}


@pytest.mark.parametrize("content", DELIVERED.values(), ids=DELIVERED.keys())
def test_a_whole_head_of_2xx_is_delivered_whatever_its_body_is(content: bytes) -> None:
    with PiecemealServer([content]) as server:
        attempt = send(server)

    assert (attempt.result, attempt.status) == (WebhookResult.DELIVERED, 200)


@pytest.mark.parametrize("location", [b"http://[", b"/caf\xe9", b"//\x00", b"http://127.0.0.1:port/"])
def test_a_redirect_to_no_address_is_a_refusal_like_any_other(location: bytes) -> None:
    with PiecemealServer([b"HTTP/1.1 302 Found\r\nLocation: " + location + b"\r\nContent-Length: 0\r\n\r\n"]) as server:
        attempt = send(server)

    assert (attempt.result, attempt.status) == (WebhookResult.REJECTED, 302)


def test_the_body_of_a_redirect_is_cut_off_as_any_other() -> None:
    with EndlessRedirect() as server:
        attempt = send(server)

    assert (attempt.result, attempt.status) == (WebhookResult.REJECTED, 302)
    assert server.num_bytes_sent < 20_000_000


@pytest.mark.parametrize("status", [204, 304])
def test_bytes_behind_an_answer_without_a_body_are_not_the_next_answer(status: int) -> None:
    # The body that it claims reads like an answer of its own.
    with AnsweringServer([answer(status, answer(200)), answer(422)]) as server:
        client = client_of(server)
        client.send(DONE)
        after = client.send(NEXT)

    assert (after.result, after.status) == (WebhookResult.REJECTED, 422)
    assert server.num_connections == 2


class EndlessRedirect(Server):
    """Redirects, with a body of 200 MB."""

    num_bytes_sent = 0

    def converse(self, peer: socket.socket) -> None:
        self.receive(peer)
        peer.sendall(answer(302, length=200_000_000, Location="/elsewhere"))
        while self.num_bytes_sent < 200_000_000:
            self.num_bytes_sent += peer.send(b"x" * 65536)


# --- The store, whose client sends a body once it was asked for it


class ExpectingStore(Server):
    """Answers the head of a PUT with `before`, and what comes behind with `after`."""

    def __init__(self, before: bytes, after: bytes) -> None:
        super().__init__()
        self._before, self._after = before, after
        self.body = b""

    def converse(self, peer: socket.socket) -> None:
        received = b""
        while b"\r\n\r\n" not in received:
            received += peer.recv(65536)
        assert header(received, "Expect") == "100-continue"
        peer.sendall(self._before)
        while len(body_of(received)) < int(header(received, "Content-Length") or 0):
            if not (chunk := peer.recv(65536)):
                break
            received += chunk
        self.body = body_of(received)
        peer.sendall(self._after)


def storage_of(server: Server) -> Storage:
    given = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_STORAGE_BUCKET_NAME": "media",
        "AWS_S3_ENDPOINT_URL": server.url,
    }
    return Storage(StoreSettings.model_validate(given))


@pytest.mark.parametrize("interim", INTERIM)
@pytest.mark.parametrize(("status", "is_written"), [(200, True), (412, False)])
def test_an_interim_answer_to_a_conditional_write_is_not_its_result(
    interim: bytes, status: int, is_written: bool
) -> None:
    with ExpectingStore(interim, CONTINUE + answer(status, ETag='"x"', Connection="close")) as server:
        written = storage_of(server).put_if_absent(
            ObjectRef("media", "jobs/1.json"), b"the record", content_type="application/json"
        )

    assert written is is_written
    assert server.body == b"the record"


@pytest.mark.parametrize("reason", [b"Precondition Failed", b""])
def test_a_final_answer_before_the_body_is_the_result_with_or_without_a_reason(reason: bytes) -> None:
    refusal = b"HTTP/1.1 412 " + reason + b"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    with ExpectingStore(refusal, b"") as server:
        written = storage_of(server).put_if_absent(
            ObjectRef("media", "jobs/1.json"), b"the record", content_type="application/json"
        )

    assert written is False
