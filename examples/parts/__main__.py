"""The demo's parts, to try things against: `python -m examples.parts > .env` runs them until Ctrl-C.

Starts a private RabbitMQ and a private SeaweedFS with the demo's adapters in a bucket, and prints the settings of a
worker there: the demo's model, and a backend at port 8000 with a fresh token and signing secret.
"""

import base64
import secrets
import signal
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS

MODEL = Path(__file__).parents[1] / "demo_model"
BUCKET = "media"


def settings(rabbitmq: RabbitMQ, store: SeaweedFS) -> dict[str, str]:
    """List the settings with which a worker, a publisher and a receiver meet here."""
    own = {
        "BACKEND_API_URL": "http://127.0.0.1:8000",
        "INTERNAL_API_TOKEN": secrets.token_urlsafe(),
        "WEBHOOK_SIGNING_SECRET": "whsec_" + base64.b64encode(secrets.token_bytes(24)).decode(),
        "MODEL_ID": str(MODEL / "checkpoint"),
        "GUIDANCE_SCALE": "3",
    }
    return rabbitmq.env() | store.env(BUCKET) | own


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with (
        suppress(KeyboardInterrupt),
        tempfile.TemporaryDirectory(prefix="darkroom-") as folder,
        RabbitMQ(Path(folder) / "rabbitmq") as rabbitmq,
        SeaweedFS(Path(folder) / "seaweedfs") as store,
    ):
        store.make_bucket(BUCKET)
        for adapter in sorted((MODEL / "adapters").glob("*.safetensors")):
            store.client().upload_file(str(adapter), BUCKET, f"models/{adapter.name}")
        sys.stdout.write("".join(f"{name}={value}\n" for name, value in settings(rabbitmq, store).items()))
        sys.stdout.flush()
        threading.Event().wait()


if __name__ == "__main__":
    main()
