"""The publishers and receivers of examples/, run as a backend's engineer runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import requests

from clients.webhooks import WebhookClient
from config.backend import BackendSettings
from examples.parts.ports import free_port
from tests.support.paths import ROOT
from tests.support.world import NODE, eventually

TOKEN = "internal-token"
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
STATES = {"progress", "complete", "failed"}

PUBLISHERS = {
    "python": [sys.executable, str(ROOT / "examples/python/publisher.py")],
    "node": [NODE, str(ROOT / "examples/node/publisher.mjs")],
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


def run_publisher(language: str, env: dict[str, str], generation_id: int, prompt: str, **fields: Any) -> str:
    """Publish a job with these fields of `data`; the task id that was printed."""
    command = [*PUBLISHERS[language], str(generation_id), prompt, *([json.dumps(fields)] if fields else [])]
    ended = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()
