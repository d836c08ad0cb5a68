"""Stable Diffusion XL: two CLIP encoders side by side, a pooled embedding, and the image's size as a condition."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from inference.lane import Embedding, Lane
from inference.lora.adapter_memory import UNLIMITED, AdapterMemory
from inference.lora.names.key_names import KeyNaming, sdxl
from inference.models.families.clip_prompts import LongPromptEncoder
from inference.models.families.unet import UNetFamily
from inference.models.inputs import Prompt
from inference.sampling.schedulers import SDXL

# Every published SDXL UNet's.
LAYERS_PER_BLOCK = 2


class StableDiffusionXL(UNetFamily):
    """`StableDiffusionXLPipeline` checkpoints."""

    name = "sdxl"
    schedulers = SDXL
    text_encoders = ("text_encoder", "text_encoder_2")

    def __init__(self, pipeline: Any, *, device: torch.device, memory: AdapterMemory = UNLIMITED) -> None:
        if pipeline.vae.dtype == torch.float16 and pipeline.vae.config.force_upcast:
            # Its activations overflow 16 bits: the picture would be black.
            pipeline.vae.to(dtype=torch.float32)
        models = {
            "unet": pipeline.unet,
            "text_encoder": pipeline.text_encoder,
            "text_encoder_2": pipeline.text_encoder_2,
        }
        super().__init__(pipeline, models, device=device, memory=memory)
        if pipeline.vae.config.force_upcast:
            # Though it decodes in bfloat16: as diffusers' pipelines do.
            self._encoding_dtype = torch.float32
        self._prompts = LongPromptEncoder(
            [pipeline.tokenizer, pipeline.tokenizer_2], [pipeline.text_encoder, pipeline.text_encoder_2], device
        )
        # On the device from the start: they are used between steps.
        self._latents_mean = self._find_latents_statistic("latents_mean")
        self._latents_std = self._find_latents_statistic("latents_std")

    @classmethod
    def naming_of(cls, config: Mapping[str, Any]) -> KeyNaming:
        return sdxl(config.get("layers_per_block", LAYERS_PER_BLOCK))

    def _encode_ordinary(self, prompts: Sequence[Prompt]) -> list[Embedding]:
        """Embed the prompts; a left-out negative prompt as zeros, as most checkpoints were trained."""
        pipeline = self._pipeline
        pairs = [(pipeline.tokenizer, pipeline.text_encoder), (pipeline.tokenizer_2, pipeline.text_encoder_2)]
        encoded = [
            encoder(self._tokenized(tokenizer, prompts)[0], output_hidden_states=True) for tokenizer, encoder in pairs
        ]
        tokens = torch.cat([one.hidden_states[-2] for one in encoded], dim=-1)
        pooled = encoded[1].text_embeds
        if pipeline.config.force_zeros_for_empty_prompt:
            # One by one: a list of indices would be uploaded, behind the step that is running.
            for index in (index for index, prompt in enumerate(prompts) if prompt.is_left_out):
                tokens[index].zero_()
                pooled[index].zero_()
        return [Embedding(*both) for both in zip(tokens, pooled, strict=True)]

    def _added_conditions(self, rows: Sequence[Lane], embeddings: Sequence[Embedding]) -> dict[str, torch.Tensor]:
        requests = [lane.owner.request for lane in rows]
        # Original size, the crop's corner, target size, each height first: the whole image, uncropped.
        sizes = [[one.height, one.width, 0, 0, one.height, one.width] for one in requests]
        pooled = torch.stack([embedding.pooled for embedding in embeddings if embedding.pooled is not None])
        return {"text_embeds": pooled, "time_ids": self._upload(sizes).to(pooled.dtype)}

    def _unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        if self._latents_mean is None or self._latents_std is None:
            return super()._unscaled(latents)
        mean, deviation = self._latents_mean.to(latents), self._latents_std.to(latents)
        return latents * (deviation / float(self._pipeline.vae.config.scaling_factor)) + mean

    def _scaled(self, latents: torch.Tensor) -> torch.Tensor:
        if self._latents_mean is None or self._latents_std is None:
            return super()._scaled(latents)
        mean, deviation = self._latents_mean.to(latents), self._latents_std.to(latents)
        return super()._scaled(latents - mean) / deviation

    def _find_latents_statistic(self, name: str) -> torch.Tensor | None:
        """Return the VAE config's statistic by channel, [channels, 1, 1] on the device; None where it has none."""
        values = self._pipeline.vae.config.get(name)
        return None if values is None else self._upload(values).view(-1, 1, 1)
