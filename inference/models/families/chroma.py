"""Chroma: FLUX.1's transformer with T5's tokens alone, whose padding is masked, and guidance by two passes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from inference.errors import RequestFailed
from inference.lane import Embedding, Lane
from inference.lora.adapter_memory import UNLIMITED, AdapterMemory
from inference.lora.names.key_names import CHROMA, KeyNaming
from inference.lora.products.rows import RowAdapters
from inference.models.families.packed import FluxTransformerFamily
from inference.models.inputs import Prompt
from inference.request import GenerationRequest
from inference.sampling.schedulers import FLOW

# T5's tokens, to which every prompt is padded.
MAX_TOKENS = 512


class Chroma(FluxTransformerFamily):
    """`ChromaPipeline` checkpoints."""

    name = "chroma"
    schedulers = FLOW
    controlnet_class = None
    default_steps = 35
    default_guidance = 5.0

    def __init__(self, pipeline: Any, *, device: torch.device, memory: AdapterMemory = UNLIMITED) -> None:
        super().__init__(pipeline, {"transformer": pipeline.transformer}, device=device, memory=memory)
        pipeline.transformer.time_text_embed = _TimeVectors(pipeline.transformer.time_text_embed)

    @classmethod
    def naming_of(cls, config: Mapping[str, Any]) -> KeyNaming:
        return CHROMA

    def encode(self, prompts: Sequence[Prompt], adapters: Sequence[RowAdapters]) -> list[Embedding]:
        """Return T5's hidden states, padding included, and the mask [tokens] of those that the transformer attends to.

        Adapters do not change T5.
        """
        texts = [prompt.text for prompt in prompts]
        read = self._pipeline.tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, verbose=False)
        longest = max(map(len, read.input_ids))
        if longest > MAX_TOKENS:
            reason = f"the prompt has {longest} tokens; this model reads {MAX_TOKENS}"
            raise RequestFailed("INVALID_PROMPT", f"{reason}: ask with fewer words")
        mask = torch.tensor(read.attention_mask)
        tokens = self._pipeline.text_encoder(
            self._uploaded(torch.tensor(read.input_ids)), attention_mask=self._uploaded(mask)
        )[0]
        # And one token of the padding, as it was trained.
        attended = self._uploaded((torch.arange(MAX_TOKENS) <= mask.sum(1, keepdim=True)).float()).to(tokens.dtype)
        return [Embedding(own, mask=own_mask) for own, own_mask in zip(tokens, attended, strict=True)]

    def _controlnet_mismatch(self, config: Any) -> str | None:
        return "this version runs Chroma without ControlNets"

    def _guidance_of(self, request: GenerationRequest) -> float:
        return request.guidance_scale

    def _conditions(self, rows: Sequence[Lane], embeddings: Sequence[Embedding], num_image: int) -> dict[str, Any]:
        # diffusers adds these numbers to the attention's logits: nothing is hidden, what is attended to gets 1 more.
        text = torch.stack([embedding.mask for embedding in embeddings if embedding.mask is not None])
        return {"attention_mask": torch.cat((text, text.new_ones(len(rows), num_image)), 1)}


class _TimeVectors(torch.nn.Module):
    """diffusers' `ChromaCombinedTimestepTextProjEmbeddings`, whose guidance of 0 is made on the device."""

    def __init__(self, plain: Any) -> None:
        super().__init__()
        self._plain = plain

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        """Return the vectors [rows, modulations, channels] of the timesteps [rows]."""
        plain, dtype = self._plain, timestep.dtype
        time, guidance = (project(of).to(dtype) for project, of in self._projections(timestep))
        modulations = plain.mod_proj.to(dtype)
        both = torch.cat((time, guidance), 1)[:, None].expand(-1, len(modulations), -1)
        return torch.cat((both, modulations.expand(len(timestep), -1, -1)), -1)

    def _projections(self, timestep: torch.Tensor) -> tuple[tuple[Any, torch.Tensor], ...]:
        guidance = torch.zeros(len(timestep), dtype=torch.int64, device=timestep.device)
        return (self._plain.time_proj, timestep), (self._plain.guidance_proj, guidance)
