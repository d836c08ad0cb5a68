"""Parse the locations of objects that jobs may name, and refuse all others."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import unquote_to_bytes, urlsplit

from config.redacting import CUT
from config.section import BUCKET_NAME, BUCKET_RULE

MAX_KEY_BYTES = 1024
# A key may be percent-encoded threefold, beside a scheme and a host: longer than this is no location.
MAX_TEXT_CHARS = 4096
MAX_SHOWN_CHARS = 120

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*:")
_ENCODED_ESCAPE = re.compile(r"%(2e|2f|5c)", re.IGNORECASE)
# The end of a location as shown: a presigned URL's query, however it is encoded, or parameters without their mark.
_QUERY = re.compile(r"(?:[?#]|%(?:25)*(?:3f|23)|(?:[;&]|%(?:25)*(?:3b|26))[\w.%-]+(?:=|%(?:25)*3d)).*", re.I | re.S)
_USER = re.compile(r".*(?:@|%(?:25)*40)", re.I | re.S)
_USER_IN_KEY = re.compile(r"[^/]*:[^/]*@")

# Also the host of Google's console ("authenticated URL"), and the former name of its endpoint.
GOOGLES_HOST = "storage.googleapis.com"
GOOGLES_PATH_HOSTS = (GOOGLES_HOST, "storage.cloud.google.com", "commondatastorage.googleapis.com")

FORMS = "write s3://bucket/key, gs://bucket/key, the store's own https form, or a key of the default bucket"


class LocationForbidden(Exception):
    """The text names no object that a job may read; the message quotes it and has the rule."""


@dataclass(frozen=True)
class ObjectRef:
    """One object, or with a trailing slash in `key` the folder of that name. Without a bucket, a file of this machine.

    `str` gives a redacted location, without what looks like a presigned URL's query in the key; `uri` the whole one.
    """

    bucket: str
    key: str

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.shown_key}" if self.bucket else self.shown_key

    @property
    def uri(self) -> str:
        """The location as a job may name it."""
        return f"s3://{self.bucket}/{self.key}"

    @property
    def shown_key(self) -> str:
        """The key without a query and without a user before an @, as keys copied from a URL may have."""
        return _QUERY.sub(CUT, _USER_IN_KEY.sub(f"{CUT}@", self.key))

    @property
    def name(self) -> str:
        """The last part of the key; empty for a folder with its slash."""
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> "ObjectRef":
        """The folder of the object, with its slash; for a top-level object its bucket, with an empty key."""
        return ObjectRef(self.bucket, self.key[: len(self.key) - len(self.name)])

    def child(self, name: str) -> "ObjectRef":
        """Return the object `name` inside this folder, with or without a trailing slash in the folder's key."""
        folder = self.key.rstrip("/")
        return ObjectRef(self.bucket, f"{folder}/{name}" if folder else name)


class _Parts(NamedTuple):
    bucket: str
    key: str


def parse_location(
    text: str, *, default_bucket: str, allowed_buckets: Iterable[str], endpoint_url: str | None, region: str
) -> ObjectRef:
    """Return the object that `text` names; raise `LocationForbidden` for all but the forms in `FORMS`.

    https forms are percent-decoded once, the others are not decoded. AWS https forms may name `region` only.
    """
    _check_text(text)
    lower = text.lower()
    if lower.startswith(("s3://", "gs://")):
        bucket, key = _split_path(text[len("s3://") :])
    elif lower.startswith(("https://", "http://")):
        bucket, key = _split_url(text, endpoint_url, region)
    else:
        if text.startswith(("/", "~")) or _SCHEME.match(text):
            raise _forbidden(text, f"is a local path or of an unknown scheme: {FORMS}")
        bucket, key = default_bucket, text

    if not BUCKET_NAME.fullmatch(bucket):
        raise _forbidden(text, f"has no valid bucket name: {BUCKET_RULE}")
    allowed = sorted(allowed_buckets)
    if bucket not in allowed:
        raise _forbidden(text, f"is in a bucket that jobs may not read: use one of {', '.join(allowed)}")
    check_key(text, key)
    return ObjectRef(bucket, key)


