"""Take the worker's webhooks: each has its effect once, however often it is delivered."""

import base64
import hashlib
import hmac
import json
import os
import time
from collections.abc import Callable
from typing import Any

from django.db import transaction
from django.db.models import F
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.views.decorators.csrf import csrf_exempt

from gallery.models import Account, Generation, SeenWebhook

TOKEN = os.environ.get("INTERNAL_API_TOKEN", "")
SECRET = os.environ.get("WEBHOOK_SIGNING_SECRET", "")
TOLERANCE_SECONDS = 300

Effect = Callable[[Generation, dict[str, Any]], None]


def is_from_worker(request: HttpRequest) -> bool:
    """Return whether the token is right and, where there is a secret, one of the signatures, made not long ago."""
    given = request.headers.get("Authorization", "")
    if not TOKEN or not hmac.compare_digest(given.encode(), f"Bearer {TOKEN}".encode()):
        return False
    if not SECRET:
        return True
    webhook_id, timestamp = request.headers.get("webhook-id", ""), request.headers.get("webhook-timestamp", "")
    if not timestamp.isdecimal() or abs(time.time() - int(timestamp)) > TOLERANCE_SECONDS:
        return False
    key = base64.b64decode(SECRET.removeprefix("whsec_")) if SECRET.startswith("whsec_") else SECRET.encode()
    # The body's bytes as they came: parsed and written again it would have another signature.
    signed = f"{webhook_id}.{timestamp}.".encode() + request.body
    wanted = "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    signatures = request.headers.get("webhook-signature", "").split(" ")
    return any(hmac.compare_digest(one.encode(), wanted.encode()) for one in signatures)


def once(effect: Effect) -> Callable[[HttpRequest], HttpResponse]:
    """Make a view that has the effect in one transaction with the note that it was had."""

    def view(request: HttpRequest) -> HttpResponse:
        if not is_from_worker(request):
            return JsonResponse({"detail": "wrong token or signature"}, status=401)
        body = json.loads(request.body)
        with transaction.atomic():
            generation = Generation.objects.select_for_update().filter(pk=body["generation_id"]).first()
            if generation is None:
                return JsonResponse({"detail": "no such generation yet"}, status=404)  # tried again for a minute
            _, is_new = SeenWebhook.objects.get_or_create(pk=request.headers["webhook-id"])
            if is_new:
                effect(generation, body)
                generation.save()
        return JsonResponse({"success": True})

    return csrf_exempt(view)  # type: ignore[no-any-return]


@once
def progress(generation: Generation, body: dict[str, Any]) -> None:
    generation.detail = f"{body['progress']['progress_percent']} %"


@once
def complete(generation: Generation, body: dict[str, Any]) -> None:
    generation.state, generation.detail = "complete", body["result_url"]


@once
def failed(generation: Generation, body: dict[str, Any]) -> None:
    generation.state, generation.detail = "failed", body["error_code"]
    # A job that `darkroom dead replay` publishes is another task of the same generation, and may fail again.
    if not generation.is_refunded:
        Account.objects.filter(pk=generation.account_id).update(balance=F("balance") + generation.price)
        generation.is_refunded = True
