"""A marketplace for artists' styles in Django: sells generations for tokens, publishes jobs, takes the webhooks.

It behaves like the public backend that the worker was made for, its faults included: a job is published before its
transaction commits, `failed` reads a column that its table lacks, and a repaired `failed` refunds at every call.
Settings come as the environment variables `DATABASE`, `PORT`, `ALLOWED_HOSTS`, `INTERNAL_API_TOKEN`, `RABBITMQ_URL`,
`QUEUE` and `IS_REPAIRED`. Run by `tests.support.servers.style_backend`.
"""

import json
import os
import uuid
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import django
import pika
from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.db import connection, transaction
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.urls import path
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_http_methods

settings.configure(
    DEBUG=False,
    SECRET_KEY="of a test",
    ALLOWED_HOSTS=os.environ["ALLOWED_HOSTS"].split(","),
    ROOT_URLCONF=__name__,
    MIDDLEWARE=[
        "django.middleware.security.SecurityMiddleware",
        "django.middleware.common.CommonMiddleware",
        "django.middleware.csrf.CsrfViewMiddleware",
        f"{__name__}.WebhookAuthentication",
    ],
    DATABASES={
        "default": {
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": os.environ["DATABASE"],
            "OPTIONS": {"timeout": 60, "transaction_mode": "IMMEDIATE"},
        }
    },
)

SCHEMA = """
PRAGMA journal_mode = WAL;
CREATE TABLE IF NOT EXISTS styles (id INTEGER PRIMARY KEY, status TEXT, model_path TEXT, signature_url TEXT);
CREATE TABLE IF NOT EXISTS generations (id INTEGER PRIMARY KEY AUTOINCREMENT, style_id INTEGER, status TEXT,
    consumed_tokens INTEGER, result_url TEXT, progress TEXT, error_code TEXT);
CREATE TABLE IF NOT EXISTS refunds (generation_id INTEGER, amount INTEGER);
"""
COSTS = {"1:1": 50, "2:2": 75, "1:2": 60}
SOURCES = ("training-server", "inference-server")
PRICE_COLUMN = "consumed_tokens" if os.environ["IS_REPAIRED"] == "1" else "cost"


class WebhookAuthentication:
    """Refuse a webhook without the token (401) or without a known `X-Request-Source` (403)."""

    def __init__(self, get_response: Any) -> None:
        self._get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        if request.path.startswith("/api/webhooks/"):
            if request.headers.get("Authorization") != f"Bearer {os.environ['INTERNAL_API_TOKEN']}":
                return _refused(401, "Invalid API token")
            if request.headers.get("X-Request-Source") not in SOURCES:
                return _refused(403, "Invalid request source")
        answer: HttpResponse = self._get_response(request)
        return answer


@csrf_exempt
@require_http_methods(["POST"])
def create_generation(request: HttpRequest) -> HttpResponse:
    """Take the price, note the generation and publish its job, in one transaction."""
    wanted = json.loads(request.body)
    ratio = wanted.get("aspect_ratio", "1:1")
    with transaction.atomic():
        style = _row("SELECT model_path, signature_url FROM styles WHERE id = %s", wanted["style_id"])
        if style is None:
            return _refused(404, "Style not found")
        with connection.cursor() as cursor:
            cursor.execute(
                "INSERT INTO generations (style_id, status, consumed_tokens, progress) VALUES (%s, 'queued', %s, '{}')",
                [wanted["style_id"], COSTS[ratio]],
            )
            generation_id = cursor.lastrowid
        data = {
            "generation_id": generation_id,
            "style_id": wanted["style_id"],
            "lora_path": style[0],
            "prompt": ", ".join(wanted["prompt_tags"]),
            "aspect_ratio": ratio,
            "seed": wanted.get("seed"),
            "signature_path": style[1] or "",
            "signature_config": {"position": "bottom-right", "size": "medium", "opacity": 0.7},
            "prompt_tags": wanted["prompt_tags"],
        }
        callback = f"http://localhost:8000/api/webhooks/generation/{generation_id}/status"
        _publish({"task_id": str(uuid.uuid4()), "type": "image_generation", "data": data, "webhook_url": callback})
    return JsonResponse({"success": True, "data": {"id": generation_id}}, status=201)


