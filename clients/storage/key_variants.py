"""Unicode and percent-encoding variants of an object's key, for one that is not found under the key of its job.

macOS uploads names in Unicode's form NFD, most other software writes NFC, and some publishers percent-encode a key in
forms that are not decoded. A store compares bytes.
"""

import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from urllib.parse import unquote

from clients.storage.location import LocationForbidden, ObjectRef, check_key


def key_variants(ref: ObjectRef) -> Iterator[ObjectRef]:
    """Yield `ref` unchanged, then its key in NFC and in NFD, then percent-decoded likewise; each once. Pure."""
    keys = [ref.key]
    if "%" in ref.key:
        with suppress(UnicodeDecodeError):
            keys.append(unquote(ref.key, errors="strict"))
    seen: set[str] = set()
    for key in keys:
        for variant in (key, unicodedata.normalize("NFC", key), unicodedata.normalize("NFD", key)):
            if variant not in seen and _is_allowed(variant):
                seen.add(variant)
                yield ObjectRef(ref.bucket, variant)


def _is_allowed(key: str) -> bool:
    """Return whether a decoded key passes the checks of the written one: it may hold a `..`, or be longer."""
    try:
        check_key(key, key)
    except LocationForbidden:
        return False
    return True
