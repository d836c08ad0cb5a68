"""Standard Webhooks signatures: the HMAC key of a secret, and the `v1` signature of a payload."""

import base64
import hashlib
import hmac

SECRET_PREFIX = "whsec_"  # noqa: S105 - the marker, not a secret


def signing_key(secret: str) -> bytes:
    """Return the HMAC key of a Standard Webhooks secret: base64 behind `whsec_`, else the characters themselves."""
    if secret.startswith(SECRET_PREFIX):
        return base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
    return secret.encode()


def sign_payload(key: bytes, webhook_id: str, timestamp: int, payload: bytes) -> str:
    """Return Standard Webhooks' `v1` signature: HMAC-SHA256 over `id.timestamp.payload`, in base64."""
    signed = f"{webhook_id}.{timestamp}.".encode() + payload
    return "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
