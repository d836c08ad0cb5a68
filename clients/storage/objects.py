"""What a store answers about an object: size and ETag, metadata, listing entries."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from clients.storage.errors import NotAStore, ObjectTooLarge
from clients.storage.location import ObjectRef

# Proxies that compress bodies weaken ETags to this form; a condition on a weak one is never met (RFC 9110 13.1.1).
WEAK = "W/"


@dataclass(frozen=True)
class ObjectStat:
    """An object's ETag without quotes, and its size."""

    etag: str
    size_bytes: int


@dataclass(frozen=True)
class ObjectMetadata:
    """User metadata of an object, and its ETag exactly as the store gives it, for `put_if_unchanged`."""

    etag: str
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class ListedObject:
    """Key and last modification of an object in a listing."""

    key: str
    modified_at: datetime


def stat_of(ref: ObjectRef, response: Mapping[str, Any]) -> ObjectStat:
    """Return ETag and size from the response to a HEAD or GET; raise `NotAStore` where either is missing."""
    size_bytes = response.get("ContentLength")
    if "ETag" not in response or size_bytes is None:
        raise NotAStore(f"{ref}: the answer has no ETag or no size, as no store's: look at AWS_S3_ENDPOINT_URL")
    return ObjectStat(etag_of(response), int(size_bytes))


def etag_of(response: Mapping[str, Any]) -> str:
    """Return the ETag without its quotes; a weak one keeps its `W/`."""
    text = str(response["ETag"])
    return WEAK * text.startswith(WEAK) + text.removeprefix(WEAK).strip('"')


def check_size(ref: ObjectRef, stat: ObjectStat, max_bytes: int) -> None:
    """Raise `ObjectTooLarge` where the object has more than `max_bytes`."""
    if stat.size_bytes > max_bytes:
        raise ObjectTooLarge(f"{ref}: {stat.size_bytes} bytes, over the limit of {max_bytes}")
