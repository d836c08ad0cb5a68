"""Base of the families with a UNet: CLIP's prompts in chunks, and forwards of lanes of one size."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from inference.controlnet.unet import Inputs, compute_residuals
from inference.errors import EngineStartFailed
from inference.lane import BatchTraits, Embedding, Lane
from inference.lora.adapter_memory import AdapterMemory
from inference.lora.products.rows import RowAdapters
from inference.models.attention.unet import group_projections
from inference.models.base import Family
from inference.models.families.clip_prompts import LongPromptEncoder
from inference.models.inputs import Prompt, embedding_of, guides_of, sampler_of
from inference.request import GenerationRequest

# Entries that a ControlNet's config shares with its UNet's: otherwise their blocks do not match.
SHARED_WITH_CONTROLNETS = (
    "cross_attention_dim",
    "block_out_channels",
    "layers_per_block",
    "addition_embed_type",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
)

# Inputs of a UNet that it is given together, by diffusers' names.
ADDED_CONDITIONS = ("text_embeds", "time_ids")


class UNetFamily(Family):
    """Stable Diffusion and SDXL. Lanes of one size share a forward, however long their prompts are."""

    is_chunked = True
    options = ("guidance_rescale",)
    controlnet_class = "ControlNetModel"
    _prompts: LongPromptEncoder

    def __init__(self, pipeline: Any, *args: Any, device: torch.device, memory: AdapterMemory) -> None:
        """Raise EngineStartFailed for guidance-distilled UNets, and those for editing or upscaling."""
        config = pipeline.unet.config
        if config.time_cond_proj_dim is not None:
            raise EngineStartFailed("MODEL_ID has a guidance-distilled UNet, which this version cannot run")
        if config.in_channels not in (config.out_channels, 2 * config.out_channels + 1):
            kind = f"a UNet for editing or upscaling ({config.in_channels} input channels)"
            raise EngineStartFailed(f"MODEL_ID has {kind}; this version runs ordinary and inpainting ones")
        super().__init__(pipeline, *args, device=device, memory=memory)
        self._is_inpainting = config.in_channels != config.out_channels
        if self._is_inpainting:
            self.kinds = ("inpaint",)
        self._memory_format = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        pipeline.unet.to(memory_format=self._memory_format)
        group_projections(pipeline.unet)

    @property
    def base_size(self) -> int:
        return int(self._pipeline.unet.config.sample_size * self.size_multiple)

    @property
    def size_multiple(self) -> int:
        return int(self._pipeline.vae_scale_factor)

    def batch_traits(self, request: GenerationRequest) -> BatchTraits:
        return BatchTraits(
            (request.height, request.width),
            is_guided=request.guidance_scale > 1,
            num_steps=self.num_steps_of(request),
        )

    def encode(self, prompts: Sequence[Prompt], adapters: Sequence[RowAdapters]) -> list[Embedding]:
        """Embed ordinary prompts in one pass; those with weights or several chunks one by one."""
        found: list[Embedding | None] = [None] * len(prompts)
        ordinary = []
        for index, (prompt, row) in enumerate(zip(prompts, adapters, strict=True)):
            if self._prompts.is_ordinary(prompt.text):
                ordinary.append(index)
            else:
                self.bank.route([row])
                found[index] = Embedding(*self._prompts.encode(prompt.text))
        if ordinary:
            self.bank.route([adapters[index] for index in ordinary])
            encoded = self._encode_ordinary([prompts[index] for index in ordinary])
            for index, embedding in zip(ordinary, encoded, strict=True):
                found[index] = embedding
        return [embedding for embedding in found if embedding is not None]

    @abstractmethod
    def _encode_ordinary(self, prompts: Sequence[Prompt]) -> list[Embedding]:
        """Embed prompts of one chunk without weights like the pipeline's `encode_prompt`; uploads do not wait."""

    def _tokenized(self, tokenizer: Any, prompts: Sequence[Prompt]) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokenize: ids on the device and their mask on the host, [prompts, 77] each."""
        texts = [prompt.text for prompt in prompts]
        length = tokenizer.model_max_length
        found = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return self._uploaded(found.input_ids), found.attention_mask

    def _added_conditions(self, rows: Sequence[Lane], embeddings: Sequence[Embedding]) -> dict[str, torch.Tensor]:
        """Return the UNet's added conditions."""
        return {}

    def _latent_shape(self, request: GenerationRequest) -> tuple[int, int, int]:
        multiple = self.size_multiple
        return self._pipeline.unet.config.out_channels, request.height // multiple, request.width // multiple

    def load_control(self, name: str) -> Any:
        net = super().load_control(name)
        group_projections(net)
        return net

    def encode_control(self, image: torch.Tensor) -> torch.Tensor:
        """Return the image unchanged: these ControlNets have an encoder of their own."""
        return self._uploaded(image).to(self._pipeline.unet.dtype)

    def _controlnet_mismatch(self, config: Any) -> str | None:
        if config.global_pool_conditions or config.conditioning_channels != 3:
            return "it is shown something other than a colour picture, or reads it as a whole"
        latent_channels = self._pipeline.vae.config.latent_channels
        if config.in_channels != latent_channels:
            return f"its in_channels is {config.in_channels}, the VAE's latents have {latent_channels}"
        for name in SHARED_WITH_CONTROLNETS:
            wanted, found = _plain(getattr(self._pipeline.unet.config, name)), _plain(getattr(config, name))
            if wanted != found:
                return f"its {name} is {found}, the UNet's is {wanted}"
        return None

    def _denoise(self, lanes: Sequence[Lane]) -> list[torch.Tensor]:
        """Run the forward. Rows: negative prompt and prompt of each guided lane, then prompts of the other lanes."""
        unet = self._pipeline.unet
        ordered = sorted(lanes, key=_order)
        rows = [lane for lane in ordered for _ in range(lane.num_rows)]
        num_guided = len(rows) - len(lanes)
        embeddings = [embedding_of(lane, is_negative=i < 2 * num_guided and i % 2 == 0) for i, lane in enumerate(rows)]
        tokens, mask = _stacked([embedding.tokens for embedding in embeddings])
        read = {id(lane): sampler_of(lane).model_input() for lane in ordered}
        latents = torch.stack([read[id(lane)] for lane in rows])
        inputs = Inputs(
            latents.to(unet.dtype, memory_format=self._memory_format),
            self._upload([sampler_of(lane).timestep for lane in rows]),
            [embedding.tokens for embedding in embeddings],
            self._added_conditions(rows, embeddings),
        )
        by_row = {"sample": inputs.latents, "timestep": inputs.timesteps, "encoder_hidden_states": tokens}
        by_row |= inputs.added
        adapters, guides = [lane.owner.row for lane in rows], guides_of(rows)
        predictions = None
        if mask is None and not guides:
            predictions = self._predict_by_graph(self._predict, by_row, adapters)
        if predictions is None:
            self.bank.route(adapters)
            residuals = compute_residuals(guides, inputs, self._upload)
            mask = None if mask is None else self._uploaded(mask)
            predictions = self._predict(by_row, encoder_attention_mask=mask, **residuals)
        drawn = self._guided(predictions.float(), ordered[:num_guided])
        by_lane = {id(lane): prediction for lane, prediction in zip(ordered, drawn, strict=True)}
        return [by_lane[id(lane)] for lane in lanes]

    def _predict(self, by_row: Mapping[str, torch.Tensor], **others: Any) -> torch.Tensor:
        """Call the UNet: with its inputs by their names, and with its added conditions, [rows, ...] each."""
        added = {name: one for name, one in by_row.items() if name in ADDED_CONDITIONS}
        own = {name: one for name, one in by_row.items() if name not in added}
        predictions: torch.Tensor = self._pipeline.unet(**own, added_cond_kwargs=added, return_dict=False, **others)[0]
        return predictions

    def _guided(self, predictions: torch.Tensor, guided: Sequence[Lane]) -> list[torch.Tensor]:
        """Return each lane's prediction, of the predictions by row: the guided lanes' pairs are the first."""
        pairs, unguided = predictions[: 2 * len(guided)], predictions[2 * len(guided) :]
        negative, positive = pairs[::2], pairs[1::2]
        requests = [lane.owner.request for lane in guided]
        scales = self._upload([one.guidance_scale for one in requests]).view(-1, 1, 1, 1)
        drawn = negative + scales * (positive - negative)
        if any(one.guidance_rescale for one in requests):
            drawn = _rescaled(drawn, positive, self._upload([one.guidance_rescale for one in requests]))
        return [*drawn, *unguided]


