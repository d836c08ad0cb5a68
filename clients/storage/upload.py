"""Write one object in one request, with its SHA-256."""

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clients.storage.errors import BucketNotFound, ObjectNotFound, translate_errors
from clients.storage.location import ObjectRef


@dataclass(frozen=True, slots=True)
class ObjectContent:
    """Body and headers of an object to be written. `metadata` is ASCII; `cache_control` is that header for readers."""

    body: bytes
    content_type: str
    metadata: Mapping[str, str]
    cache_control: str | None = None


def put_object(client: Any, ref: ObjectRef, content: ObjectContent, **condition: str) -> bool:
    """Write the object with its SHA-256; return True where the response confirms it.

    Every store returns the ETag of what it wrote. An interim response and a proxy's page have none: that is no
    refusal, and no confirmation either.
    """
    options = {} if content.cache_control is None else {"CacheControl": content.cache_control}
    try:
        with translate_errors(ref):
            answer = client.put_object(
                Bucket=ref.bucket,
                Key=ref.key,
                Body=content.body,
                ContentType=content.content_type,
                ChecksumSHA256=base64.b64encode(hashlib.sha256(content.body).digest()).decode(),
                Metadata=dict(content.metadata),
                **options,
                **condition,
            )
    except ObjectNotFound as error:
        if "IfMatch" in condition:
            raise
        # An unconditional write needs no object: what is missing is the bucket.
        raise BucketNotFound(str(error)) from error
    return "ETag" in answer
