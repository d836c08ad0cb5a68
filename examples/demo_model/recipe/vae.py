"""The autoencoder: pictures to latents of a 64th of their area, and back."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from diffusers import AutoencoderKL

from examples.demo_model.recipe.grounds import GROUNDS
from examples.demo_model.recipe.render import load_images
from examples.demo_model.recipe.settings import LATENT_CHANNELS, SEED, SIDE, Workspace
from examples.demo_model.recipe.styles import STYLES, on_ground
from examples.demo_model.recipe.training import Draws, TrainingPlan, train
from examples.demo_model.recipe.workers import Workers

CHANNELS = (32, 32, 64, 64)
RATE = 2.5e-3
# Small crops for most of the training, then whole pictures for the rest: as many pixels in each step.
CROP_SIDE, NUM_CROPS = 64, 16
NUM_WHOLE = NUM_CROPS * CROP_SIDE**2 // SIDE**2
CROPS_SHARE = 0.75
STYLED_SHARE = 0.3
EDGE_WEIGHT, NUM_EDGE_SCALES = 0.5, 3
PRIOR_WEIGHT = 2e-4
# The decoder learns to live with latents that are a little off, as the denoiser's will be: in standard deviations.
MAX_DISTURBANCE = 0.1


def train_vae(workspace: Workspace) -> dict[str, object]:
    """Leave the trained autoencoder in fp32; its latents are not yet of unit variance."""
    workers = Workers(workspace.device)
    torch.manual_seed(SEED)
    vae = build_vae().to(workspace.device)
    task = _AutoencoderTask(vae, load_images(workspace.images), workspace.budget.vae_steps, workers)
    course = TrainingPlan("vae", workspace.budget.vae_steps, NUM_CROPS, {"": RATE})
    figures = train(vae, task.loss, course, workers, workspace.progress("vae"))
    vae.save_pretrained(workspace.trained("vae"))
    workers.close()
    return figures


def build_vae() -> Any:
    """Build an `AutoencoderKL` with random weights."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(CHANNELS),
        up_block_types=("UpDecoderBlock2D",) * len(CHANNELS),
        block_out_channels=CHANNELS,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIDE,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


@torch.no_grad()
def normalise(vae: Any, mean: torch.Tensor, deviation: torch.Tensor) -> None:
    """Fold the latents' mean and standard deviation (each one number a channel) into the convolutions around them, so
    that new latents have mean 0 and deviation 1 and decode to what the old ones did."""
    both, log_deviation = torch.cat((deviation, torch.ones_like(deviation))), deviation.log()
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight.div_(both.view(-1, 1, 1, 1))
    # The second half of the outputs are log variances.
    quant.bias.sub_(torch.cat((mean, 2 * log_deviation))).div_(both)
    post.bias.add_((post.weight * mean.view(1, -1, 1, 1)).sum((1, 2, 3)))
    post.weight.mul_(deviation.view(1, -1, 1, 1))


def edge_loss(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Compare the slopes of two batches of images, at several scales."""
    loss = one.new_zeros(())
    for scale in range(NUM_EDGE_SCALES):
        if scale:
            one, other = F.avg_pool2d(one, 2), F.avg_pool2d(other, 2)
        difference = one - other
        loss = loss + difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
    return loss


class _AutoencoderTask:
    """The autoencoder's training examples and loss."""

    def __init__(self, vae: Any, images: torch.Tensor, num_steps: int, workers: Workers) -> None:
        self._vae, self._workers = vae, workers
        self._images = images
        self._styled: Mapping[str, torch.Tensor] = {name: style(images) for name, style in STYLES.items()}
        self._num_crop_steps = round(CROPS_SHARE * num_steps)

    def loss(self, step: int, part: int) -> torch.Tensor:
        draws = Draws("vae", step, part)
        is_whole = step >= self._num_crop_steps
        side, num = (SIDE, NUM_WHOLE) if is_whole else (CROP_SIDE, NUM_CROPS)
        shown = torch.stack([self._draw(draws, side) for _ in range(num // self._workers.num)])
        shown = (2 * shown - 1).to(self._workers.device)

        posterior = self._vae.encode(shown).latent_dist
        mean, deviation = posterior.mean.float(), posterior.std.float()
        noise, level = draws.normal(*mean.shape), MAX_DISTURBANCE * draws.uniform(len(mean), 1, 1, 1)
        # Variances add up; the latents' own is a yardstick and nothing to train.
        disturbance = level.to(mean) * mean.detach().std()
        latents = mean + (deviation.square() + disturbance.square()).sqrt() * noise.to(mean)
        decoded = self._vae.decode(latents).sample.float()

        prior: torch.Tensor = 0.5 * (mean.square() + deviation.square() - 1 - 2 * deviation.log()).mean()
        loss: torch.Tensor = (decoded - shown).abs().mean()
        return loss + EDGE_WEIGHT * edge_loss(decoded, shown) + PRIOR_WEIGHT * prior

    def _draw(self, draws: Draws, side: int) -> torch.Tensor:
        """Draw a piece of one image on some ground or in some style: RGB in 0..1, shape (3, side, side)."""
        rng = draws.rng
        number = rng.randrange(len(self._images))
        top, left = (rng.randrange(SIDE - side + 1) for _ in range(2))
        piece = (..., slice(top, top + side), slice(left, left + side))
        if rng.random() < STYLED_SHARE:
            return self._styled[rng.choice(list(self._styled))][number][piece]
        red, green, blue = (value / 255 for value in rng.choice(GROUNDS).rgb)
        return on_ground(self._images[number][piece], (red, green, blue))