def _check_text(text: str) -> None:
    if not text or len(text) > MAX_TEXT_CHARS:
        raise _forbidden(text, f"is empty or too long: {FORMS}")
    if _CONTROL.search(text):
        raise _forbidden(text, "has control characters: remove them")
    if "\\" in text:
        raise _forbidden(text, "has a backslash: separate folders by /")


def _split_path(path: str) -> _Parts:
    bucket, _, key = path.partition("/")
    return _Parts(bucket, key)


def _split_url(text: str, endpoint_url: str | None, region: str) -> _Parts:
    # Not by urlsplit: it strips some characters, and this check must see the original text.
    if any(sign in text for sign in "?#@ "):
        raise _forbidden(text, "has a query, a fragment, a user or a space: write the plain address")
    scheme, _, rest = text.partition("://")
    host, _, path = rest.partition("/")
    parts = _on_endpoint(scheme.lower(), host.lower(), path, endpoint_url)
    if parts is None and scheme.lower() == "https":
        parts = _on_aws(host.lower(), path, region)
    if parts is None and scheme.lower() == "https" and is_google_host(urlsplit(endpoint_url or "").hostname or ""):
        parts = _on_google(host.lower(), path)
    if parts is None:
        raise _forbidden(text, f"is not on the configured store: {FORMS}")
    try:
        return _Parts(parts.bucket, unquote_to_bytes(parts.key).decode())
    except UnicodeDecodeError:
        raise _forbidden(text, "is not percent-encoded UTF-8: encode the key as UTF-8") from None


def _on_endpoint(scheme: str, host: str, path: str, endpoint_url: str | None) -> _Parts | None:
    if endpoint_url is None:
        return None
    endpoint = urlsplit(endpoint_url)
    if scheme != endpoint.scheme:
        return None
    prefix = endpoint.path.strip("/")
    if prefix:
        if not path.startswith(prefix + "/"):
            return None
        path = path.removeprefix(prefix + "/")
    netloc = endpoint.netloc.lower()
    if host == netloc:
        return _split_path(path)
    bucket = host.removesuffix("." + netloc)
    return _Parts(bucket, path) if bucket != host else None


def _on_aws(host: str, path: str, region: str) -> _Parts | None:
    for aws in (f"s3.{region}.amazonaws.com", "s3.amazonaws.com"):
        if host == aws:
            return _split_path(path)
        if host.endswith("." + aws):
            return _Parts(host.removesuffix("." + aws), path)
    return None


def is_google_host(host: str) -> bool:
    """Return True for Google Cloud Storage's global, regional and private endpoints."""
    return host.lower() == GOOGLES_HOST or host.lower().endswith(".googleapis.com")


def _on_google(host: str, path: str) -> _Parts | None:
    if host in GOOGLES_PATH_HOSTS:
        return _split_path(path)
    bucket = host.removesuffix(f".{GOOGLES_HOST}")
    return _Parts(bucket, path) if bucket != host else None


def check_key(text: str, key: str) -> None:
    """Raise `LocationForbidden` about `text` where a proxy or the store could resolve `key` to another object."""
    if _CONTROL.search(key) or "\\" in key or _ENCODED_ESCAPE.search(key):
        raise _forbidden(text, "hides control characters, slashes or dots in its key: write them plainly or not at all")
    if any(segment in ("", ".", "..") for segment in key.removesuffix("/").split("/")):
        raise _forbidden(text, "has an empty, `.` or `..` segment: write the full key")
    if len(key.encode()) > MAX_KEY_BYTES:
        raise _forbidden(text, f"has a key over {MAX_KEY_BYTES} bytes: use a shorter one")


def shown_location(text: str) -> str:
    """Return a location in quotes, redacted and shortened: scheme, host and path, without user, query and fragment.

    Everything before the last @ counts as the user, so that a password with a slash is not shown.
    """
    scheme, mark, rest = text.partition("://")
    if not mark or not _SCHEME.fullmatch(f"{scheme}:"):
        scheme, mark, rest = "", "", text
    shown = repr(scheme + mark + _USER.sub(f"{CUT}@", _QUERY.sub(CUT, rest)))
    return shown if len(shown) <= MAX_SHOWN_CHARS else shown[: MAX_SHOWN_CHARS - 1] + CUT


def _forbidden(text: str, problem: str) -> LocationForbidden:
    return LocationForbidden(f"{shown_location(text)} {problem}")
