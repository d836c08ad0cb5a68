"""Bases of the families with packed latents, text and image in one sequence, FLUX.1's transformer among them."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from inference.errors import EngineStartFailed
from inference.lane import BatchTraits, Embedding, Lane
from inference.lora.adapter_memory import AdapterMemory
from inference.lora.products.rows import RowAdapters
from inference.models.attention.flux import GroupedFluxAttnProcessor, RotaryPositions
from inference.models.families.flow import PATCH, FlowFamily
from inference.models.inputs import embedding_of, sampler_of
from inference.request import GenerationRequest
from inference.sampling.samplers import TRAIN_TIMESTEPS

# Of text and image: `RotaryPositions` knows the places itself.
NO_IDS = torch.zeros(0, 3)


class PackedFamily(FlowFamily):
    """Lanes of one size share a forward, whose rotary positions are all of that size.

    The sampler's latents are packed: [height, width, channels of a patch].
    """

    @abstractmethod
    def _guidance_of(self, request: GenerationRequest) -> float:
        """Return the scale of a request's guidance by two passes; none above 1 has one pass."""

    @abstractmethod
    def _predict(
        self, latents: torch.Tensor, times: torch.Tensor, rows: Sequence[Lane], embeddings: Sequence[Embedding]
    ) -> torch.Tensor:
        """Call the transformer with latents [rows, height, width, channels] and times [rows], from 0 to 1000.

        Returns its prediction [rows, tokens, channels].
        """

    def encode_control(self, image: torch.Tensor) -> torch.Tensor:
        """Return the image unchanged: no ControlNet passes `_controlnet_mismatch`."""
        return self._uploaded(image)

    def batch_traits(self, request: GenerationRequest) -> BatchTraits:
        return BatchTraits(
            (request.height, request.width),
            is_guided=self._guidance_of(request) > 1,
            num_steps=self.num_steps_of(request),
        )

    def _denoise(self, lanes: Sequence[Lane]) -> list[torch.Tensor]:
        """Run the forward. Rows: negative prompt and prompt of each guided lane, then prompts of the other lanes."""
        transformer = self._pipeline.transformer
        ordered = sorted(lanes, key=sort_key)
        rows = [lane for lane in ordered for _ in range(lane.num_rows)]
        num_guided = len(rows) - len(lanes)
        embeddings = [embedding_of(lane, is_negative=i < 2 * num_guided and i % 2 == 0) for i, lane in enumerate(rows)]
        read = {id(lane): sampler_of(lane).model_input() for lane in ordered}
        latents = torch.stack([read[id(lane)] for lane in rows]).to(transformer.dtype)
        times = self._upload([sampler_of(lane).timestep for lane in rows])
        self.bank.route([lane.owner.row for lane in rows])
        predictions = self._predict(latents, times, rows, embeddings)
        drawn = self._guided(predictions.float().view(latents.shape), ordered[:num_guided])
        by_lane = {id(lane): prediction for lane, prediction in zip(ordered, drawn, strict=True)}
        return [by_lane[id(lane)] for lane in lanes]

    def _guided(self, predictions: torch.Tensor, guided: Sequence[Lane]) -> list[torch.Tensor]:
        """Return each lane's prediction, of the predictions by row: the guided lanes' pairs are the first."""
        pairs, unguided = predictions[: 2 * len(guided)], predictions[2 * len(guided) :]
        negative, positive = pairs[::2], pairs[1::2]
        scales = self._upload([self._guidance_of(lane.owner.request) for lane in guided]).view(-1, 1, 1, 1)
        return [*self._combined(negative, positive, scales), *unguided]

    def _combined(self, negative: torch.Tensor, positive: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Guide predictions [lanes, height, width, channels] by scales [lanes, 1, 1, 1]."""
        return negative + scales * (positive - negative)

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


class FluxTransformerFamily(PackedFamily):
    """FLUX.1 and Chroma."""

    def __init__(
        self, pipeline: Any, models: Mapping[str, torch.nn.Module], *, device: torch.device, memory: AdapterMemory
    ) -> None:
        """Raise EngineStartFailed for transformers that read more than an image's latents."""
        transformer = pipeline.transformer
        if transformer.config.in_channels != transformer.out_channels:
            kind = f"a transformer for editing or control ({transformer.config.in_channels} input channels)"
            raise EngineStartFailed(f"MODEL_ID has {kind}; this version runs FLUX.1 dev, Krea-dev and schnell")
        super().__init__(pipeline, models, device=device, memory=memory)
        self._positions = RotaryPositions(transformer.pos_embed, device)
        transformer.pos_embed = self._positions
        processor = GroupedFluxAttnProcessor()
        for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
            block.attn.set_processor(processor)

    @abstractmethod
    def _conditions(self, rows: Sequence[Lane], embeddings: Sequence[Embedding], num_image: int) -> dict[str, Any]:
        """Return the transformer's further inputs, by diffusers' names; the image has `num_image` tokens."""

    def _predict(
        self, latents: torch.Tensor, times: torch.Tensor, rows: Sequence[Lane], embeddings: Sequence[Embedding]
    ) -> torch.Tensor:
        _, height, width, _ = latents.shape
        tokens = torch.stack([embedding.tokens for embedding in embeddings])
        self._positions.set(num_text=tokens.shape[1], height=height, width=width)
        predictions: torch.Tensor = self._pipeline.transformer(
            latents.flatten(1, 2),
            tokens,
            timestep=times.to(latents.dtype) / TRAIN_TIMESTEPS,
            img_ids=NO_IDS,
            txt_ids=NO_IDS,
            return_dict=False,
            **self._conditions(rows, embeddings, height * width),
        )[0]
        return predictions


def sort_key(lane: Lane) -> tuple[bool, RowAdapters]:
    """Return a key that sorts guided lanes first, then lanes without adapters, for fewer runs of rows with the same."""
    return lane.num_rows == 1, lane.owner.row
