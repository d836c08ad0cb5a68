"""Addresses of images in webhooks, presigned as a webhook is sent: its event may have waited for a day."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from clients.storage.client import Storage
from clients.storage.errors import StorageError
from clients.storage.location import ObjectRef
from clients.webhooks import Webhook, WebhookKind
from worker.messages.generation_id import image_key
from worker.messages.schema import MAX_IMAGES
from worker.results.terminal_event import TerminalEvent


@dataclass(frozen=True, slots=True)
class ResultUrls:
    """The addresses that readers get, as `RESULT_URL_MODE` says. Records and parked events have the plain ones.

    Only the images of the event's own generation are presigned, whatever address the event has: what waits in a queue
    may have been written by others, and must open no other object.
    """

    storage: Storage
    bucket: str

    def webhook_of(self, event: TerminalEvent) -> Webhook:
        """Return the event's webhook, its addresses valid from now on. Raises `StorageError`."""
        webhook = event.webhook
        if event.kind is not WebhookKind.COMPLETE or not self.storage.is_presigning:
            return webhook
        body: dict[str, Any] = {**event.body, "result_url": self._url(event, 1)}
        metadata = body.get("metadata")
        if isinstance(metadata, Mapping) and isinstance(metadata.get("result_urls"), list):
            num_images = min(len(metadata["result_urls"]), MAX_IMAGES)
            urls = [self._url(event, number) for number in range(1, num_images + 1)]
            body["metadata"] = {**metadata, "result_urls": urls}
        return replace(webhook, body=body)

    def addresses_of(self, event: TerminalEvent) -> tuple[str, ...]:
        """Return the addresses in the event's webhook, valid from now on; none of a failed job, or if none can be
        signed."""
        try:
            body = self.webhook_of(event).body
        except StorageError:
            return ()
        metadata = body.get("metadata")
        several = metadata.get("result_urls") if isinstance(metadata, Mapping) else None
        addresses = several if isinstance(several, list) else [body.get("result_url")]
        return tuple(address for address in addresses if isinstance(address, str))

    def _url(self, event: TerminalEvent, number: int) -> str:
        return self.storage.result_url(ObjectRef(self.bucket, image_key(event.generation_id, number)))
