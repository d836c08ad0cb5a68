"""Qwen-Image: a language model's hidden states, a transformer over text and image, guidance by two passes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from inference.errors import RequestFailed
from inference.lane import Embedding, Lane
from inference.lora.adapter_memory import UNLIMITED, AdapterMemory
from inference.lora.names.key_names import QWEN_IMAGE, KeyNaming
from inference.lora.products.rows import RowAdapters
from inference.models.attention.qwen_image import GroupedQwenAttnProcessor
from inference.models.families.packed import PackedFamily
from inference.models.families.qwen_vae import QwenVaeFamily
from inference.models.inputs import Prompt
from inference.request import GenerationRequest
from inference.sampling.samplers import TRAIN_TIMESTEPS
from inference.sampling.schedulers import FLOW

# Of a prompt and what follows it in the template: the pipeline cuts here.
MAX_TOKENS = 512
# Of a negative prompt that is left out, as its authors draw: the pipeline does not guide without one.
NO_PROMPT = " "


class QwenImage(QwenVaeFamily, PackedFamily):
    """`QwenImagePipeline` checkpoints. A row's padding is hidden from its own tokens."""

    name = "qwen-image"
    schedulers = FLOW
    controlnet_class = None
    options = ("true_cfg_scale",)
    default_steps = 50
    default_guidance = 4.0

    def __init__(self, pipeline: Any, *, device: torch.device, memory: AdapterMemory = UNLIMITED) -> None:
        super().__init__(pipeline, {"transformer": pipeline.transformer}, device=device, memory=memory)
        processor = GroupedQwenAttnProcessor()
        for block in pipeline.transformer.transformer_blocks:
            block.attn.set_processor(processor)

    @classmethod
    def naming_of(cls, config: Mapping[str, Any]) -> KeyNaming:
        return QWEN_IMAGE

    def encode(self, prompts: Sequence[Prompt], adapters: Sequence[RowAdapters]) -> list[Embedding]:
        """Return the last hidden states behind the template's beginning; adapters do not change the language model."""
        pipeline = self._pipeline
        first = pipeline.prompt_template_encode_start_idx
        texts = [NO_PROMPT if prompt.is_left_out else prompt.text for prompt in prompts]
        chats = [pipeline.prompt_template_encode.format(text) for text in texts]
        tokens = pipeline.tokenizer(chats, padding=True, padding_side="right", return_tensors="pt")
        lengths = tokens.attention_mask.sum(1).tolist()
        if max(lengths) - first > MAX_TOKENS:
            reason = f"the prompt has {max(lengths) - first} tokens with what follows it; this model reads {MAX_TOKENS}"
            raise RequestFailed("INVALID_PROMPT", f"{reason}: ask with fewer words")
        # No mask: a token attends to those before it, and padding comes after all of a text's own. Of the logits, which
        # no one reads, the last token's are the fewest there can be.
        states = pipeline.text_encoder(
            input_ids=self._uploaded(tokens.input_ids), output_hidden_states=True, logits_to_keep=1
        ).hidden_states[-1]
        return [Embedding(own[first:length]) for own, length in zip(states, lengths, strict=True)]

    def _controlnet_mismatch(self, config: Any) -> str | None:
        return "this version runs Qwen-Image without ControlNets"

    def _guidance_of(self, request: GenerationRequest) -> float:
        # The other guidance of its pipeline, which has that name too, no published checkpoint reads.
        return request.guidance_scale if request.true_cfg_scale is None else request.true_cfg_scale

    def _predict(
        self, latents: torch.Tensor, times: torch.Tensor, rows: Sequence[Lane], embeddings: Sequence[Embedding]
    ) -> torch.Tensor:
        lengths = [len(embedding.tokens) for embedding in embeddings]
        mask = None
        if len(set(lengths)) > 1:
            mask = self._uploaded(torch.arange(max(lengths)) < torch.tensor(lengths)[:, None])
        height, width = latents.shape[1:3]
        prediction: torch.Tensor = self._pipeline.transformer(
            latents.flatten(1, 2),
            pad_sequence([embedding.tokens for embedding in embeddings], batch_first=True),
            mask,
            times.to(latents.dtype) / TRAIN_TIMESTEPS,
            img_shapes=[[(1, height, width)]] * len(rows),
            return_dict=False,
        )[0]
        return prediction

    def _combined(self, negative: torch.Tensor, positive: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Guide, and give each token's prediction the length that the prompt's own has."""
        guided = super()._combined(negative, positive, scales)
        lengths = [torch.linalg.vector_norm(one, dim=-1, keepdim=True) for one in (positive, guided)]
        rescaled: torch.Tensor = guided * (lengths[0] / lengths[1])
        return rescaled
