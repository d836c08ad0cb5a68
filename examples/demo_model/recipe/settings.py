"""Sizes that belong together, the length of each training, and the folders of the results."""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

SEED = 1977
LOG_SECONDS = 15.0  # between a progress bar's lines, where it is a file that they go to
SIDE = 128  # pixels
FACTOR = 8  # pixels of a latent's side
LATENT_SIDE = SIDE // FACTOR
LATENT_CHANNELS = 4
TEXT_WIDTH = 128
MAX_TOKENS = 77


def bar_seconds() -> float:
    """Return the interval at which a progress bar is redrawn."""
    return 0.1 if sys.stderr.isatty() else LOG_SECONDS


@dataclass(frozen=True, slots=True)
class Budget:
    """How much is drawn and trained, in steps and not in seconds: a busy machine changes the time, not the result."""

    name: str
    num_things: int | None  # None: every one
    num_tokens: int
    vae_steps: int
    denoiser_steps: int
    adapter_steps: int
    sample_steps: int

    def with_effort(self, effort: float) -> "Budget":
        """Scale the trainings to so much of their steps."""
        if effort == 1.0:
            return self
        trained = ("vae_steps", "denoiser_steps", "adapter_steps")
        steps = {name: max(1, round(effort * getattr(self, name))) for name in trained}
        return replace(self, name=f"{self.name}, effort {effort:g}", **steps)


FULL = Budget(
    "full",
    num_things=None,
    num_tokens=3500,
    vae_steps=5000,
    denoiser_steps=6600,
    adapter_steps=500,
    sample_steps=20,
)
QUICK = Budget(
    "quick",
    num_things=24,
    num_tokens=900,
    vae_steps=8,
    denoiser_steps=6,
    adapter_steps=2,
    sample_steps=2,
)


@dataclass(frozen=True, slots=True)
class Workspace:
    """Context of every stage: the output folder, the budget and the device."""

    out: Path
    budget: Budget
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def icons(self) -> Path:
        return self.out / "icons.json"

    @property
    def images(self) -> Path:
        return self.out / "pictures.safetensors"

    @property
    def references(self) -> Path:
        return self.out / "references.npz"

    @property
    def latents(self) -> Path:
        return self.out / "latents.safetensors"

    @property
    def checkpoint(self) -> Path:
        return self.out / "checkpoint"

    @property
    def adapters(self) -> Path:
        return self.out / "adapters"

    @property
    def figures(self) -> Path:
        return self.out / "figures.json"

    def trained(self, name: str) -> Path:
        """Return the folder of a trained network's weights, as the exporter reads them: in fp32."""
        return self.out / "trained" / name

    def progress(self, name: str) -> Path:
        """Return the file that a training resumes from."""
        return self.out / "progress" / f"{name}.pt"
