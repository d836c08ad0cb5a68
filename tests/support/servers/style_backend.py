"""The marketplace of `style_service` in a process of its own, and what its trainer leaves in the bucket."""

import json
import os
import sqlite3
import sys
from pathlib import Path
from typing import Any

import requests

from examples.parts.part import Part
from examples.parts.ports import free_port
from examples.parts.processes import ServerProcess
from tests.support.paths import ROOT
from tests.support.world import HANG_SECONDS, World

TOKEN = "internal-token"
HOST = "127.0.0.1"
# What the trainer's LoraConfig says.
RANK, ALPHA = 8, 32
TARGET_MODULES = ["to_q", "to_k", "to_v", "to_out.0"]
STRENGTH = 0.02  # of random weights that change a picture visibly and leave it one


class StyleBackend(Part):
    """Owner of the process and its database below `folder`. Stopped and started again it has the same port and data.

    `allowed_hosts` is Django's setting; `is_repaired`: `failed` no longer reads a column that does not exist.
    """

    def __init__(self, world: World, folder: Path) -> None:
        self._world = world
        self._folder = folder
        self._server: ServerProcess | None = None
        self.port = free_port()
        self.allowed_hosts = "*"
        self.is_repaired = False

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def env(self) -> dict[str, str]:
        """Return the variables that point a worker here."""
        return {"BACKEND_API_URL": self.url, "INTERNAL_API_TOKEN": TOKEN}

    def start(self) -> None:
        own = {
            "DATABASE": str(self._folder / "db.sqlite3"),
            "PORT": str(self.port),
            "ALLOWED_HOSTS": self.allowed_hosts,
            "INTERNAL_API_TOKEN": TOKEN,
            "RABBITMQ_URL": self._world.rabbitmq.url,
            "QUEUE": self._world.queue,
            "IS_REPAIRED": str(int(self.is_repaired)),
        }
        command = [sys.executable, "-m", "tests.support.servers.style_service"]
        log = self._folder / "backend.log"
        self._server = ServerProcess(command, env=os.environ | own, log=log, cwd=ROOT)
        self._server.wait_until(self._answers, timeout_seconds=HANG_SECONDS)

    def stop(self) -> None:
        if self._server is not None:
            self._server.kill()
            self._server = None

    def restart(self, *, allowed_hosts: str = "*", is_repaired: bool = False) -> None:
        """Deploy it anew with other settings."""
        self.stop()
        self.allowed_hosts, self.is_repaired = allowed_hosts, is_repaired
        self.start()

    def add_style(self, style_id: int, *, model_path: str, signature_url: str) -> None:
        """Note a style and have the trainer's webhook say where its weights are."""
        self._execute("INSERT INTO styles VALUES (?, 'training', NULL, ?)", style_id, signature_url)
        headers = {"Authorization": f"Bearer {TOKEN}", "X-Request-Source": "training-server"}
        body = {"style_id": style_id, "model_path": model_path, "training_metric": {"loss": 0.05, "epochs": 200}}
        answer = requests.post(f"{self.url}/api/webhooks/training/complete", json=body, headers=headers, timeout=120)
        answer.raise_for_status()

    def order(self, style_id: int, *prompt_tags: str, aspect_ratio: str = "1:1", seed: int | None = None) -> int:
        """Buy a generation as the frontend does; return its id."""
        body = {"style_id": style_id, "prompt_tags": prompt_tags, "aspect_ratio": aspect_ratio, "seed": seed}
        answer = requests.post(f"{self.url}/api/generations", json=body, timeout=120)
        answer.raise_for_status()
        return int(answer.json()["data"]["id"])

    def generation(self, generation_id: int) -> dict[str, Any]:
        """Read the row of a generation, its progress decoded."""
        columns = ("status", "result_url", "progress", "error_code")
        [row] = self._execute(f"SELECT {', '.join(columns)} FROM generations WHERE id = ?", generation_id)  # noqa: S608
        found = dict(zip(columns, row, strict=True))
        return found | {"progress": json.loads(found["progress"] or "null")}

    def refunds(self) -> list[tuple[int, int]]:
        """Return generation and amount of every refund, in order."""
        return self._execute("SELECT generation_id, amount FROM refunds ORDER BY rowid")

    def log(self) -> str:
        return (self._folder / "backend.log").read_text()

    def _execute(self, query: str, *values: Any) -> list[Any]:
        with sqlite3.connect(self._folder / "db.sqlite3", timeout=120) as database:
            return database.execute(query, values).fetchall()

    def _answers(self) -> bool:
        try:
            return requests.get(self.url, timeout=120).status_code > 0
        except requests.ConnectionError:
            return False


def train_style(world: World, unet: Any, style_id: int, folder: Path) -> str:
    """Save a PEFT model of `unet` as the trainer does, upload its folder, and return the address it reports.

    The address names the weights inside the folder.
    """
    import peft
    import torch

    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGET_MODULES, lora_dropout=0.1, bias="none")
    adapted = peft.get_peft_model(unet, config)
    generator = torch.Generator().manual_seed(style_id)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data = torch.randn(weight.shape, generator=generator) * STRENGTH
    adapted.save_pretrained(folder)
    adapted.unload()
    (folder / "metadata.json").write_text(json.dumps({"style_id": style_id, "lora_rank": RANK, "is_final": True}))
    for path in sorted(folder.iterdir()):
        world.upload(f"models/style-{style_id}/{path.name}", path.read_bytes())
    return f"gs://{world.bucket}/models/style-{style_id}/adapter_model.safetensors"
