"""Translate the S3 client's finished requests, and their responses, for Google Cloud Storage's XML API.

It takes AWS's signatures and `x-amz-` headers, but then it ignores `If-None-Match` on a write, and it refuses
`x-goog-` headers beside them (400 ExcessHeaderValues). Only a request all in `x-goog-` headers, signed as
GOOG4-HMAC-SHA256, can carry `x-goog-if-generation-match: 0`, which is Google's condition for a key that is free.
"""

import base64
import hashlib
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from clients.storage.location import is_google_host
from clients.storage.presigning import GOOGLE as NAMES
from clients.storage.presigning import canonical_request

# Valid for buckets of every location.
LOCATION = "auto"
AMAZON, GOOGLE = "x-amz-", "x-goog-"
META = "meta-"
GENERATION, IF_GENERATION = "x-goog-generation", "x-goog-if-generation-match"
_GENERATION_ETAG = re.compile(r'"g([0-9]+)"')
# AWS's headers without a counterpart: an MD5 takes the checksums' place.
UNTRANSLATABLE = ("x-amz-checksum-", "x-amz-sdk-", "x-amz-trailer", "amz-sdk-")
# Google's front end changes some of the others on their way, and a signature must not cover those.
SIGNED = ("host", "content-type", "content-md5", "cache-control")
# In every response of Google's, also in a refusal.
GOOGLE_HEADERS = ("x-guploader-uploadid", "x-goog-")


class GoogleXmlApi:
    """Translator of requests and responses for an endpoint that is Google's by its name or by its responses' headers.

    Thread-safe.
    """

    def __init__(self, endpoint_url: str | None, access_key_id: str, secret: str) -> None:
        self._access_key_id = access_key_id
        self._secret = secret
        self.is_google = bool(endpoint_url and is_google_host(urlsplit(endpoint_url).hostname or ""))

    def translate_request(self, request: Any) -> None:
        """Replace the headers of a request that botocore has signed by Google's, signed anew. Its `Date` stays."""
        if not self.is_google:
            return
        headers = {
            name.lower(): value if isinstance(value, str) else value.decode("latin-1")
            for name, value in request.headers.items()
        }
        content = request.body or b""
        if not isinstance(content, bytes):
            content = content.read()
            request.body.seek(0)
        translated = _translate_headers(headers, request.method, content)
        translated["host"] = urlsplit(request.url).netloc
        translated["authorization"] = self._authorization(request, translated)
        for name in list(request.headers.keys()):
            del request.headers[name]
        for name, value in translated.items():
            request.headers[name] = value

    def translate_response(self, response: Any) -> None:
        """Rename a response's metadata headers to those that botocore reads, and detect Google by its headers.

        An object's generation takes the ETag's place: Google conditions writes on that alone, not on `If-Match`.
        """
        google = [name for name in response.headers if name.lower().startswith(GOOGLE_HEADERS)]
        self.is_google = self.is_google or bool(google)
        if GENERATION in response.headers:
            response.headers["ETag"] = f'"g{response.headers[GENERATION]}"'
        for name in google:
            if name.lower().startswith(GOOGLE + META):
                response.headers[AMAZON + name.lower().removeprefix(GOOGLE)] = response.headers[name]

    def _authorization(self, request: Any, headers: Mapping[str, str]) -> str:
        signed = {name: value for name, value in headers.items() if name in SIGNED or name.startswith(GOOGLE)}
        moment = headers["x-goog-date"]
        canonical = canonical_request(request.method, request.url, signed, headers["x-goog-content-sha256"])
        signature = NAMES.signature(self._secret, canonical, moment=moment, region=LOCATION)
        credential = f"{self._access_key_id}/{NAMES.scope(moment, LOCATION)}"
        names = ";".join(sorted(signed))
        return f"{NAMES.algorithm} Credential={credential},SignedHeaders={names},Signature={signature}"


def _translate_headers(headers: Mapping[str, str], method: str, content: bytes) -> dict[str, str]:
    kept = {
        GOOGLE + name.removeprefix(AMAZON) if name.startswith(AMAZON) else name: value
        for name, value in headers.items()
        if not name.startswith(UNTRANSLATABLE)
    }
    kept["x-goog-content-sha256"] = hashlib.sha256(content).hexdigest()
    if method == "PUT":
        kept["content-md5"] = base64.b64encode(hashlib.md5(content, usedforsecurity=False).digest()).decode()
    if kept.pop("if-none-match", "") == "*":
        kept[IF_GENERATION] = "0"
    if generation := _GENERATION_ETAG.fullmatch(kept.get("if-match", "")):
        del kept["if-match"]
        kept[IF_GENERATION] = generation[1]
    return kept
