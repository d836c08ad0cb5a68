"""A small in-memory server that behaves as Google documents the XML API of Cloud Storage.

- Requests in AWS's signature and `x-amz-` headers are taken, but `If-None-Match` does not condition a write of them.
- A request with headers of both dialects is refused (400 ExcessHeaderValues).
- A request signed as GOOG4-HMAC-SHA256 is verified, from the documentation of the V4 signing process.
- A signed URL, with the signature in its query, is verified in the same way.
- `x-goog-if-generation-match` conditions a request on the object's generation, 0 on a free key (412
  PreconditionFailed). `If-Match` conditions reads alone.
- Every answer has `x-guploader-uploadid`; objects have `x-goog-generation` and `x-goog-hash`.
- Custom metadata comes back in the dialect of the request; deleting what is not there is a 404.
"""

import base64
import hashlib
import hmac
import socket
import threading
import time
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit
from xml.sax.saxutils import escape

from tests.support.servers.clients_servers import Server, answer

KEY_ID, SECRET = "GOOG1EXAMPLE", "google-secret-canary"
NOT_TRANSLATED = ("x-goog-checksum", "x-goog-sdk", "x-goog-trailer")


class Request(NamedTuple):
    """A request, its header names in lower case."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes

    @property
    def is_google(self) -> bool:
        return self.headers.get("authorization", "").startswith("GOOG4-HMAC-SHA256 ")

    @property
    def is_anonymous(self) -> bool:
        return "authorization" not in self.headers


@dataclass(frozen=True)
class Stored:
    """An object. `is_composed` of others, so that it has no MD5."""

    body: bytes
    generation: int
    headers: dict[str, str]
    metadata: dict[str, str]
    is_composed: bool = False

    @property
    def md5(self) -> bytes:
        return hashlib.md5(self.body, usedforsecurity=False).digest()


class GoogleStandIn(Server):
    """`objects` by bucket and key; `asked` are the requests."""

    def __init__(self, *buckets: str) -> None:
        super().__init__()
        self.buckets = set(buckets)
        self.objects: dict[tuple[str, str], Stored] = {}
        self.asked: list[Request] = []
        self._lock = threading.Lock()
        self._generation = 1_700_000_000_000_000

    def put(self, bucket: str, key: str, body: bytes, *, is_composed: bool = False) -> None:
        """Store an object past the protocol."""
        with self._lock:
            self._store(bucket, key, body, {}, {}, is_composed=is_composed)

    def converse(self, peer: socket.socket) -> None:
        while (received := self.receive(peer)) is not None:
            request = _parsed(received)
            with self._lock:
                self.asked.append(request)
                peer.sendall(self._answer(request))

    def _answer(self, request: Request) -> bytes:
        if any(name.startswith("x-amz-") for name in request.headers) and any(
            name.startswith("x-goog-") for name in request.headers
        ):
            return _refusal(400, "ExcessHeaderValues")
        if request.is_anonymous and not is_url_signed(request, SECRET):
            return _refusal(403, "SignatureDoesNotMatch")
        if request.is_google and not is_signed(request, SECRET):
            return _refusal(403, "SignatureDoesNotMatch")
        if request.is_google and any(name.startswith(NOT_TRANSLATED) for name in request.headers):
            return _refusal(400, "InvalidArgument")
        bucket, _, key = unquote(urlsplit(request.target).path).lstrip("/").partition("/")
        if bucket not in self.buckets:
            return _refusal(404, "NoSuchBucket", has_body=request.method != "HEAD")
        if not key:
            return self._of_bucket(request, bucket)
        return {"PUT": self._put, "GET": self._get, "HEAD": self._get, "DELETE": self._delete}[request.method](
            request, bucket, key
        )

    def _of_bucket(self, request: Request, bucket: str) -> bytes:
        if request.method == "HEAD":
            return answer(200, x_guploader_uploadid="A")
        prefix = dict(parse_qsl(urlsplit(request.target).query)).get("prefix", "")
        contents = "".join(
            f"<Contents><Key>{escape(key)}</Key><LastModified>2026-01-20T11:30:00.000Z</LastModified></Contents>"
            for where, key in sorted(self.objects)
            if where == bucket and key.startswith(prefix)
        )
        listing = f'<?xml version="1.0"?><ListBucketResult><Name>{bucket}</Name>{contents}</ListBucketResult>'
        return answer(200, listing.encode(), x_guploader_uploadid="A")

    def _put(self, request: Request, bucket: str, key: str) -> bytes:
        if not self._is_met(request, bucket, key):
            return _refusal(412, "PreconditionFailed")
        expected = request.headers.get("content-md5")
        md5 = hashlib.md5(request.body, usedforsecurity=False).digest()
        if expected is not None and expected != base64.b64encode(md5).decode():
            return _refusal(400, "BadDigest")
        kept: dict[str, str] = {
            name: request.headers[name] for name in ("content-type", "cache-control") if name in request.headers
        }
        meta = "x-goog-meta-" if request.is_google else "x-amz-meta-"
        metadata = {name.removeprefix(meta): text for name, text in request.headers.items() if name.startswith(meta)}
        stored = self._store(bucket, key, request.body, kept, metadata)
        return answer(200, b"", length=0, **_object_headers(stored, request))

    def _is_met(self, request: Request, bucket: str, key: str) -> bool:
        stored = self.objects.get((bucket, key))
        generation = "0" if stored is None else str(stored.generation)
        return request.headers.get("x-goog-if-generation-match", generation) == generation

    def _store(
        self,
        bucket: str,
        key: str,
        body: bytes,
        headers: dict[str, str],
        metadata: dict[str, str],
        *,
        is_composed: bool = False,
    ) -> Stored:
        self._generation += 1
        stored = Stored(body, self._generation, headers, metadata, is_composed)
        self.objects[bucket, key] = stored
        return stored

    def _get(self, request: Request, bucket: str, key: str) -> bytes:
        stored = self.objects.get((bucket, key))
        has_body = request.method == "GET"
        if stored is None:
            return _refusal(404, "NoSuchKey", has_body=has_body)
        headers = _object_headers(stored, request)
        if request.headers.get("if-match", headers["ETag"]) != headers["ETag"] or not self._is_met(
            request, bucket, key
        ):
            return _refusal(412, "PreconditionFailed", has_body=has_body)
        return answer(200, stored.body if has_body else b"", length=len(stored.body), **headers)

    def _delete(self, _request: Request, bucket: str, key: str) -> bytes:
        if self.objects.pop((bucket, key), None) is None:
            return _refusal(404, "NoSuchKey")
        return answer(204, x_guploader_uploadid="A")


def _object_headers(stored: Stored, request: Request) -> dict[str, str]:
    md5 = base64.b64encode(stored.md5).decode()
    meta = "x_goog_meta_" if request.is_google else "x_amz_meta_"
    return {
        "x_guploader_uploadid": "A",
        "x_goog_generation": str(stored.generation),
        "x_goog_hash": "crc32c=AAAAAA==" if stored.is_composed else f"crc32c=AAAAAA==,md5={md5}",
        "ETag": f'"-{stored.generation}="' if stored.is_composed else f'"{stored.md5.hex()}"',
        **{meta + name.replace("-", "_"): text for name, text in stored.metadata.items()},
    }


def _refusal(status: int, code: str, *, has_body: bool = True) -> bytes:
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>".encode()
    return answer(status, body if has_body else b"", x_guploader_uploadid="A")


def _parsed(received: bytes) -> Request:
    head, _, body = received.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    method, target, _ = first.split(" ")
    pairs = (line.partition(":") for line in lines)
    return Request(method, target, {name.lower(): value.strip() for name, _, value in pairs}, body)


def is_signed(request: Request, secret: str) -> bool:
    """Return whether the request's GOOG4 signature is the documented one."""
    fields = dict(part.strip().split("=", 1) for part in request.headers["authorization"].partition(" ")[2].split(","))
    scope = fields["Credential"].split("/", 1)[1]
    names = fields["SignedHeaders"].split(";")
    must = {name for name in request.headers if name.startswith("x-goog-")} | {"host"}
    if not must <= set(names) or names != sorted(names):
        return False
    payload = hashlib.sha256(request.body).hexdigest()
    if request.headers["x-goog-content-sha256"] != payload:
        return False
    path, _, query = request.target.partition("?")
    listed = "&".join(sorted(query.split("&"))) if query else ""
    lines = [request.method, path, listed, *(f"{name}:{request.headers[name]}" for name in names), ""]
    canonical = "\n".join([*lines, ";".join(names), payload])
    wanted = _signature(canonical, scope, request.headers["x-goog-date"], secret)
    return scope.endswith("/storage/goog4_request") and hmac.compare_digest(wanted, fields["Signature"])


