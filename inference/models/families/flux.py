"""FLUX.1: CLIP's pooled embedding and T5's tokens, a transformer over text and image, guidance as one of its inputs."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch

from inference.errors import EngineStartFailed, RequestFailed
from inference.lane import BatchTraits, Embedding, Lane
from inference.lora.adapter_memory import UNLIMITED, AdapterMemory
from inference.lora.names.key_names import FLUX, KeyNaming
from inference.lora.products.rows import RowAdapters
from inference.models.attention.flux import GroupedFluxAttnProcessor, RotaryPositions
from inference.models.families.flow import PATCH, FlowFamily
from inference.models.inputs import Prompt, embedding_of, sampler_of
from inference.request import GenerationRequest
from inference.sampling.samplers import TRAIN_TIMESTEPS
from inference.sampling.schedulers import FLOW
from inference.sampling.trajectory import StepPlan

# T5's tokens, to which every prompt is padded: schnell was trained with fewer than dev.
MAX_TOKENS, MAX_TOKENS_SCHNELL = 512, 256
STEPS_SCHNELL, GUIDANCE_SCHNELL = 4, 0.0
# Of text and image: `RotaryPositions` knows the places itself.
NO_IDS = torch.zeros(0, 3)


class Flux(FlowFamily):
    """`FluxPipeline` checkpoints: dev, Krea-dev, and schnell, which has no guidance. Lanes of one size share a forward.

    The sampler's latents are packed: [height, width, channels of a patch].
    """

    name = "flux"
    schedulers = FLOW
    controlnet_class = "FluxControlNetModel"
    options = ("true_cfg_scale",)
    default_steps = 28
    default_guidance = 3.5
    text_encoders = ("text_encoder",)
    guided_fields: ClassVar[Mapping[str, Any]] = {"true_cfg_scale": 5.0, "negative_prompt": "a"}

    def __init__(self, pipeline: Any, *, device: torch.device, memory: AdapterMemory = UNLIMITED) -> None:
        """Raise EngineStartFailed for transformers that read more than an image's latents."""
        transformer = pipeline.transformer
        if transformer.config.in_channels != transformer.out_channels:
            kind = f"a transformer for editing or control ({transformer.config.in_channels} input channels)"
            raise EngineStartFailed(f"MODEL_ID has {kind}; this version runs FLUX.1 dev, Krea-dev and schnell")
        models = {"transformer": transformer, "text_encoder": pipeline.text_encoder}
        super().__init__(pipeline, models, device=device, memory=memory)
        self._reads_guidance = bool(transformer.config.guidance_embeds)
        self._max_tokens = MAX_TOKENS
        if not self._reads_guidance:
            self._max_tokens = MAX_TOKENS_SCHNELL
            self.default_steps, self.default_guidance = STEPS_SCHNELL, GUIDANCE_SCHNELL
        self._positions = RotaryPositions(transformer.pos_embed, device)
        transformer.pos_embed = self._positions
        processor = GroupedFluxAttnProcessor()
        for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
            block.attn.set_processor(processor)

    @classmethod
    def naming_of(cls, config: Mapping[str, Any]) -> KeyNaming:
        return FLUX

    def batch_traits(self, request: GenerationRequest) -> BatchTraits:
        return BatchTraits(
            (request.height, request.width),
            # As in its pipelines. The other guidance is a number that the transformer reads.
            is_guided=request.true_cfg_scale > 1 and request.negative_prompt != "",
            num_steps=self.num_steps_of(request),
        )

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

    def encode_control(self, image: torch.Tensor) -> torch.Tensor:
        """Return the image unchanged: no ControlNet passes `_controlnet_mismatch`."""
        return self._uploaded(image)

    def _controlnet_mismatch(self, config: Any) -> str | None:
        return "this version runs FLUX.1 without ControlNets"

    def _denoise(self, lanes: Sequence[Lane]) -> list[torch.Tensor]:
        """Run the forward. Rows: negative prompt and prompt of each guided lane, then prompts of the other lanes."""
        transformer = self._pipeline.transformer
        ordered = sorted(lanes, key=sort_key)
        rows = [lane for lane in ordered for _ in range(lane.num_rows)]
        num_guided = len(rows) - len(lanes)
        embeddings = [embedding_of(lane, is_negative=i < 2 * num_guided and i % 2 == 0) for i, lane in enumerate(rows)]
        read = {id(lane): sampler_of(lane).model_input() for lane in ordered}
        latents = torch.stack([read[id(lane)] for lane in rows]).to(transformer.dtype)
        times = self._upload([sampler_of(lane).timestep for lane in rows]).to(transformer.dtype) / TRAIN_TIMESTEPS
        tokens = torch.stack([embedding.tokens for embedding in embeddings])
        self._positions.set(num_text=tokens.shape[1], height=latents.shape[1], width=latents.shape[2])
        self.bank.route([lane.owner.row for lane in rows])
        predictions = transformer(
            latents.flatten(1, 2),
            tokens,
            torch.stack([embedding.pooled for embedding in embeddings if embedding.pooled is not None]),
            times,
            img_ids=NO_IDS,
            txt_ids=NO_IDS,
            guidance=self._guidance(rows),
            return_dict=False,
        )[0]
        drawn = self._guided(predictions.float().view(latents.shape), ordered[:num_guided])
        by_lane = {id(lane): prediction for lane, prediction in zip(ordered, drawn, strict=True)}
        return [by_lane[id(lane)] for lane in lanes]

    def _guidance(self, rows: Sequence[Lane]) -> torch.Tensor | None:
        """Return each row's guidance scale, as the transformer reads it; None for schnell."""
        if not self._reads_guidance:
            return None
        return self._upload([lane.owner.request.guidance_scale for lane in rows])

    def _guided(self, predictions: torch.Tensor, guided: Sequence[Lane]) -> list[torch.Tensor]:
        """Return each lane's prediction, of the predictions by row: the guided lanes' pairs are the first."""
        pairs, unguided = predictions[: 2 * len(guided)], predictions[2 * len(guided) :]
        negative, positive = pairs[::2], pairs[1::2]
        scales = self._upload([lane.owner.request.true_cfg_scale for lane in guided]).view(-1, 1, 1, 1)
        return [*(negative + scales * (positive - negative)), *unguided]

    def _step_plan(self, request: GenerationRequest) -> StepPlan:
        # Its pipelines differ in it.
        return replace(super()._step_plan(request), has_own_sigmas=request.source is None)

    def _latent_shape(self, request: GenerationRequest) -> tuple[int, int, int]:
        channels = self._pipeline.transformer.config.in_channels // PATCH**2
        return channels, PATCH * (request.height // self.size_multiple), PATCH * (request.width // self.size_multiple)

    def _packed(self, latents: torch.Tensor) -> torch.Tensor:
        channels, height, width = latents.shape
        patches = latents.reshape(channels, height // PATCH, PATCH, width // PATCH, PATCH)
        return patches.permute(1, 3, 0, 2, 4).flatten(2)

    def _unpacked(self, latents: torch.Tensor) -> torch.Tensor:
        height, width, channels = latents.shape
        patches = latents.reshape(height, width, channels // PATCH**2, PATCH, PATCH)
        return patches.permute(2, 0, 3, 1, 4).reshape(-1, height * PATCH, width * PATCH)


def sort_key(lane: Lane) -> tuple[bool, RowAdapters]:
    """Return a key that sorts guided lanes first, then lanes without adapters, for fewer runs of rows with the same."""
    return lane.num_rows == 1, lane.owner.row
