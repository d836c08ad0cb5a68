"""Z-Image: a language model's hidden states, a transformer over image tokens of any size, a flow."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import ZImageControlNetModel
from torch.nn import functional

from inference.checkpoints.offload import ensure_on_device
from inference.controlnet.z_image import Inputs, compute_hints
from inference.device.forward_graphs import Capture
from inference.errors import RequestFailed
from inference.lane import BatchTraits, Embedding, Lane
from inference.lora.adapter_memory import UNLIMITED, AdapterMemory
from inference.lora.names.key_names import Z_IMAGE, KeyNaming
from inference.lora.products.rows import RowAdapters
from inference.models.attention.z_image import (
    RowLengths,
    RowTokens,
    attend_to_own_tokens,
    attend_to_own_tokens_in_controlnet,
)
from inference.models.families.flow import PATCH, FlowFamily
from inference.models.inputs import Prompt, embedding_of, guides_of, sampler_of
from inference.request import GenerationRequest
from inference.sampling.samplers import TRAIN_TIMESTEPS
from inference.sampling.schedulers import FLOW

# The transformer's length in training; the pipeline truncates here.
MAX_TOKENS = 512
# Tokens of captions and images are padded to multiples of it.
TOKEN_MULTIPLE = 32
# Entries that a ControlNet's config shares with its transformer's.
SHARED_WITH_CONTROLNETS = ("dim", "n_heads", "n_kv_heads", "n_refiner_layers")
# Layers whose input concatenates all rows: of their images, and of their captions.
IMAGE_LAYER, CAPTION_LAYER = "transformer.all_x_embedder.2-1", "transformer.cap_embedder.1"


class ZImage(FlowFamily):
    """`ZImagePipeline` checkpoints. Lanes share a forward where their areas are alike, whatever their shapes are."""

    name = "z-image"
    schedulers = FLOW
    controlnet_class = "ZImageControlNetModel"
    default_steps = 8
    default_guidance = 0.0
    options = ("cfg_normalization", "cfg_truncation")
    concatenated_layers = (IMAGE_LAYER, CAPTION_LAYER)

    def __init__(self, pipeline: Any, *, device: torch.device, memory: AdapterMemory = UNLIMITED) -> None:
        super().__init__(pipeline, {"transformer": pipeline.transformer}, device=device, memory=memory)
        self._row_lengths = RowLengths()
        attend_to_own_tokens(pipeline.transformer, self._row_lengths)
        # [rows, tokens], True at the padding of captions, in forwards that are given padded ones.
        self._caption_padding: torch.Tensor | None = None

    @classmethod
    def naming_of(cls, config: Mapping[str, Any]) -> KeyNaming:
        return Z_IMAGE

    def batch_traits(self, request: GenerationRequest) -> BatchTraits:
        """Return half-octaves of area, centred at the base size: a forward takes as long as its largest image."""
        base = (self.base_size // self.size_multiple) ** 2
        shape = round(2 * math.log2(self._num_patches(request) / base))
        return BatchTraits(shape, is_guided=request.guidance_scale > 0, num_steps=self.num_steps_of(request))

    def encode(self, prompts: Sequence[Prompt], adapters: Sequence[RowAdapters]) -> list[Embedding]:
        """Return the hidden states before the last layer; adapters do not change the language model."""
        tokenizer, encoder = self._pipeline.tokenizer, self._pipeline.text_encoder
        chats = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt.text}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=True,
            )
            for prompt in prompts
        ]
        tokens = tokenizer(chats, padding=True, padding_side="right", return_tensors="pt")
        lengths = tokens.attention_mask.sum(1).tolist()
        if max(lengths) > MAX_TOKENS:
            reason = f"the prompt has {max(lengths)} tokens with the model's own around it; it reads {MAX_TOKENS}"
            raise RequestFailed("INVALID_PROMPT", f"{reason}: ask with fewer words")
        # No mask: a token attends to those before it, and padding comes after all of a text's own. With a mask
        # transformers would synchronise with the device to see whether it hides anything.
        states = encoder(input_ids=self._uploaded(tokens.input_ids), output_hidden_states=True).hidden_states[-2]
        return [Embedding(own[:length]) for own, length in zip(states, lengths, strict=True)]

    def load_control(self, name: str) -> Any:
        """Load a ControlNet, with the transformer's own layers where it lacks some."""
        net = ZImageControlNetModel.from_transformer(super().load_control(name), self._pipeline.transformer)
        attend_to_own_tokens_in_controlnet(net, self._row_lengths)
        return net

    def encode_control(self, image: torch.Tensor) -> torch.Tensor:
        """Encode the image to latents [channels, 1, height, width], the mode of the VAE's distribution."""
        vae = self._pipeline.vae
        vae.use_tiling = False
        encoded = vae.encode((self._uploaded(image)[None] * 2 - 1).to(vae.dtype)).latent_dist.mode()
        latents = (encoded - vae.config.shift_factor) * vae.config.scaling_factor
        shown: torch.Tensor = latents[0, :, None].to(self._pipeline.transformer.dtype)
        return shown

    def capture_forwards(self, capture: Capture) -> None:
        super().capture_forwards(capture)
        self._pipeline.transformer.cap_embedder.register_forward_hook(self._hide_caption_padding)

    def _controlnet_mismatch(self, config: Any) -> str | None:
        ours = self._pipeline.transformer.config
        for name in SHARED_WITH_CONTROLNETS:
            if config[name] != ours[name]:
                return f"its {name} is {config[name]}, the transformer's is {ours[name]}"
        if config.control_in_dim < ours.in_channels or max(config.control_layers_places) >= ours.n_layers:
            return "it reads fewer channels, or is for more layers, than the transformer has"
        return None

    def _denoise(self, lanes: Sequence[Lane]) -> list[torch.Tensor]:
        """Run the forward. Rows: the prompts of all lanes, then the negative prompts of the guided ones."""
        guided = [lane for lane in lanes if lane.num_rows == 2]
        with self._row_lengths.cleared_on_exit():
            predictions = self._forward([*lanes, *guided], num_positive=len(lanes))
        negative = {id(lane): one.float() for lane, one in zip(guided, predictions[len(lanes) :], strict=True)}
        drawn = []
        for lane, positive in zip(lanes, predictions[: len(lanes)], strict=True):
            prediction = positive.float()
            if id(lane) in negative:
                prediction = _guided(prediction, negative[id(lane)], lane)
            # The model predicts the velocity to the image, schedulers expect that to the noise.
            drawn.append(-prediction[:, 0])
        return drawn

    def _forward(self, rows: Sequence[Lane], *, num_positive: int) -> list[torch.Tensor]:
        """Return the transformer's prediction for each row, after the first `num_positive` by the negative prompt."""
        transformer = self._pipeline.transformer
        captions = [embedding_of(lane, is_negative=i >= num_positive).tokens for i, lane in enumerate(rows)]
        tokens = [
            RowTokens(_padded(self._num_patches(lane.owner.request)), _padded(len(caption)))
            for lane, caption in zip(rows, captions, strict=True)
        ]
        read = {id(lane): sampler_of(lane).model_input().to(transformer.dtype)[:, None] for lane in rows[:num_positive]}
        inputs = Inputs(
            [read[id(lane)] for lane in rows],
            self._upload([(TRAIN_TIMESTEPS - sampler_of(lane).timestep) / TRAIN_TIMESTEPS for lane in rows]),
            captions,
            [one.image + one.caption for one in tokens],
        )

        def route_adapters(numbers: Sequence[int]) -> None:
            chosen = [tokens[i] for i in numbers]
            self._row_lengths.set(chosen)
            self.bank.route([adapters[i] for i in numbers], _token_counts(chosen))

        guides, adapters = guides_of(rows), [lane.owner.row for lane in rows]
        by_graph = None if guides else self._forward_by_graph(inputs, adapters)
        if by_graph is not None:
            return list(by_graph)
        ensure_on_device(transformer)  # the ControlNets run layers of it before it is called itself
        hints = compute_hints(guides, inputs, route_adapters, self._upload)
        route_adapters(range(len(rows)))
        predictions: list[torch.Tensor] = transformer(
            inputs.latents, inputs.times, captions, return_dict=False, controlnet_block_samples=hints or None
        )[0]
        return predictions

    def _forward_by_graph(self, inputs: Inputs, adapters: Sequence[RowAdapters]) -> torch.Tensor | None:
        """Return the predictions of a captured forward; None where there is none, as for rows that differ in length.

        The lengths of rows are numbers of the graph: each mix of them would be another.
        """
        longest = {_padded(len(caption)) for caption in inputs.captions}
        if self._graphs is None or len(longest) > 1 or len({one.shape for one in inputs.latents}) > 1:
            return None
        (length,) = longest
        captions = [functional.pad(one, (0, 0, 0, length - len(one))) for one in inputs.captions]
        lengths = torch.tensor([len(one) for one in inputs.captions])
        by_row = {
            "latents": torch.stack(list(inputs.latents)),
            "times": inputs.times,
            "captions": torch.stack(captions),
            "caption_padding": self._uploaded(torch.arange(length) >= lengths[:, None]),
        }
        return self._predict_by_graph(self._predict, by_row, adapters)

    def _predict(self, by_row: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Call the transformer for rows of one size whose captions are padded to one length, [rows, ...] each."""
        self._caption_padding = by_row["caption_padding"]
        try:
            latents, captions = list(by_row["latents"]), list(by_row["captions"])
            return torch.stack(self._pipeline.transformer(latents, by_row["times"], captions, return_dict=False)[0])
        finally:
            self._caption_padding = None

    def _hide_caption_padding(self, *call: Any) -> torch.Tensor | None:
        """Set the embedded padding of captions to the transformer's own token for it, which it does where it pads."""
        if self._caption_padding is None:
            return None
        embedded: torch.Tensor = call[-1]
        return torch.where(self._caption_padding.flatten()[:, None], self._pipeline.transformer.cap_pad_token, embedded)

    def _latent_shape(self, request: GenerationRequest) -> tuple[int, int, int]:
        multiple = self.size_multiple
        channels = self._pipeline.transformer.config.in_channels
        return channels, PATCH * (request.height // multiple), PATCH * (request.width // multiple)


def _token_counts(rows: Sequence[RowTokens]) -> dict[str, list[int]]:
    """Return the tokens of each row, for the layers whose input concatenates all rows."""
    return {
        IMAGE_LAYER: [row.image for row in rows],
        CAPTION_LAYER: [row.caption for row in rows],
    }


def _guided(positive: torch.Tensor, negative: torch.Tensor, lane: Lane) -> torch.Tensor:
    """Apply the pipeline's guidance: off beyond the truncation, its norm limited by the normalisation."""
    request = lane.owner.request
    if (TRAIN_TIMESTEPS - sampler_of(lane).timestep) / TRAIN_TIMESTEPS > request.cfg_truncation:
        return positive
    guided = positive + request.guidance_scale * (positive - negative)
    if request.cfg_normalization > 0:
        longest = torch.linalg.vector_norm(positive) * request.cfg_normalization
        # No branch: comparing on the host would wait for the device.
        guided = guided * (longest / torch.linalg.vector_norm(guided)).clamp(max=1)
    return guided


def _padded(num_tokens: int) -> int:
    return num_tokens + -num_tokens % TOKEN_MULTIPLE
