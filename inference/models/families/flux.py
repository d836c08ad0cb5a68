"""FLUX.1: CLIP's pooled embedding and T5's tokens, a transformer over text and image, guidance as one of its inputs."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch

from inference.errors import RequestFailed
from inference.lane import Embedding, Lane
from inference.lora.adapter_memory import UNLIMITED, AdapterMemory
from inference.lora.names.key_names import FLUX, KeyNaming
from inference.lora.products.rows import RowAdapters
from inference.models.families.packed import FluxTransformerFamily
from inference.models.inputs import Prompt
from inference.request import GenerationRequest
from inference.sampling.schedulers import FLOW
from inference.sampling.trajectory import StepPlan

# T5's tokens, to which every prompt is padded: schnell was trained with fewer than dev.
MAX_TOKENS, MAX_TOKENS_SCHNELL = 512, 256
STEPS_SCHNELL, GUIDANCE_SCHNELL = 4, 0.0


class Flux(FluxTransformerFamily):
    """`FluxPipeline` checkpoints: dev, Krea-dev, and schnell, which has no guidance."""

    name = "flux"
    schedulers = FLOW
    controlnet_class = "FluxControlNetModel"
    options = ("true_cfg_scale",)
    default_steps = 28
    default_guidance = 3.5
    text_encoders = ("text_encoder",)
    guided_fields: ClassVar[Mapping[str, Any]] = {"true_cfg_scale": 5.0, "negative_prompt": "a"}

    def __init__(self, pipeline: Any, *, device: torch.device, memory: AdapterMemory = UNLIMITED) -> None:
        transformer = pipeline.transformer
        models = {"transformer": transformer, "text_encoder": pipeline.text_encoder}
        super().__init__(pipeline, models, device=device, memory=memory)
        self._reads_guidance = bool(transformer.config.guidance_embeds)
        self._max_tokens = MAX_TOKENS
        if not self._reads_guidance:
            self._max_tokens = MAX_TOKENS_SCHNELL
            self.default_steps, self.default_guidance = STEPS_SCHNELL, GUIDANCE_SCHNELL

    @classmethod
    def naming_of(cls, config: Mapping[str, Any]) -> KeyNaming:
        return FLUX

    def _guidance_of(self, request: GenerationRequest) -> float:
        # As in its pipelines. The other guidance is a number that the transformer reads.
        return (request.true_cfg_scale or 1.0) if request.negative_prompt else 1.0

    def _conditions(self, rows: Sequence[Lane], embeddings: Sequence[Embedding], num_image: int) -> dict[str, Any]:
        pooled = [embedding.pooled for embedding in embeddings if embedding.pooled is not None]
        return {"pooled_projections": torch.stack(pooled), "guidance": self._guidance(rows)}

    def encode(self, prompts: Sequence[Prompt], adapters: Sequence[RowAdapters]) -> list[Embedding]:
        """Return T5's hidden states, padding included, and CLIP's pooled embedding, which reads a prompt's beginning.

        Adapters change CLIP alone.
        """
        pipeline = self._pipeline
        texts = [prompt.text for prompt in prompts]
        ids = pipeline.tokenizer_2(texts, padding="max_length", max_length=self._max_tokens, verbose=False).input_ids
        longest = max(map(len, ids))
        if longest > self._max_tokens:
            reason = f"the prompt has {longest} tokens; this model reads {self._max_tokens}"
            raise RequestFailed("INVALID_PROMPT", f"{reason}: ask with fewer words")
        clip_ids = pipeline.tokenizer(
            texts,
            padding="max_length",
            max_length=pipeline.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        self.bank.route(adapters)
        pooled = pipeline.text_encoder(self._uploaded(clip_ids)).pooler_output
        tokens = pipeline.text_encoder_2(self._uploaded(torch.tensor(ids)))[0]
        return [Embedding(*both) for both in zip(tokens, pooled, strict=True)]

    def _controlnet_mismatch(self, config: Any) -> str | None:
        return "this version runs FLUX.1 without ControlNets"

    def _guidance(self, rows: Sequence[Lane]) -> torch.Tensor | None:
        """Return each row's guidance scale, as the transformer reads it; None for schnell."""
        if not self._reads_guidance:
            return None
        return self._upload([lane.owner.request.guidance_scale for lane in rows])

    def _step_plan(self, request: GenerationRequest) -> StepPlan:
        # Its pipelines differ in it.
        return replace(super()._step_plan(request), has_own_sigmas=request.source is None)
