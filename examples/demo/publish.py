"""Upload what the demo's jobs need, and publish them: in `deploy/compose.yaml` as `python -m examples.demo.publish`."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import boto3
import pika
import typer

from config.broker import BrokerSettings
from config.section import load_section
from config.store import StoreSettings
from examples.demo.jobs import JOBS, DemoJob, message
from examples.demo.references import draw_references
from examples.demo.signatures import draw_signatures

MODEL = Path(__file__).parent.parent / "demo_model"


def upload(client: Any, bucket: str, folder: Path) -> None:
    """Upload the adapters, and the signatures and references, which are drawn into `folder`."""
    for adapter in sorted((MODEL / "adapters").glob("*.safetensors")):
        client.upload_file(str(adapter), bucket, f"models/{adapter.name}")
    for path in draw_signatures(folder).values():
        client.upload_file(str(path), bucket, f"signatures/{path.name}")
    for path in draw_references(folder).values():
        client.upload_file(str(path), bucket, f"uploads/{path.name}")


def publish(url: str, queue: str, jobs: Sequence[DemoJob], bucket: str) -> None:
    """Publish as the backends in the field do: a durable queue without arguments, persistent messages."""
    connection = pika.BlockingConnection(pika.URLParameters(url))
    channel = connection.channel()
    channel.queue_declare(queue, durable=True)
    for job in jobs:
        channel.basic_publish("", queue, message(job, bucket), pika.BasicProperties(delivery_mode=2))
    connection.close()


def store_client(store: StoreSettings) -> Any:
    """Build a client of the store that the worker's own variables name."""
    secret = store.secret_access_key
    return boto3.client(
        "s3",
        endpoint_url=store.endpoint_url,
        region_name=store.region,
        aws_access_key_id=store.access_key_id,
        aws_secret_access_key=secret.get_secret_value() if secret else None,
    )


def main() -> None:
    store, broker = load_section(StoreSettings), load_section(BrokerSettings)
    with tempfile.TemporaryDirectory() as folder:
        upload(store_client(store), store.bucket, Path(folder))
    publish(broker.amqp_url, broker.queue, JOBS, store.bucket)
    typer.echo(f"{len(JOBS)} jobs published to {broker.queue}")


if __name__ == "__main__":
    main()
