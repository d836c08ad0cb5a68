"""Stable Diffusion 1.x and 2.x, with noise or velocity prediction: one CLIP encoder and a UNet."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from inference.lane import Embedding
from inference.lora.adapter_memory import UNLIMITED, AdapterMemory
from inference.lora.names.key_names import STABLE_DIFFUSION, KeyNaming
from inference.models.families.clip_prompts import LongPromptEncoder
from inference.models.families.unet import UNetFamily
from inference.models.inputs import Prompt
from inference.sampling.schedulers import DIFFUSION


class StableDiffusion(UNetFamily):
    """`StableDiffusionPipeline` checkpoints."""

    name = "stable-diffusion"
    schedulers = DIFFUSION
    text_encoders = ("text_encoder",)

    def __init__(self, pipeline: Any, *, device: torch.device, memory: AdapterMemory = UNLIMITED) -> None:
        models = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
        super().__init__(pipeline, models, device=device, memory=memory)
        self._prompts = LongPromptEncoder([pipeline.tokenizer], [pipeline.text_encoder], device)

    @classmethod
    def naming_of(cls, config: Mapping[str, Any]) -> KeyNaming:
        return STABLE_DIFFUSION

    def _encode_ordinary(self, prompts: Sequence[Prompt]) -> list[Embedding]:
        encoder = self._pipeline.text_encoder
        ids, mask = self._tokenized(self._pipeline.tokenizer, prompts)
        # Few encoders were trained with the padding masked.
        is_masked = getattr(encoder.config, "use_attention_mask", False)
        embeddings = encoder(ids, attention_mask=self._uploaded(mask) if is_masked else None)[0]
        return [Embedding(tokens) for tokens in embeddings]
