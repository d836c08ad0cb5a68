"""Krea 2: states of several layers of Qwen3-VL, fused by the transformer, and guidance that is off at 0."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import pad

from inference.errors import RequestFailed
from inference.lane import Embedding, Lane
from inference.lora.adapter_memory import UNLIMITED, AdapterMemory
from inference.lora.names.key_names import KREA2, KeyNaming
from inference.lora.products.rows import RowAdapters
from inference.models.attention.flux import RotaryPositions
from inference.models.attention.krea2 import attend_in_rows
from inference.models.families.packed import NO_IDS, PackedFamily
from inference.models.families.qwen_vae import QwenVaeFamily
from inference.models.inputs import Prompt
from inference.request import GenerationRequest
from inference.sampling.samplers import TRAIN_TIMESTEPS
from inference.sampling.schedulers import FLOW

# The transformer's length in training, the end of the template included.
MAX_TOKENS = 512
# Texts of a forward are padded to multiples of it, so that few sizes have tables of positions.
TOKEN_MULTIPLE = 64
# Of the distilled checkpoint, Turbo.
STEPS_TURBO, GUIDANCE_TURBO, SHIFT_TURBO = 8, 0.0, 1.15


class Krea2(QwenVaeFamily, PackedFamily):
    """`Krea2Pipeline` checkpoints: Raw, and Turbo, which is distilled."""

    name = "krea-2"
    schedulers = FLOW
    controlnet_class = None
    kinds = ("text2image",)
    default_steps = 28
    default_guidance = 4.5
    max_image_tokens = 6400

    def __init__(self, pipeline: Any, *, device: torch.device, memory: AdapterMemory = UNLIMITED) -> None:
        transformer = pipeline.transformer
        super().__init__(pipeline, {"transformer": transformer}, device=device, memory=memory)
        self._positions = RotaryPositions(transformer.rotary_emb, device)
        transformer.rotary_emb = self._positions
        attend_in_rows(transformer)
        if pipeline.config.is_distilled:
            self.default_steps, self.default_guidance = STEPS_TURBO, GUIDANCE_TURBO

    @classmethod
    def naming_of(cls, config: Mapping[str, Any]) -> KeyNaming:
        return KREA2

    def encode(self, prompts: Sequence[Prompt], adapters: Sequence[RowAdapters]) -> list[Embedding]:
        """Return the states [tokens, layers, width] behind the template's beginning; adapters do not change them.

        The pipeline pads each prompt in its middle, and then hides the padding everywhere and counts no place for it:
        what is left out here changes nothing.
        """
        pipeline = self._pipeline
        start = pipeline.prompt_template_encode_start_idx
        texts = [pipeline.prompt_template_encode_prefix + prompt.text for prompt in prompts]
        begun = pipeline.tokenizer(texts, verbose=False).input_ids
        longest, most = max(map(len, begun)) - start, MAX_TOKENS - pipeline.prompt_template_encode_num_suffix_tokens
        if longest > most:
            reason = f"the prompt has {longest} tokens; this model reads {most}"
            raise RequestFailed("INVALID_PROMPT", f"{reason}: ask with fewer words")
        suffix = pipeline.tokenizer(pipeline.prompt_template_encode_suffix).input_ids
        texts_read = [torch.tensor([*ids, *suffix]) for ids in begun]
        ids = torch.nn.utils.rnn.pad_sequence(texts_read, batch_first=True)
        # No mask: a token attends to those before it, and padding comes after all of a text's own. With places of fewer
        # axes transformers would synchronise with the device to see whether they begin anew.
        places = torch.arange(ids.shape[1]).expand(3, *ids.shape)
        states = pipeline.text_encoder(
            input_ids=self._uploaded(ids),
            position_ids=self._uploaded(places),
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states
        chosen = torch.stack([states[layer] for layer in pipeline.text_encoder_select_layers], 2)
        return [Embedding(own[start : len(read)]) for own, read in zip(chosen, texts_read, strict=True)]

    def _controlnet_mismatch(self, config: Any) -> str | None:
        return "this version runs Krea 2 without ControlNets"

    def _guidance_of(self, request: GenerationRequest) -> float:
        # The pipeline adds the difference to the prompt's own prediction, others to that of the negative prompt.
        return 1 + request.guidance_scale

    def _shift(self, request: GenerationRequest) -> float | None:
        computed = super()._shift(request)
        return computed if computed is None or not self._pipeline.config.is_distilled else SHIFT_TURBO

    def _predict(
        self, latents: torch.Tensor, times: torch.Tensor, rows: Sequence[Lane], embeddings: Sequence[Embedding]
    ) -> torch.Tensor:
        _, height, width, _ = latents.shape
        lengths = torch.tensor([len(embedding.tokens) for embedding in embeddings])
        longest = int(lengths.max())
        num_text = longest + -longest % TOKEN_MULTIPLE
        tokens = [pad(one.tokens, (0, 0, 0, 0, 0, num_text - len(one.tokens))) for one in embeddings]
        self._positions.set(num_text=num_text, height=height, width=width)
        predictions: torch.Tensor = self._pipeline.transformer(
            latents.flatten(1, 2),
            torch.stack(tokens),
            # In its pipeline's order: in 16 bits the other one rounds twice.
            (times / TRAIN_TIMESTEPS).to(latents.dtype),
            NO_IDS,
            encoder_attention_mask=self._uploaded(torch.arange(num_text) < lengths[:, None]),
            return_dict=False,
        )[0]
        return predictions
