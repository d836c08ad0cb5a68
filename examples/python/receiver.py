"""Receive the worker's webhooks: `python receiver.py`. Each event has its effect once, however often it is delivered.

Needs fastapi and uvicorn. Reads INTERNAL_API_TOKEN and WEBHOOK_SIGNING_SECRET, as the worker does (unset: signatures
are not verified); HOST (127.0.0.1) and PORT (8000); and DATABASE (receiver.sqlite3), in the place of the
application's own. Prints every effect.
"""

import base64
import hashlib
import hmac
import json
import os
import sqlite3
import time
from typing import Annotated, Any, NamedTuple

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request

TOKEN = os.environ["INTERNAL_API_TOKEN"]
SECRET = os.environ.get("WEBHOOK_SIGNING_SECRET", "")
TOLERANCE_SECONDS = 300

app = FastAPI()
database = sqlite3.connect(os.environ.get("DATABASE", "receiver.sqlite3"))
database.executescript(
    "CREATE TABLE IF NOT EXISTS generations (id TEXT PRIMARY KEY, state TEXT NOT NULL, detail TEXT NOT NULL);"
    "CREATE TABLE IF NOT EXISTS webhooks (id TEXT PRIMARY KEY);"
)


class Webhook(NamedTuple):
    id: str
    body: dict[str, Any]


def signing_key() -> bytes:
    return base64.b64decode(SECRET.removeprefix("whsec_")) if SECRET.startswith("whsec_") else SECRET.encode()


def is_signed(headers: Any, body: bytes) -> bool:
    """Return whether one of the Standard Webhooks signatures is right and its time is near."""
    webhook_id, timestamp = headers.get("webhook-id", ""), headers.get("webhook-timestamp", "")
    if not timestamp.isdecimal() or abs(time.time() - int(timestamp)) > TOLERANCE_SECONDS:
        return False
    signed = f"{webhook_id}.{timestamp}.".encode() + body
    wanted = "v1," + base64.b64encode(hmac.new(signing_key(), signed, hashlib.sha256).digest()).decode()
    given = headers.get("webhook-signature", "").split(" ")
    return any(hmac.compare_digest(one.encode(), wanted.encode()) for one in given)


# The worker tries a webhook again for a day after 401, so a token or a secret may be changed while it runs.
def check_token(request: Request) -> None:
    if not hmac.compare_digest(request.headers.get("authorization", "").encode(), f"Bearer {TOKEN}".encode()):
        raise HTTPException(401, "wrong token")


async def verified(request: Request) -> Webhook:
    check_token(request)
    body = await request.body()  # as it came: parsed and written again it would have another signature
    if SECRET and not is_signed(request.headers, body):
        raise HTTPException(401, "wrong or old signature")
    return Webhook(request.headers["webhook-id"], json.loads(body))


Verified = Annotated[Webhook, Depends(verified)]


def act_once(webhook: Webhook, state: str, detail: str) -> dict[str, bool]:
    """Have the effect of a webhook unless it was had before.

    What takes long belongs into a queue: the worker waits twenty seconds for an answer, for progress five.
    """
    generation_id = str(webhook.body["generation_id"])  # a number or text, as it was published
    with database:  # one transaction: the effect, and the note that it was had
        if database.execute("SELECT 1 FROM generations WHERE id = ?", (generation_id,)).fetchone() is None:
            raise HTTPException(404, "no such generation yet")  # tried again for a minute
        noted = database.execute("INSERT INTO webhooks VALUES (?) ON CONFLICT DO NOTHING", (webhook.id,))
        if noted.rowcount == 1:
            values = (state, detail, generation_id)
            database.execute("UPDATE generations SET state = ?, detail = ? WHERE id = ?", values)
            print(state, generation_id, detail, flush=True)
    return {"success": True}


@app.patch("/api/webhooks/inference/progress")
async def progress(webhook: Verified) -> dict[str, bool]:
    return act_once(webhook, "progress", f"{webhook.body['progress']['progress_percent']} %")


@app.post("/api/webhooks/inference/complete")
async def complete(webhook: Verified) -> dict[str, bool]:
    return act_once(webhook, "complete", webhook.body["result_url"])


@app.post("/api/webhooks/inference/failed")
async def failed(webhook: Verified) -> dict[str, bool]:
    return act_once(webhook, "failed", webhook.body["error_code"])


@app.post("/hooks/darkroom")
async def any_kind(webhook: Verified) -> dict[str, bool]:
    """Take every webhook, where the worker has WEBHOOK_URL=/hooks/darkroom: its kind is in the signed body."""
    take = {"progress": progress, "complete": complete, "failed": failed}[webhook.body["type"]]
    return await take(webhook)


@app.put("/generations/{generation_id}", dependencies=[Depends(check_token)])
async def expect(generation_id: str) -> dict[str, bool]:
    """Record a generation, as an application does in the transaction after which it publishes the job."""
    with database:
        database.execute("INSERT INTO generations VALUES (?, 'published', '') ON CONFLICT DO NOTHING", (generation_id,))
    return {"success": True}


if __name__ == "__main__":
    uvicorn.run(app, host=os.environ.get("HOST", "127.0.0.1"), port=int(os.environ.get("PORT", "8000")))