@csrf_exempt
@require_http_methods(["POST"])
def training_complete(request: HttpRequest) -> HttpResponse:
    """Note where the trainer left the weights of a style."""
    body = json.loads(request.body)
    return _changed(
        "UPDATE styles SET status = 'completed', model_path = %s WHERE id = %s", body["model_path"], body["style_id"]
    )


@csrf_exempt
@require_http_methods(["PATCH"])
def inference_progress(request: HttpRequest) -> HttpResponse:
    body = json.loads(request.body)
    progress = json.dumps(body["progress"])
    return _changed("UPDATE generations SET progress = %s WHERE id = %s", progress, body["generation_id"])


@csrf_exempt
@require_http_methods(["POST"])
def inference_complete(request: HttpRequest) -> HttpResponse:
    body = json.loads(request.body)
    if not body.get("generation_id") or not body.get("result_url"):
        return _refused(400, "generation_id and result_url are required")
    with transaction.atomic():
        known = _row("SELECT progress FROM generations WHERE id = %s", body["generation_id"])
        progress = json.loads(known[0] or "{}") if known else {}
        progress.update(body.get("metadata", {}))
        return _changed(
            "UPDATE generations SET status = 'completed', result_url = %s, progress = %s WHERE id = %s",
            body["result_url"],
            json.dumps(progress),
            body["generation_id"],
        )


@csrf_exempt
@require_http_methods(["POST"])
def inference_failed(request: HttpRequest) -> HttpResponse:
    """Refund and note the failure. Repeated calls refund again."""
    body = json.loads(request.body)
    with transaction.atomic():
        price = _row(f"SELECT {PRICE_COLUMN} FROM generations WHERE id = %s", body["generation_id"])  # noqa: S608
        if price is None:
            return _refused(404, "Generation not found")
        with connection.cursor() as cursor:
            cursor.execute("INSERT INTO refunds VALUES (%s, %s)", [body["generation_id"], price[0]])
        return _changed(
            "UPDATE generations SET status = 'failed', progress = NULL, error_code = %s WHERE id = %s",
            body.get("error_code", "GENERATION_FAILED"),
            body["generation_id"],
        )


urlpatterns = [
    path("api/generations", create_generation),
    path("api/webhooks/training/complete", training_complete),
    path("api/webhooks/inference/progress", inference_progress),
    path("api/webhooks/inference/complete", inference_complete),
    path("api/webhooks/inference/failed", inference_failed),
]


def _row(query: str, *values: Any) -> tuple[Any, ...] | None:
    with connection.cursor() as cursor:
        cursor.execute(query, values)
        found: tuple[Any, ...] | None = cursor.fetchone()
        return found


def _changed(query: str, *values: Any) -> HttpResponse:
    """Run an UPDATE; 404 where it found no row."""
    with connection.cursor() as cursor:
        cursor.execute(query, values)
        return JsonResponse({"success": True}) if cursor.rowcount else _refused(404, "not found")


def _refused(status: int, error: str) -> JsonResponse:
    return JsonResponse({"error": error}, status=status)


def _publish(message: dict[str, Any]) -> None:
    broker = pika.BlockingConnection(pika.URLParameters(os.environ["RABBITMQ_URL"]))
    channel = broker.channel()
    channel.queue_declare(os.environ["QUEUE"], durable=True)
    properties = pika.BasicProperties(delivery_mode=2, content_type="application/json")
    channel.basic_publish("", os.environ["QUEUE"], json.dumps(message), properties)
    broker.close()


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing: Django logs what fails."""


def main() -> None:
    """Serve until the process is ended."""
    django.setup()
    with connection.cursor() as cursor:
        for statement in filter(str.strip, SCHEMA.split(";")):
            cursor.execute(statement)
    connection.close()
    server = make_server("127.0.0.1", int(os.environ["PORT"]), get_wsgi_application(), _Server, _Quiet)
    server.serve_forever()


if __name__ == "__main__":
    main()
