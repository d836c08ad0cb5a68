"""FLUX.2 klein: a language model's hidden states of three layers, a transformer over text, image and references."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

from inference.checkpoints.offload import ensure_on_device
from inference.errors import RequestFailed
from inference.lane import BatchTraits, Embedding, Lane
from inference.latents.preview_projection import Projection, find_projection
from inference.lora.adapter_memory import UNLIMITED, AdapterMemory
from inference.lora.names.key_names import FLUX_2, KeyNaming
from inference.lora.products.rows import RowAdapters
from inference.models.attention.flux_2 import (
    IMAGE_IDS,
    TEXT_IDS,
    Flux2Positions,
    Flux2SingleAttnProcessor,
    GroupedFlux2AttnProcessor,
    Layout,
)
from inference.models.families.flow import PATCH, FlowFamily
from inference.models.families.packed import sort_key
from inference.models.inputs import Prompt, embedding_of, sampler_of
from inference.request import GenerationRequest, Reference
from inference.sampling.samplers import TRAIN_TIMESTEPS, predict_x0
from inference.sampling.schedulers import FLOW
from inference.sampling.trajectory import StepPlan

# The pipeline pads every prompt to it.
MAX_TOKENS = 512
# The layers of Qwen3 whose states the transformer reads, side by side.
ENCODER_LAYERS = (9, 18, 27)
# As many are kept: a state is a layer's input, and that of the last one is normalised.
NUM_ENCODER_LAYERS = ENCODER_LAYERS[-1] + 1
STEPS_DISTILLED, GUIDANCE_DISTILLED = 4, 1.0


class Flux2Klein(FlowFamily):
    """`Flux2KleinPipeline` checkpoints, base and distilled: the latter have no guidance.

    Lanes share a forward whose images, and whose references, are of one size. The sampler's latents are packed:
    [height, width, channels of a patch].
    """

    name = "flux2-klein"
    schedulers = FLOW
    kinds = ("text2image", "edit")
    controlnet_class = "Flux2ControlNetModel"
    default_steps = 50
    default_guidance = 4.0

    def __init__(self, pipeline: Any, *, device: torch.device, memory: AdapterMemory = UNLIMITED) -> None:
        transformer = pipeline.transformer
        super().__init__(pipeline, {"transformer": transformer}, device=device, memory=memory)
        # A quarter of the language model predicts words, which nothing reads.
        del pipeline.text_encoder.model.layers[NUM_ENCODER_LAYERS:]
        pipeline.text_encoder.lm_head = torch.nn.Identity()
        self._is_distilled = bool(pipeline.config.is_distilled)
        if self._is_distilled:
            self.default_steps, self.default_guidance = STEPS_DISTILLED, GUIDANCE_DISTILLED
        norm = pipeline.vae.bn
        # Copies: a VAE that is offloaded takes its own along.
        self._mean = norm.running_mean.to(device).view(1, -1, 1, 1)
        variance = norm.running_var.to(device) + pipeline.vae.config.batch_norm_eps
        self._deviation = torch.sqrt(variance).view(1, -1, 1, 1)
        self._positions = Flux2Positions(transformer.pos_embed, device)
        transformer.pos_embed = self._positions
        for block in transformer.transformer_blocks:
            block.attn.set_processor(GroupedFlux2AttnProcessor())
        for block in transformer.single_transformer_blocks:
            block.attn.set_processor(Flux2SingleAttnProcessor())

    @classmethod
    def naming_of(cls, config: Mapping[str, Any]) -> KeyNaming:
        return FLUX_2

    def batch_traits(self, request: GenerationRequest) -> BatchTraits:
        return BatchTraits(
            self._grids(request),
            is_guided=request.guidance_scale > 1 and not self._is_distilled,
            num_steps=self.num_steps_of(request),
        )

    def encode(self, prompts: Sequence[Prompt], adapters: Sequence[RowAdapters]) -> list[Embedding]:
        """Return the hidden states of three layers side by side, padding included; adapters do not change them."""
        tokenizer, encoder = self._pipeline.tokenizer, self._pipeline.text_encoder
        chats = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt.text}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=False,
            )
            for prompt in prompts
        ]
        tokens = tokenizer(chats, padding="max_length", max_length=MAX_TOKENS, return_tensors=None, verbose=False)
        longest = max(sum(mask) for mask in tokens.attention_mask)
        if longest > MAX_TOKENS:
            reason = f"the prompt has {longest} tokens with the model's own around it; it reads {MAX_TOKENS}"
            raise RequestFailed("INVALID_PROMPT", f"{reason}: ask with fewer words")
        # Needed for the states of padding, which the transformer reads too. With one of two dimensions transformers
        # would synchronise with the device to see whether it hides anything.
        is_text = torch.tensor(tokens.attention_mask, dtype=torch.bool)
        mask = is_text[:, None] & torch.ones(MAX_TOKENS, MAX_TOKENS, dtype=torch.bool).tril()
        ensure_on_device(encoder)  # which is not called itself: its last layer would predict words
        states = encoder.model(
            input_ids=self._uploaded(torch.tensor(tokens.input_ids)),
            attention_mask=self._uploaded(mask[:, None]),
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states
        return [Embedding(one) for one in torch.cat([states[layer] for layer in ENCODER_LAYERS], -1)]

    def encode_control(self, image: torch.Tensor) -> torch.Tensor:
        """Return the image unchanged: no ControlNet passes `_controlnet_mismatch`."""
        return self._uploaded(image)

    def begin(self, lane: Lane, *, in_tiles: bool = False) -> Any:
        active = lane.owner
        if active.request.references and active.references is None:
            encoded = [self._encoded_reference(one, in_tiles=in_tiles) for one in active.request.references]
            active.references = torch.cat(encoded)
        return super().begin(lane, in_tiles=in_tiles)

    def find_projection(self) -> Projection:
        """Fit the projection of the VAE's own latents to previews."""
        with torch.inference_mode():
            return find_projection(self._pipeline.vae, lambda latents: latents, self.device)

    def predict_x0(self, lane: Lane, prediction: torch.Tensor) -> torch.Tensor:
        """Return the finished latents in the VAE's own layout and scale, which are not the sampler's by channel."""
        sampler = sampler_of(lane)
        latents = predict_x0(sampler.model_input(), sampler.timestep, prediction, self._pipeline.scheduler)
        return self._unscaled(self._unpacked(latents)[None])[0]

    def _controlnet_mismatch(self, config: Any) -> str | None:
        return "this version runs FLUX.2 without ControlNets"

    def _denoise(self, lanes: Sequence[Lane]) -> list[torch.Tensor]:
        """Run the forward. Rows: negative prompt and prompt of each guided lane, then prompts of the other lanes."""
        transformer = self._pipeline.transformer
        ordered = sorted(lanes, key=sort_key)
        rows = [lane for lane in ordered for _ in range(lane.num_rows)]
        num_guided = len(rows) - len(lanes)
        embeddings = [embedding_of(lane, is_negative=i < 2 * num_guided and i % 2 == 0) for i, lane in enumerate(rows)]
        read = {id(lane): sampler_of(lane).model_input() for lane in ordered}
        latents = torch.stack([read[id(lane)] for lane in rows])
        times = self._upload([sampler_of(lane).timestep for lane in rows]).to(transformer.dtype) / TRAIN_TIMESTEPS
        tokens = torch.stack([embedding.tokens for embedding in embeddings])
        images = latents.flatten(1, 2)
        if rows[0].owner.references is not None:
            references = [lane.owner.references for lane in rows if lane.owner.references is not None]
            images = torch.cat((images, torch.stack(references)), 1)
        self._positions.set(Layout(tokens.shape[1], self._grids(rows[0].owner.request)))
        self.bank.route([lane.owner.row for lane in rows])
        predictions = transformer(
            images.to(transformer.dtype), tokens, times, img_ids=IMAGE_IDS, txt_ids=TEXT_IDS, return_dict=False
        )[0]
        own = predictions[:, : latents.shape[1] * latents.shape[2]].float().view(latents.shape)
        drawn = self._guided(own, ordered[:num_guided])
        by_lane = {id(lane): prediction for lane, prediction in zip(ordered, drawn, strict=True)}
        return [by_lane[id(lane)] for lane in lanes]

    def _guided(self, predictions: torch.Tensor, guided: Sequence[Lane]) -> list[torch.Tensor]:
        """Return each lane's prediction, of the predictions by row: the guided lanes' pairs are the first."""
        pairs, unguided = predictions[: 2 * len(guided)], predictions[2 * len(guided) :]
        negative, positive = pairs[::2], pairs[1::2]
        scales = self._upload([lane.owner.request.guidance_scale for lane in guided]).view(-1, 1, 1, 1)
        return [*(negative + scales * (positive - negative)), *unguided]

    def _grids(self, request: GenerationRequest) -> tuple[tuple[int, int], ...]:
        """Return height and width, in tokens, of the image and of each reference."""
        images: tuple[GenerationRequest | Reference, ...] = (request, *request.references)
        return tuple((one.height // self.size_multiple, one.width // self.size_multiple) for one in images)

    def _encoded_reference(self, reference: Reference, *, in_tiles: bool) -> torch.Tensor:
        """Encode the middle of a reference, to whole tokens [tokens, channels]: the mode of the VAE's distribution."""
        vae, multiple = self._pipeline.vae, self.size_multiple
        vae.use_tiling = in_tiles
        rgb = torch.frombuffer(bytearray(reference.rgb), dtype=torch.uint8)
        pixels = rgb.view(reference.height, reference.width, 3)
        for side, length in enumerate((reference.height, reference.width)):
            pixels = pixels.narrow(side, length % multiple // 2, length - length % multiple)
        image = self._uploaded(pixels.contiguous()).movedim(-1, 0)[None] / 255 * 2 - 1
        encoded = vae.encode(image.to(vae.dtype)).latent_dist.mode()
        return self._packed(self._scaled(encoded[0]).float()).flatten(0, 1)

    def _shift(self, request: GenerationRequest) -> float | None:
        shift: float = compute_empirical_mu(self._num_patches(request), request.num_inference_steps)
        return shift

    def _step_plan(self, request: GenerationRequest) -> StepPlan:
        return replace(super()._step_plan(request), has_own_sigmas=True)

    def _latent_shape(self, request: GenerationRequest) -> tuple[int, int, int]:
        (height, width), *_ = self._grids(request)
        return self._pipeline.transformer.config.in_channels, height, width

    def _packed(self, latents: torch.Tensor) -> torch.Tensor:
        return latents.permute(1, 2, 0).contiguous()

    def _unpacked(self, latents: torch.Tensor) -> torch.Tensor:
        return latents.permute(2, 0, 1)

    def _unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the VAE's latents of normalised patches [1, channels, height, width]."""
        patches: torch.Tensor = latents * self._deviation.to(latents.dtype) + self._mean.to(latents.dtype)
        _, channels, height, width = patches.shape
        split = patches.view(1, channels // PATCH**2, PATCH, PATCH, height, width).permute(0, 1, 4, 2, 5, 3)
        return split.reshape(1, -1, height * PATCH, width * PATCH)

    def _scaled(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the normalised patches of the VAE's latents [channels, height, width]: the inverse."""
        channels, height, width = latents.shape
        split = latents.reshape(channels, height // PATCH, PATCH, width // PATCH, PATCH).permute(0, 2, 4, 1, 3)
        patches = split.reshape(1, -1, height // PATCH, width // PATCH)
        normalised: torch.Tensor = (patches - self._mean.to(latents.dtype)) / self._deviation.to(latents.dtype)
        return normalised[0]
