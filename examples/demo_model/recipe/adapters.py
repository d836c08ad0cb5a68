"""The style adapters: low-rank changes of the trained denoiser, each taught to draw every thing in one style."""

import json
from random import Random
from typing import Any

import peft
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from examples.demo_model.recipe.captions import styled_caption
from examples.demo_model.recipe.denoiser import BATCH, DenoisingTask, Example
from examples.demo_model.recipe.latents import Latents
from examples.demo_model.recipe.settings import SEED, Workspace
from examples.demo_model.recipe.things import Thing
from examples.demo_model.recipe.tokenizer import Reader
from examples.demo_model.recipe.training import TrainingPlan, train
from examples.demo_model.recipe.workers import Workers

RANK = 8
RATE = 4e-3
# Attention, what leads into it and out of it, and the last layer of all: a style is colours and edges everywhere.
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "conv_out")


def train_adapter(style: str, workspace: Workspace) -> dict[str, object]:
    """Leave the adapter as a file of diffusers' layout in fp16, its alpha in the metadata."""
    workers = Workers(workspace.device)
    unet = UNet2DConditionModel.from_pretrained(workspace.trained("unet"), dtype=torch.float32)
    text_encoder = CLIPTextModel.from_pretrained(workspace.trained("text_encoder"), dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(workspace.trained("tokenizer"))
    latents = Latents(workspace.latents, workspace.device).styled[style]
    text_encoder.to(workspace.device).eval().requires_grad_(False)
    torch.manual_seed(SEED)
    adapted, config = adapt(unet)
    adapted.to(workspace.device)

    def draw_example(number: int, thing: Thing, rng: Random) -> Example:
        return latents[number], styled_caption(thing, style, rng)

    task = DenoisingTask(
        unet, text_encoder, Reader(tokenizer), workspace=workspace, workers=workers, draw_example=draw_example
    )
    course = TrainingPlan(style, workspace.budget.adapter_steps, BATCH, {"": RATE}, uses_muon=False)
    figures = train(adapted, task.loss(style), course, workers, workspace.progress(style))
    workers.close()
    path = workspace.adapters / f"{style}.safetensors"
    _save(adapted, config, workspace, path.name)
    return figures | {"rank": RANK, "bytes": path.stat().st_size}


def adapt(unet: Any) -> tuple[peft.PeftModel, peft.LoraConfig]:
    """Add an adapter to the denoiser that changes nothing yet; nothing else in it is trained."""
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(TARGETS))
    return peft.get_peft_model(unet, config), config


def _save(adapted: peft.PeftModel, config: peft.LoraConfig, workspace: Workspace, name: str) -> None:
    weights = peft.get_peft_model_state_dict(adapted)
    layers = {
        layer.removeprefix("base_model.model."): weight.half().cpu().contiguous() for layer, weight in weights.items()
    }
    # By way of JSON: diffusers' writer takes plain values alone.
    settings = json.loads(json.dumps(config.to_dict(), default=sorted))
    StableDiffusionPipeline.save_lora_weights(
        workspace.adapters, unet_lora_layers=layers, unet_lora_adapter_metadata=settings, weight_name=name
    )
