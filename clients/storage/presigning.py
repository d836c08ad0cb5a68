"""Sign requests by the V4 process of AWS and Google, and presign URLs: a signature in the query opens one object.

Both processes are the same but for their names. Sources: "Authenticating Requests: Using Query Parameters" of AWS's S3
API reference, and "Signatures" of Google Cloud Storage's.
"""

import hashlib
import hmac
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import NamedTuple
from urllib.parse import quote, urlsplit

UNSIGNED = "UNSIGNED-PAYLOAD"
_DEFAULT_PORTS = {"http": 80, "https": 443}


class SigningNames(NamedTuple):
    """The names in a process: its algorithm, and those of its query parameters, its keys and its scope."""

    algorithm: str
    parameter: str
    key: str
    service: str
    request_type: str

    def scope(self, moment: str, region: str) -> str:
        """Return the credential scope of a request signed at `moment`, like 20250120T113000Z."""
        return f"{moment[:8]}/{region}/{self.service}/{self.request_type}"

    def signature(self, secret: str, canonical: str, *, moment: str, region: str) -> str:
        """Return the signature of a canonical request, in hexadecimal digits."""
        scope, hashed = self.scope(moment, region), hashlib.sha256(canonical.encode()).hexdigest()
        key = f"{self.key}{secret}".encode()
        for part in scope.split("/"):
            key = hmac.digest(key, part.encode(), "sha256")
        return hmac.digest(key, "\n".join((self.algorithm, moment, scope, hashed)).encode(), "sha256").hex()


AWS = SigningNames("AWS4-HMAC-SHA256", "X-Amz-", "AWS4", "s3", "aws4_request")
GOOGLE = SigningNames("GOOG4-HMAC-SHA256", "X-Goog-", "GOOG4", "storage", "goog4_request")


class SigningKey(NamedTuple):
    """An access key; `session_token` is that of temporary credentials, whose end is also the end of what they sign."""

    key_id: str
    secret: str
    session_token: str | None = None


def canonical_request(method: str, url: str, signed: Mapping[str, str], payload_hash: str) -> str:
    """Return the canonical request; `signed` are the signed headers by their lower-case names."""
    parts = urlsplit(url)
    parameters = sorted(part if "=" in part else f"{part}=" for part in parts.query.split("&") if part)
    headers = [f"{name}:{' '.join(signed[name].split())}" for name in sorted(signed)]
    return "\n".join(
        (method, parts.path or "/", "&".join(parameters), *headers, "", ";".join(sorted(signed)), payload_hash)
    )


def presigned_url(url: str, key: SigningKey, *, seconds: int, at: float, region: str, names: SigningNames = AWS) -> str:
    """Return `url`, percent-encoded and without a query, with one that lets anybody GET it.

    It opens for `seconds` from `at` on, Unix time. The signature covers host and path: a reader must send both as they
    are here.
    """
    moment = datetime.fromtimestamp(at, UTC).strftime("%Y%m%dT%H%M%SZ")
    parameters = {
        "Algorithm": names.algorithm,
        "Credential": f"{key.key_id}/{names.scope(moment, region)}",
        "Date": moment,
        "Expires": str(seconds),
        "SignedHeaders": "host",
    }
    if key.session_token is not None:
        parameters["Security-Token"] = key.session_token
    query = "&".join(f"{names.parameter}{name}={quote(text, safe='')}" for name, text in parameters.items())
    canonical = canonical_request("GET", f"{url}?{query}", {"host": _host_header(url)}, UNSIGNED)
    signature = names.signature(key.secret, canonical, moment=moment, region=region)
    return f"{url}?{query}&{names.parameter}Signature={signature}"


def _host_header(url: str) -> str:
    """Return the `Host` that clients send: without the scheme's own port."""
    parts = urlsplit(url)
    host = parts.netloc.lower()
    return host.removesuffix(f":{parts.port}") if parts.port == _DEFAULT_PORTS.get(parts.scheme) else host
