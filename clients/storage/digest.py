"""Check downloaded bodies against the MD5 that the store states in a header or as the ETag."""

import base64
import binascii
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from clients.storage.errors import ObjectDamaged
from clients.storage.location import ObjectRef
from clients.storage.objects import WEAK, etag_of

_PLAIN_MD5 = re.compile(r"[0-9a-f]{32}")


class DigestCheck:
    """MD5 check of one object over all tries of its download."""

    def __init__(self, ref: ObjectRef) -> None:
        self._ref = ref
        self._refused: set[str] = set()

    def verify(self, response: Mapping[str, Any], md5: str) -> None:
        """Raise `ObjectDamaged` where `md5`, of the body of the response to a GET, is not the object's."""
        stated = _stated_md5s(response)
        expected = stated[0] if stated else etag_of(response).removeprefix(WEAK)
        is_right = md5 in stated
        if not stated:
            # Under KMS or a customer's key the ETag looks like an MD5 and is none; under plain AES256 it is one.
            is_opaque = response.get("ServerSideEncryption", "AES256") != "AES256" or "SSECustomerAlgorithm" in response
            is_md5 = not is_opaque and _PLAIN_MD5.fullmatch(expected) is not None
            # Damage on the way is not the same twice; the store's own bytes are, and then its ETag is no MD5.
            is_right = not is_md5 or md5 == expected or md5 in self._refused
            self._refused.add(md5)
        if not is_right:
            raise ObjectDamaged(f"{self._ref}: its MD5 is {md5}, not {expected}")


def _stated_md5s(response: Mapping[str, Any]) -> list[str]:
    """Return the MD5s of the body that `Content-MD5` and `x-goog-hash` state, in hex."""
    headers = response["ResponseMetadata"].get("HTTPHeaders", {})
    # `crc32c=n03x6A==,md5=Ojk9c3dhfxgoKVVHYwFbHQ==`; an object composed of others has no MD5.
    google = [part.strip() for part in headers.get("x-goog-hash", "").split(",")]
    encoded = [part.removeprefix("md5=") for part in google if part.startswith("md5=")]
    stated = []
    for text in (headers.get("content-md5", ""), *encoded):
        with suppress(binascii.Error):  # some proxy's header, not a checksum
            stated.append(base64.b64decode(text, validate=True).hex())
    return [md5 for md5 in stated if _PLAIN_MD5.fullmatch(md5)]