def is_url_signed(request: Request, secret: str) -> bool:
    """Return whether the request's query has the documented signature, over the host alone, and is not expired."""
    path, _, query = request.target.partition("?")
    parameters = dict(parse_qsl(query))
    if not {"X-Goog-Signature", "X-Goog-Date", "X-Goog-Expires", "X-Goog-Credential"} <= parameters.keys():
        return False
    signed = "&".join(sorted(part for part in query.split("&") if not part.startswith("X-Goog-Signature=")))
    host = request.headers["host"]
    canonical = "\n".join([request.method, path, signed, f"host:{host}", "", "host", "UNSIGNED-PAYLOAD"])
    scope, date = parameters["X-Goog-Credential"].split("/", 1)[1], parameters["X-Goog-Date"]
    wanted = _signature(canonical, scope, date, secret)
    began_at = datetime.strptime(date, "%Y%m%dT%H%M%S%z").timestamp()
    is_valid = began_at - 900 < time.time() < began_at + int(parameters["X-Goog-Expires"])
    return is_valid and hmac.compare_digest(wanted, parameters["X-Goog-Signature"])


def _signature(canonical: str, scope: str, moment: str, secret: str) -> str:
    key = b"GOOG4" + secret.encode()
    for part in scope.split("/"):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    to_sign = f"GOOG4-HMAC-SHA256\n{moment}\n{scope}\n" + hashlib.sha256(canonical.encode()).hexdigest()
    return hmac.new(key, to_sign.encode(), hashlib.sha256).hexdigest()
