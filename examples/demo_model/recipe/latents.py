"""Every picture that the denoiser will see, encoded once: all things on all grounds, and in all styles."""

from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch
from diffusers import AutoencoderKL
from tqdm import tqdm

from examples.demo_model.recipe.grounds import GROUNDS
from examples.demo_model.recipe.render import load_images
from examples.demo_model.recipe.settings import Workspace, bar_seconds
from examples.demo_model.recipe.styles import STYLES, on_ground
from examples.demo_model.recipe.vae import normalise
from examples.demo_model.recipe.workers import Workers

BATCH = 16
PLAIN = "plain"


def encode(workspace: Workspace) -> dict[str, object]:
    """Leave the latents, with unit variance, and the autoencoder that makes such latents."""
    workers = Workers(workspace.device)
    vae = AutoencoderKL.from_pretrained(workspace.trained("vae"), dtype=torch.float32).to(workspace.device).eval()
    images = load_images(workspace.images)

    @torch.no_grad()
    def means(batch: torch.Tensor) -> torch.Tensor:
        with workers.autocast():
            posterior = vae.encode((2 * batch - 1).to(workers.device)).latent_dist
        encoded: torch.Tensor = posterior.mean.float().cpu()
        return encoded

    versions = list(_versions(images))
    batches = [batch for _, shown in versions for batch in torch.split(shown, BATCH)]
    rounds = [batches[start : start + workers.num] for start in range(0, len(batches), workers.num)]
    encoded = torch.cat(
        [
            latent
            for some in tqdm(rounds, desc="latents", mininterval=bar_seconds())
            for latent in workers.map(means, some)
        ]
    )
    workers.close()

    mean, deviation = encoded.mean((0, 2, 3)), encoded.std((0, 2, 3))
    normalise(vae, mean.to(vae.device), deviation.to(vae.device))
    vae.save_pretrained(workspace.trained("vae_normalised"))
    encoded = (encoded - mean.view(1, -1, 1, 1)) / deviation.view(1, -1, 1, 1)
    names = (name for name, _ in versions)
    _save(dict(zip(names, torch.split(encoded, len(images)), strict=True)), workspace.latents)
    return {"num_latents": len(encoded), "mean": mean.tolist(), "deviation": deviation.tolist()}


class Latents:
    """The latents of all things: `plain[thing, ground]`, and `styled[style][thing]`."""

    def __init__(self, path: Path, device: torch.device) -> None:
        tensors = safetensors.torch.load_file(path, device=str(device))
        self.plain = tensors.pop(PLAIN)
        self.styled = tensors


def _versions(images: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    for number, ground in enumerate(GROUNDS):
        red, green, blue = (value / 255 for value in ground.rgb)
        yield f"{PLAIN} {number}", on_ground(images, (red, green, blue))
    for name, style in STYLES.items():
        yield name, style(images)


def _save(encoded: dict[str, torch.Tensor], path: Path) -> None:
    plain = torch.stack([encoded[f"{PLAIN} {number}"] for number in range(len(GROUNDS))], dim=1)
    styled = {name: encoded[name].contiguous() for name in STYLES}
    safetensors.torch.save_file({PLAIN: plain, **styled}, path)
