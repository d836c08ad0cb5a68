"""One webhook call is one attempt with a verdict, whatever the other side does."""

import base64
import hashlib
import hmac
import json
import shutil
import ssl
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from clients.backend_probe import BackendProbe, BackendUnreachable, probe_backend
from clients.webhook_signature import sign_payload, signing_key
from clients.webhooks import (
    Webhook,
    WebhookAttempt,
    WebhookClient,
    WebhookKind,
    WebhookResult,
    classify,
    route_of,
)
from config.backend import BackendSettings
from tests.support.servers.clients_servers import (
    AnsweringServer,
    DrippingHandshakeServer,
    DrippingServer,
    ResettingServer,
    Server,
    SilentServer,
    answer,
    body_of,
    header,
    refused_url,
)

TOKEN = "canary-token-5f1e"
NOW = 1_800_000_000.0
DONE = Webhook(WebhookKind.COMPLETE, "660f9511:complete", {"generation_id": 456, "result_url": "https://한"})


def settings_of(url: str, *, secret: str | None = None, **others: str) -> BackendSettings:
    return BackendSettings(
        BACKEND_API_URL=url,  # type: ignore[call-arg]
        INTERNAL_API_TOKEN=TOKEN,
        WEBHOOK_SIGNING_SECRET=None if secret is None else SecretStr(secret),
        **others,  # type: ignore[arg-type]
    )


def probe(settings: BackendSettings) -> BackendProbe:
    return probe_backend(settings, route_of(settings, WebhookKind.COMPLETE))


def client_of(url: str, *, secret: str | None = None) -> WebhookClient:
    return WebhookClient(settings_of(url, secret=secret), now=lambda: NOW)


def send(server: Server, webhook: Webhook = DONE, *, deadline_seconds: float = 5.0) -> WebhookAttempt:
    return client_of(server.url).send(webhook, deadline_seconds=deadline_seconds)


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        (WebhookKind.PROGRESS, b"PATCH /base/api/webhooks/inference/progress HTTP/1.1"),
        (WebhookKind.COMPLETE, b"POST /base/api/webhooks/inference/complete HTTP/1.1"),
        (WebhookKind.FAILED, b"POST /base/api/webhooks/inference/failed HTTP/1.1"),
    ],
)
def test_each_kind_has_its_method_and_path(kind: WebhookKind, line: bytes) -> None:
    with AnsweringServer([answer(200)]) as server:
        client_of(f"{server.url}/base").send(Webhook(kind, "id", {}))

    assert server.requests[0].split(b"\r\n")[0] == line


# --- Addresses by settings


@pytest.mark.parametrize("address", ["/hooks/darkroom?code=a%20b", "{url}/hooks/darkroom?code=a%20b"])
def test_one_address_takes_every_kind_and_finds_it_in_the_signed_body(address: str) -> None:
    key = b"0123456789abcdef01234567"
    secret = "whsec_" + base64.b64encode(key).decode()
    with AnsweringServer([answer(200)] * 3) as server:
        settings = settings_of(server.url, secret=secret, WEBHOOK_URL=address.format(url=server.url))
        for kind in WebhookKind:
            WebhookClient(settings, now=lambda: NOW).send(Webhook(kind, kind.value, {"generation_id": 456}))

    for kind, request in zip(WebhookKind, server.requests, strict=True):
        assert request.split(b"\r\n")[0] == b"POST /hooks/darkroom?code=a%20b HTTP/1.1"
        assert json.loads(body_of(request)) == {"type": kind.value, "generation_id": 456}
        signed = f"{kind.value}.1800000000.".encode() + body_of(request)
        expected = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
        assert header(request, "webhook-signature") == f"v1,{expected}"


