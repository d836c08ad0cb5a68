"""`python manage.py request_image ACCOUNT PROMPT`: what a view does when its user asks for a picture."""

from typing import Any

from django.core.management.base import BaseCommand, CommandParser

from gallery.models import Account
from gallery.publishing import request_image

FIRST_BALANCE = 100


class Command(BaseCommand):
    """Order a picture; an account that is new begins with some money."""

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("account", type=int)
        parser.add_argument("prompt")

    def handle(self, *_: Any, account: int, prompt: str, **__: Any) -> None:
        Account.objects.get_or_create(pk=account, defaults={"balance": FIRST_BALANCE})
        self.stdout.write(str(request_image(account, prompt).id))
