"""Other ways to write an object's key, for one that is not found as it was named.

macOS uploads names in Unicode's form NFD, most other software writes NFC, and some publishers percent-encode a key in
forms that are not decoded. A store compares bytes.
"""

import unicodedata
from collections.abc import Iterator
from urllib.parse import unquote

from clients.storage.location import LocationForbidden, ObjectRef, check_key


def spellings_of(ref: ObjectRef) -> Iterator[ObjectRef]:
    """`ref` as it is, then its key in NFC and in NFD, then percent-decoded likewise; each once. Pure."""
    seen: set[str] = set()
    for key in (ref.key, *_decoded(ref.key)):
        for spelling in (key, unicodedata.normalize("NFC", key), unicodedata.normalize("NFD", key)):
            if spelling not in seen and _is_allowed(spelling):
                seen.add(spelling)
                yield ObjectRef(ref.bucket, spelling)


def _decoded(key: str) -> tuple[str, ...]:
    if "%" not in key:
        return ()
    try:
        return (unquote(key, errors="strict"),)
    except UnicodeDecodeError:
        return ()


def _is_allowed(key: str) -> bool:
    """A decoded key must pass what the written one did: it may hold an encoded `..`, or be longer."""
    try:
        check_key(key, key)
    except LocationForbidden:
        return False
    return True
