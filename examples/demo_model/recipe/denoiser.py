"""The denoiser and the text encoder, trained together from nothing: which picture has this caption?"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from random import Random
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from diffusers import DPMSolverMultistepScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from examples.demo_model.recipe.captions import base_caption, draw_ground
from examples.demo_model.recipe.latents import Latents
from examples.demo_model.recipe.settings import (
    LATENT_CHANNELS,
    LATENT_SIDE,
    MAX_TOKENS,
    SEED,
    TEXT_WIDTH,
    Workspace,
)
from examples.demo_model.recipe.things import Thing, read_things
from examples.demo_model.recipe.tokenizer import Reader
from examples.demo_model.recipe.training import Draws, TrainingPlan, train
from examples.demo_model.recipe.workers import Workers

CHANNELS = (64, 128, 128)
NUM_HEADS = 2
TEXT_LAYERS, TEXT_HEADS, TEXT_INNER = 2, 4, 384
BATCH = 32
RATE, TEXT_RATE = 1.5e-3, 1e-3

# A picture's latent and caption, from the micro-batch's draws and the thing it is about.
Example = tuple[torch.Tensor, str]
DrawExample = Callable[[int, Thing, Random], Example]


def train_denoiser(workspace: Workspace) -> dict[str, object]:
    """Leave the trained denoiser and text encoder in fp32."""
    workers = Workers(workspace.device)
    tokenizer = CLIPTokenizer.from_pretrained(workspace.trained("tokenizer"))
    torch.manual_seed(SEED)
    unet, text_encoder = build_unet(), build_text_encoder(tokenizer)
    network = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder}).to(workspace.device)
    latents = Latents(workspace.latents, workspace.device)

    def draw_example(number: int, thing: Thing, rng: Random) -> Example:
        ground, is_named = draw_ground(rng)
        return latents.plain[number, ground], base_caption(thing, ground if is_named else None, rng)

    task = DenoisingTask(
        unet, text_encoder, Reader(tokenizer), workspace=workspace, workers=workers, draw_example=draw_example
    )
    rates = {"unet": RATE, "text_encoder": TEXT_RATE}
    course = TrainingPlan("denoiser", workspace.budget.denoiser_steps, BATCH, rates)
    figures = train(network, task.loss("denoiser"), course, workers, workspace.progress("denoiser"))
    unet.save_pretrained(workspace.trained("unet"))
    text_encoder.save_pretrained(workspace.trained("text_encoder"))
    workers.close()
    return figures


def build_unet() -> Any:
    """Build a `UNet2DConditionModel` with random weights, attending to the text on its two upper levels."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIDE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=CHANNELS,
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=TEXT_WIDTH,
        # By this name diffusers' Stable Diffusion 1 goes, and it means the number of heads.
        attention_head_dim=NUM_HEADS,
    )


def build_text_encoder(tokenizer: Any) -> Any:
    """Build a `CLIPTextModel` with random weights for this tokenizer."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        intermediate_size=TEXT_INNER,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=TEXT_HEADS,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_scheduler() -> Any:
    """Build the scheduler that the checkpoint names, which also adds the noise in training."""
    scheduler = DPMSolverMultistepScheduler(
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=0.02,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        steps_offset=1,
    )
    # What other schedulers read when they are made of this one's settings; DDIM draws garbage without the first.
    scheduler.register_to_config(clip_sample=False, set_alpha_to_one=False, skip_prk_steps=True)
    return scheduler


class DenoisingTask:
    """A denoiser's training examples and loss; `draw_example` chooses image and caption.

    Things come as from a pack of cards, shuffled anew each time through; timesteps are spread over the batch.
    """

    def __init__(
        self,
        unet: Any,
        text_encoder: Any,
        read: Reader,
        *,
        workspace: Workspace,
        workers: Workers,
        draw_example: DrawExample,
    ) -> None:
        self._unet, self._text_encoder, self._read = unet, text_encoder, read
        self._workers, self._draw_example = workers, draw_example
        self._things = read_things(workspace.budget.num_things)
        self._alphas = build_scheduler().alphas_cumprod.to(workspace.device)
        if workspace.device.type == "cpu":
            # torch's fused attention goes back more slowly on a CPU than plain products and softmax do.
            unet.set_attn_processor(AttnProcessor())
            text_encoder.set_attn_implementation("eager")

    def loss(self, course: str) -> Callable[[int, int], torch.Tensor]:
        """Return the loss function of the course of this name, which has a random generator of its own."""
        return lambda step, part: self._loss(course, step, part)

    def _loss(self, course: str, step: int, part: int) -> torch.Tensor:
        draws = Draws(course, step, part)
        num = BATCH // self._workers.num
        places = range(step * BATCH + part * num, step * BATCH + (part + 1) * num)
        examples = [self._example(course, place, draws.rng) for place in places]
        clean = torch.stack([latent for latent, _ in examples])
        timesteps = self._timesteps(draws.uniform(num), part)

        alphas = self._alphas[timesteps].view(-1, 1, 1, 1)
        signal, spread = alphas.sqrt(), (1 - alphas).sqrt()
        noise = draws.normal(*clean.shape).to(clean)
        velocity = signal * noise - spread * clean

        conditioning = self._conditioning([caption for _, caption in examples])
        answer = self._unet(signal * clean + spread * noise, timesteps, conditioning).sample
        return F.mse_loss(answer.float(), velocity)

    def _example(self, course: str, place: int, rng: Random) -> Example:
        turn, position = divmod(place, len(self._things))
        number = _shuffled(course, turn, len(self._things))[position]
        return self._draw_example(number, self._things[number], rng)

    def _timesteps(self, uniform: torch.Tensor, part: int) -> torch.Tensor:
        """Sample one timestep from each of as many equal stretches as the batch has images; the parts alternate."""
        strata = torch.arange(len(uniform)) * self._workers.num + part
        return ((strata + uniform) / BATCH * len(self._alphas)).long().to(self._alphas.device)

    def _conditioning(self, captions: Sequence[str]) -> torch.Tensor:
        conditioning: torch.Tensor = self._text_encoder(self._read(captions).to(self._workers.device))[0]
        return conditioning


@lru_cache(maxsize=4)
def _shuffled(course: str, turn: int, num: int) -> tuple[int, ...]:
    numbers = list(range(num))
    Random(f"{SEED} {course} {turn}").shuffle(numbers)
    return tuple(numbers)
