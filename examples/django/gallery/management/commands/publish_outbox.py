"""`python manage.py publish_outbox`, every minute: what was committed while the broker was down."""

from typing import Any

from django.core.management.base import BaseCommand

from gallery.publishing import publish_outbox


class Command(BaseCommand):
    """Publish what is not published yet."""

    def handle(self, *_: Any, **__: Any) -> None:
        self.stdout.write(f"{publish_outbox()} published")
