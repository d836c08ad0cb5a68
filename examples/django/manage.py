"""A project around the app `gallery`, to try it: `python manage.py migrate --run-syncdb`, then `runserver`.

Needs django and pika. Reads the worker's own variables: RABBITMQ_URL, or RABBITMQ_HOST, _PORT, _USER, _PASS and _VHOST;
RABBITMQ_QUEUE; INTERNAL_API_TOKEN and WEBHOOK_SIGNING_SECRET. DATABASE is the path of its SQLite.
"""

import os
import sys

from django.conf import settings
from django.core.management import execute_from_command_line

if __name__ == "__main__":
    settings.configure(
        DEBUG=False,
        SECRET_KEY="to try it alone",  # noqa: S106
        # The host of the worker's BACKEND_API_URL has to be here: Django answers any other with 400.
        ALLOWED_HOSTS=["127.0.0.1", "localhost"],
        ROOT_URLCONF="gallery.urls",
        INSTALLED_APPS=["gallery"],
        DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
        USE_TZ=True,
        DATABASES={
            "default": {
                "ENGINE": "django.db.backends.sqlite3",
                "NAME": os.environ.get("DATABASE", "gallery.sqlite3"),
                "OPTIONS": {"timeout": 60, "transaction_mode": "IMMEDIATE"},
            }
        },
    )
    execute_from_command_line(sys.argv)