def test_a_kind_s_own_address_comes_before_the_shared_one_and_its_body_has_no_type() -> None:
    with AnsweringServer([answer(200)] * 2) as own, AnsweringServer([answer(200)]) as shared:
        settings = settings_of("http://never.invalid", WEBHOOK_URL=shared.url, WEBHOOK_FAILED_URL=f"{own.url}/refunds")
        client = WebhookClient(settings)
        attempts = [client.send(Webhook(kind, kind.value, {})) for kind in (WebhookKind.FAILED, WebhookKind.COMPLETE)]

    assert [attempt.setting for attempt in attempts] == ["WEBHOOK_FAILED_URL", "WEBHOOK_URL"]
    assert own.requests[0].split(b"\r\n")[0] == b"POST /refunds HTTP/1.1"
    assert (json.loads(body_of(own.requests[0])), json.loads(body_of(shared.requests[0]))) == ({}, {"type": "complete"})
    assert header(own.requests[0], "Authorization") == f"Bearer {TOKEN}"


@pytest.mark.parametrize(
    ("others", "method"),
    [
        ({}, "PATCH"),
        ({"WEBHOOK_PROGRESS_METHOD": "POST"}, "POST"),
        ({"WEBHOOK_PROGRESS_URL": "/progress"}, "PATCH"),
        ({"WEBHOOK_URL": "/hook"}, "POST"),
        ({"WEBHOOK_URL": "/hook", "WEBHOOK_PROGRESS_METHOD": "PATCH"}, "PATCH"),
        ({"WEBHOOK_URL": "/hook", "WEBHOOK_PROGRESS_URL": "/progress"}, "PATCH"),
    ],
)
def test_progress_is_patched_unless_told_otherwise_or_to_a_shared_address(others: dict[str, str], method: str) -> None:
    settings = settings_of("https://backend.example", **others)

    assert route_of(settings, WebhookKind.PROGRESS).method == method
    assert {route_of(settings, kind).method for kind in (WebhookKind.COMPLETE, WebhookKind.FAILED)} == {"POST"}


@pytest.mark.parametrize("status", [405, 501])
def test_refused_patch_is_answered_with_the_setting_for_post(status: int) -> None:
    with AnsweringServer([answer(status)] * 2) as server:
        patched = client_of(server.url).send(Webhook(WebhookKind.PROGRESS, "id", {}))
        posted = send(server)

    assert "WEBHOOK_PROGRESS_METHOD=POST" in patched.reason
    assert posted.reason == f"HTTP {status}"


def test_redirect_names_the_setting_of_its_address() -> None:
    with AnsweringServer([answer(301)]) as server:
        settings = settings_of("http://never.invalid", WEBHOOK_COMPLETE_URL=f"{server.url}/hook?code=secret-key-1234")
        attempt = WebhookClient(settings).send(DONE)

    assert (
        attempt.reason == "HTTP 301: a redirect, which is never followed; set WEBHOOK_COMPLETE_URL to the final address"
    )


def test_the_bytes_of_a_webhook_do_not_depend_on_the_order_of_its_keys() -> None:
    one, other = (
        Webhook(WebhookKind.COMPLETE, "id", dict(items)) for items in ([("a", 1), ("b", 2)], [("b", 2), ("a", 1)])
    )

    assert one.payload == other.payload


def test_a_webhook_carries_its_headers_and_its_body() -> None:
    with AnsweringServer([answer(204)]) as server:
        attempt = send(server)

    (request,) = server.requests
    assert attempt == WebhookAttempt(WebhookResult.DELIVERED, 204, None, "HTTP 204", False)
    assert header(request, "Authorization") == f"Bearer {TOKEN}"
    assert header(request, "X-Request-Source") == "inference-server"
    assert header(request, "Content-Type") == "application/json"
    assert header(request, "webhook-id") == "660f9511:complete"
    assert header(request, "webhook-timestamp") == "1800000000"
    assert header(request, "webhook-signature") is None
    assert json.loads(body_of(request)) == DONE.body


def test_webhook_with_a_secret_has_its_bytes_signed() -> None:
    key = b"0123456789abcdef01234567"
    with AnsweringServer([answer(200)]) as server:
        client_of(server.url, secret="whsec_" + base64.b64encode(key).decode()).send(DONE)

    (request,) = server.requests
    signed = b"660f9511:complete.1800000000." + body_of(request)
    expected = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    assert header(request, "webhook-signature") == f"v1,{expected}"


