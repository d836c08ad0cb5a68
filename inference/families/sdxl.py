"""Stable Diffusion XL: two CLIP encoders side by side, a pooled embedding, and the picture's size told to the UNet."""

from collections.abc import Sequence
from typing import Any

import torch

from inference.adapter_memory import UNLIMITED, AdapterMemory
from inference.dialects import sdxl
from inference.families.family import Prompt
from inference.families.unet import UNetFamily
from inference.lane import Embedding, Lane
from inference.prompts import LongPromptEncoder
from inference.schedulers import SDXL


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
        super().__init__(pipeline, models, sdxl(pipeline.unet.config), device=device, memory=memory)
        self._prompts = LongPromptEncoder(
            [pipeline.tokenizer, pipeline.tokenizer_2], [pipeline.text_encoder, pipeline.text_encoder_2], device
        )

    def _encode_ordinary(self, prompts: Sequence[Prompt]) -> list[Embedding]:
        """An empty negative prompt is none, which most checkpoints were trained to read as zeros."""
        tokens, _, pooled, _ = self._pipeline.encode_prompt(
            [prompt.text for prompt in prompts],
            device=self.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        if self._pipeline.config.force_zeros_for_empty_prompt:
            left_out = [index for index, prompt in enumerate(prompts) if prompt.is_left_out]
            tokens[left_out] = 0
            pooled[left_out] = 0
        return [Embedding(*both) for both in zip(tokens, pooled, strict=True)]

    def _added_conditions(self, rows: Sequence[Lane], embeddings: Sequence[Embedding]) -> dict[str, torch.Tensor]:
        requests = [lane.drawing.request for lane in rows]
        # Original size, the crop's corner, target size, each height first: the picture as it is, whole.
        sizes = [[one.height, one.width, 0, 0, one.height, one.width] for one in requests]
        pooled = torch.stack([embedding.pooled for embedding in embeddings if embedding.pooled is not None])
        return {"text_embeds": pooled, "time_ids": self._upload(sizes).to(pooled.dtype)}

    def _unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        config = self._pipeline.vae.config
        mean, deviation = config.get("latents_mean"), config.get("latents_std")
        if mean is None or deviation is None:
            return super()._unscaled(latents)
        shape = (1, -1, 1, 1)
        scale = latents.new_tensor(deviation).view(shape) / float(config.scaling_factor)
        return latents * scale + latents.new_tensor(mean).view(shape)

    def _scaled(self, latents: torch.Tensor) -> torch.Tensor:
        config = self._pipeline.vae.config
        mean, deviation = config.get("latents_mean"), config.get("latents_std")
        if mean is None or deviation is None:
            return super()._scaled(latents)
        shape = (-1, 1, 1)
        centred = latents - latents.new_tensor(mean).view(shape)
        return super()._scaled(centred) / latents.new_tensor(deviation).view(shape)
