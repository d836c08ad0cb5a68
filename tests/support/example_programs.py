"""The publishers and receivers of examples/, run as a backend's engineer runs them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import requests

from clients.webhooks import WebhookClient
from config.backend import BackendSettings
from examples.parts.ports import free_port
from tests.support.paths import ROOT
from tests.support.world import NODE, eventually

TOKEN = "internal-token"
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
STATES = {"progress", "complete", "failed"}

EXAMPLES = ROOT / "examples"
# A compiler that optimises what runs for a second takes most of that second.
QUICK_JAVA = ("-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC")
JARS = ("amqp-client", "slf4j-api", "jackson-core", "jackson-databind", "jackson-annotations")


class Publisher(NamedTuple):
    """How a publisher is run. `needs` are the files that Debian's packages of its language bring."""

    command: list[str]
    source: Path
    needs: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()


PUBLISHERS = {
    "python": Publisher([sys.executable], EXAMPLES / "python/publisher.py"),
    "node": Publisher([NODE], EXAMPLES / "node/publisher.mjs"),
    "php": Publisher(["php"], EXAMPLES / "php/publisher.php", ("/usr/share/php/PhpAmqpLib/autoload.php",)),
    "ruby": Publisher(
        ["ruby", "-W0"],
        EXAMPLES / "ruby/publisher.rb",
        ("/usr/share/rubygems-integration/all/specifications/bunny-*.gemspec",),
    ),
    "go": Publisher(
        ["go", "run"],
        EXAMPLES / "go/publisher.go",
        ("/usr/share/gocode/src/github.com/rabbitmq/amqp091-go/go.mod",),
        (("GO111MODULE", "off"), ("GOPATH", "/usr/share/gocode")),
    ),
    "java": Publisher(
        ["java", *QUICK_JAVA, "-cp", ":".join(f"/usr/share/java/{jar}.jar" for jar in JARS)],
        EXAMPLES / "java/Publisher.java",
        tuple(f"/usr/share/java/{jar}.jar" for jar in JARS),
    ),
}
RECEIVERS = {
    "python": [sys.executable, str(ROOT / "examples/python/receiver.py")],
    "node": [NODE, str(ROOT / "examples/node/receiver.mjs")],
}


class Receiver:
    """A receiver in a process of its own, with what it prints in a file and its database beside it."""

    def __init__(self, language: str, folder: Path) -> None:
        self._command = RECEIVERS[language]
        self._folder = folder
        self._port = free_port()
        self._printed = folder / "printed.txt"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def env(self) -> dict[str, str]:
        """Return the variables that it has in common with its worker."""
        return {"BACKEND_API_URL": self.url, "INTERNAL_API_TOKEN": TOKEN, "WEBHOOK_SIGNING_SECRET": SECRET}

    def start(self) -> None:
        env = os.environ | self.env() | {"PORT": str(self._port), "DATABASE": str(self._folder / "receiver.sqlite3")}
        with self._printed.open("ab") as sink:
            self._process = subprocess.Popen(self._command, env=env, stdout=sink, stderr=sink)
        eventually(self._answers, self._printed.read_text)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def expect(self, generation_id: int) -> None:
        """Make the generation known, as an application does before it publishes."""
        answer = requests.put(
            f"{self.url}/generations/{generation_id}", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=120
        )
        assert answer.status_code == 200

    def effects(self, generation_id: int) -> list[tuple[str, str]]:
        """Return state and detail of every effect on a generation, in order."""
        lines = (line.split(" ", 2) for line in self._printed.read_text().splitlines())
        return [(line[0], line[2]) for line in lines if line[0] in STATES and line[1] == str(generation_id)]

    def client(self, **changes: Any) -> WebhookClient:
        """Build the worker's own webhook client; `now` and settings may differ from what the receiver expects."""
        now = {"now": changes.pop("now")} if "now" in changes else {}
        return WebhookClient(BackendSettings(**self.env() | changes), **now)  # type: ignore[arg-type]

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self._printed.read_text()
        try:
            return requests.get(self.url, timeout=120).status_code > 0
        except requests.ConnectionError:
            return False


def skip_unless_installed(language: str) -> None:
    """Skip a test where the language or its RabbitMQ client is not on this machine."""
    publisher = PUBLISHERS[language]
    missing = [pattern for pattern in publisher.needs if not list(Path("/").glob(pattern.lstrip("/")))]
    if missing or shutil.which(publisher.command[0]) is None:
        pytest.skip(f"{language} or its client is not installed here; `make languages` installs and runs it")


def start_publisher(
    language: str, env: dict[str, str], *arguments: str, source: Path | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run a publisher, or a changed copy of its source, to its end."""
    publisher = PUBLISHERS[language]
    command = [*publisher.command, str(source or publisher.source), *arguments]
    variables = os.environ | dict(publisher.variables) | env
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, check=False)


def run_publisher(language: str, env: dict[str, str], generation_id: int | str, prompt: str, **fields: Any) -> str:
    """Publish a job with these fields of `data`; the task id that was printed."""
    ended = start_publisher(language, env, str(generation_id), prompt, *([json.dumps(fields)] if fields else []))
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()