def test_the_signature_is_the_one_of_the_standard_webhooks_test_vector() -> None:
    key = signing_key("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")

    found = sign_payload(key, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')

    assert found == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_a_secret_without_the_prefix_is_its_own_bytes() -> None:
    assert signing_key("plain한") == "plain한".encode()


@pytest.mark.parametrize("webhook_id", ["", "a b", "a\r\nX-Evil: 1", "한"])
def test_an_id_that_no_header_can_carry_is_refused(webhook_id: str) -> None:
    with pytest.raises(ValueError, match="webhook_id"):
        Webhook(WebhookKind.FAILED, webhook_id, {})


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
def test_every_2xx_is_delivered(status: int) -> None:
    assert classify(status, {}, NOW).result is WebhookResult.DELIVERED


@pytest.mark.parametrize("status", [401, 403, 404, 408, 425, 429, 500, 501, 502, 503, 504, 520, 599])
def test_temporary_failures_are_retried(status: int) -> None:
    assert classify(status, {}, NOW) == WebhookAttempt(WebhookResult.RETRY, status, None, f"HTTP {status}", False)


@pytest.mark.parametrize("status", [300, 301, 302, 307, 308, 400, 402, 405, 409, 410, 413, 422, 499])
def test_permanent_failures_are_rejected(status: int) -> None:
    assert classify(status, {"Retry-After": "7"}, NOW).result is WebhookResult.REJECTED


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7.0),
        (" 0 ", 0.0),
        ("999999", 3600.0),
        ("9" * 6000, 3600.0),
        (formatdate(NOW + 90, usegmt=True), 90.0),
        (formatdate(NOW - 90, usegmt=True), 0.0),
        (formatdate(NOW + 1e6, usegmt=True), 3600.0),
        ("0\x1f", None),
        ("-5", None),
        ("7.5", None),
        ("soon", None),
        ("", None),
        ("Fri, 99 Foo 2026 99:99:99 GMT", None),
    ],
)
def test_retry_after_is_honoured_up_to_a_limit(value: str, seconds: float | None) -> None:
    assert classify(503, {"Retry-After": value}, NOW).retry_after_seconds == seconds


@given(st.text())
def test_retry_after_of_any_value_keeps_the_result(value: str) -> None:
    wait = classify(429, {"Retry-After": value}, NOW).retry_after_seconds

    assert wait is None or 0 <= wait <= 3600


def test_an_error_is_one_attempt() -> None:
    with AnsweringServer([answer(500)]) as server:
        attempt = send(server)

    assert (attempt.result, attempt.status, len(server.requests)) == (WebhookResult.RETRY, 500, 1)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(status: int) -> None:
    with AnsweringServer([answer(200)]) as canary, AnsweringServer([answer(status, Location=canary.url)]) as server:
        attempt = send(server)

    assert attempt.result is WebhookResult.REJECTED
    assert "redirect" in attempt.reason
    assert canary.num_connections == 0


def test_a_refused_connection_had_no_effect() -> None:
    attempt = client_of(refused_url()).send(DONE)

    assert attempt == WebhookAttempt(WebhookResult.RETRY, None, None, "no connection (ConnectionRefusedError)", False)


def test_an_unknown_host_had_no_effect() -> None:
    attempt = client_of("http://backend.invalid").send(DONE)

    assert (attempt.result, attempt.is_ambiguous) == (WebhookResult.RETRY, False)


def test_a_reset_after_the_request_is_ambiguous() -> None:
    with ResettingServer() as server:
        attempt = send(server)

    assert (attempt.result, attempt.status, attempt.is_ambiguous) == (WebhookResult.RETRY, None, True)
    assert len(server.requests) == 1


def test_silence_ends_at_the_deadline_and_is_ambiguous() -> None:
    with SilentServer() as server:
        started = time.monotonic()
        attempt = send(server, deadline_seconds=0.5)

    assert time.monotonic() - started < 30
    assert attempt == WebhookAttempt(WebhookResult.RETRY, None, None, "no answer within 0.5 s", True)