def _rescaled(guided: torch.Tensor, positive: torch.Tensor, rescales: torch.Tensor) -> torch.Tensor:
    """Move predictions [lanes, channels, height, width] by `rescales` [lanes] to the standard deviation of the
    prompt's: section 3.4 of Lin et al. 2023. A lane of 0 is unchanged to the bit.
    """
    dims, shares = (1, 2, 3), rescales.view(-1, 1, 1, 1)
    matched = guided * (positive.std(dims, keepdim=True) / guided.std(dims, keepdim=True))
    return torch.where(shares > 0, shares * matched + (1 - shares) * guided, guided)


def _order(lane: Lane) -> tuple[bool, RowAdapters]:
    """Return a key that sorts guided lanes first, then lanes without adapters, and lanes of the same side by side, for
    fewer runs of rows with the same adapters.
    """
    return lane.num_rows == 1, lane.owner.row


def _plain(value: Any) -> Any:
    # Tuples come back from JSON as lists.
    return tuple(value) if isinstance(value, list) else value


def _stacked(tokens: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Stack embeddings to [rows, tokens, width], padded with zeros, and their mask [rows, tokens] on the host.

    Without a mask where all are of one length, which is fastest in attention.
    """
    lengths = [len(one) for one in tokens]
    longest = max(lengths)
    if min(lengths) == longest:
        return torch.stack(list(tokens)), None
    mask = torch.zeros(len(lengths), longest, dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask[row, :length] = True
    return torch.nn.utils.rnn.pad_sequence(list(tokens), batch_first=True), mask