@pytest.mark.parametrize(
    ("prompt", "drip"),
    [(b"", b"H"), (b"HTTP/1.1 200 OK\r\n", b"X: y"), (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n")],
    ids=["status line", "one header", "many headers"],
)
def test_dripping_headers_end_at_the_deadline_and_are_ambiguous(prompt: bytes, drip: bytes) -> None:
    with DrippingServer(prompt, drip) as server:
        started = time.monotonic()
        attempt = send(server, deadline_seconds=0.5)

    assert time.monotonic() - started < 30
    assert attempt == WebhookAttempt(WebhookResult.RETRY, None, None, "no answer within 0.5 s", True)


@pytest.mark.parametrize("framing", [b"Content-Length: 9999", b"Transfer-Encoding: chunked", b"Connection: close"])
def test_a_dripping_body_ends_at_the_deadline_and_the_status_counts(framing: bytes) -> None:
    with DrippingServer(b"HTTP/1.1 200 OK\r\n" + framing + b"\r\n\r\n", b"1") as server:
        started = time.monotonic()
        attempt = send(server, deadline_seconds=0.5)

    assert time.monotonic() - started < 30
    assert (attempt.result, attempt.status) == (WebhookResult.DELIVERED, 200)


def test_a_connection_used_before_ends_at_the_deadline_too() -> None:
    with DrippingServer(num_sound=1) as server:
        client = client_of(server.url)
        first = client.send(DONE)
        started = time.monotonic()
        second = client.send(DONE, deadline_seconds=0.5)

    assert time.monotonic() - started < 30
    assert (first.result, second.result, second.is_ambiguous) == (WebhookResult.DELIVERED, WebhookResult.RETRY, True)
    assert server.num_connections == 1


@pytest.mark.parametrize("server_class", [SilentServer, DrippingHandshakeServer])
def test_a_tls_handshake_without_end_ends_at_the_deadline_and_had_no_effect(server_class: type[Server]) -> None:
    with server_class() as server:
        started = time.monotonic()
        attempt = client_of(server.url.replace("http://", "https://")).send(DONE, deadline_seconds=0.5)

    assert time.monotonic() - started < 30
    assert (attempt.result, attempt.is_ambiguous) == (WebhookResult.RETRY, False)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_certificate_without_a_trusted_issuer_is_not_trusted(tmp_path: Path) -> None:
    with SelfSignedServer(tmp_path) as server:
        attempt = client_of(server.url).send(DONE, deadline_seconds=5.0)

    assert (attempt.result, attempt.is_ambiguous) == (WebhookResult.RETRY, False)
    assert attempt.reason == "no connection (SSLCertVerificationError)"
    assert server.requests == []


def test_a_long_body_is_cut_off() -> None:
    with EndlessServer() as server:
        started = time.monotonic()
        attempt = send(server)

    assert time.monotonic() - started < 30
    assert (attempt.result, attempt.status) == (WebhookResult.RETRY, 500)
    assert server.num_bytes_sent < 20_000_000


def test_reasons_contain_neither_token_nor_address() -> None:
    servers = [ResettingServer(), SilentServer(), AnsweringServer([answer(302, Location="/x")])]
    reasons = [client_of("http://backend.invalid").send(DONE).reason]
    for server in servers:
        with server:
            reasons.append(send(server, deadline_seconds=0.3).reason)

    assert all(len(reason) < 200 for reason in reasons)
    assert not any(secret in reason for reason in reasons for secret in (TOKEN, "127.0.0.1", "backend.invalid"))


def test_the_environment_changes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login someone password else\n")
    with AnsweringServer([answer(200)]) as proxy, AnsweringServer([answer(200)]) as server:
        monkeypatch.setenv("NETRC", str(netrc))
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("http_proxy", proxy.url)
        send(server)

    assert header(server.requests[0], "Authorization") == f"Bearer {TOKEN}"
    assert proxy.num_connections == 0


def test_a_connection_serves_many_webhooks_and_keeps_no_cookie() -> None:
    with AnsweringServer([answer(200, b"{}", Set_Cookie="session=1")]) as server:
        client = client_of(server.url)
        for _ in range(3):
            client.send(DONE)

    assert (len(server.requests), server.num_connections) == (3, 1)
    assert not any(header(request, "Cookie") for request in server.requests)


def test_connection_closed_by_the_backend_is_replaced() -> None:
    with AnsweringServer([answer(200), answer(200, Connection="close"), answer(200)]) as server:
        client = client_of(server.url)
        attempts = [client.send(DONE) for _ in range(4)]

    assert [attempt.result for attempt in attempts] == [WebhookResult.DELIVERED] * 4
    assert len(server.requests) == 4


def test_probe_gets_the_path_with_and_without_the_token_and_sends_no_webhook() -> None:
    with AnsweringServer([answer(405), answer(401)]) as server:
        assert probe(settings_of(server.url)) == BackendProbe(status=405, unauthenticated_status=401)
    assert all(request.startswith(b"GET /api/webhooks/inference/complete HTTP/1.1") for request in server.requests)
    assert [header(request, "Authorization") for request in server.requests] == [f"Bearer {TOKEN}", None]

    with pytest.raises(BackendUnreachable, match="ConnectionRefusedError"):
        probe(settings_of(refused_url()))


@pytest.mark.parametrize(
    ("status", "line"),
    [
        (404, b"OPTIONS /api/webhooks/inference/complete HTTP/1.1"),
        (200, b"GET /api/webhooks/inference/complete/darkroom-check HTTP/1.1"),
    ],
)
def test_probe_sends_another_request_after_an_ambiguous_answer(status: int, line: bytes) -> None:
    with AnsweringServer([answer(status), answer(status), answer(501)]) as server:
        assert probe(settings_of(server.url)) == BackendProbe(status, status, 501)

    assert server.requests[2].split(b"\r\n")[0] == line
    assert all(body_of(request) == b"" for request in server.requests)


def test_threads_share_a_client() -> None:
    with AnsweringServer([answer(200)]) as server, ThreadPoolExecutor(8) as pool:
        client = client_of(server.url)
        webhooks = [Webhook(WebhookKind.PROGRESS, f"id-{n}", {"n": n}) for n in range(64)]
        attempts = list(pool.map(client.send, webhooks))

    assert all(attempt.result is WebhookResult.DELIVERED for attempt in attempts)
    sent = {header(request, "webhook-id"): json.loads(body_of(request))["n"] for request in server.requests}
    assert sent == {f"id-{n}": n for n in range(64)}


def test_timers_and_sockets_end_with_their_call() -> None:
    with AnsweringServer([answer(200, Connection="close")]) as server:
        client = client_of(server.url)
        client.send(DONE)
        num_threads, num_files = threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))
        for _ in range(20):
            client.send(DONE)
        time.sleep(0.1)

        assert threading.active_count() <= num_threads + 1
        # The server's side of the last connections may still be closing.
        assert len(list(Path("/proc/self/fd").iterdir())) <= num_files + 5


class EndlessServer(Server):
    """Answers 500 with a body of 200 MB, as fast as it is read."""

    num_bytes_sent = 0

    def converse(self, peer) -> None:  # type: ignore[no-untyped-def]
        self.receive(peer)
        peer.sendall(answer(500, length=200_000_000))
        while self.num_bytes_sent < 200_000_000:
            self.num_bytes_sent += peer.send(b"x" * 65536)


class SelfSignedServer(AnsweringServer):
    """Speaks TLS with a certificate of its own making."""

    def __init__(self, folder: Path) -> None:
        super().__init__([answer(200)])
        certificate, key = folder / "certificate.pem", folder / "key.pem"
        command = (
            "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1"
        )
        subprocess.run([*command.split(), "-out", certificate, "-keyout", key], check=True, capture_output=True)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate, key)

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def converse(self, peer) -> None:  # type: ignore[no-untyped-def]
        with self._context.wrap_socket(peer, server_side=True) as encrypted:
            super().converse(encrypted)
