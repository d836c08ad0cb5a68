"""Tiny random Stable Diffusion 1.x checkpoints and strong random adapters, made in seconds by the real libraries."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import peft
import safetensors.torch
import tokenizers
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

Layout = Literal["diffusers_old", "diffusers_new", "peft_folder", "kohya"]

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
# Every kind of layer that adapters are trained on: attention, feed-forward, 1x1 and 3x3 convolutions, time embedding.
EVERY_LAYER = (*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2", "time_emb_proj")
TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")

PIXELS = 64
HIDDEN = 32
MAX_TOKENS = 77


def build_tiny_sd(folder: Path, *, seed: int = 0) -> Path:
    """Writes a Stable Diffusion 1.x checkpoint of random weights, native 64x64 px, and returns `folder`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = byte_tokenizer()
        pipe = StableDiffusionPipeline(
            unet=_unet(),
            text_encoder=_text_encoder(tokenizer),
            tokenizer=tokenizer,
            vae=_vae(),
            # As in Stable Diffusion 1.5's own scheduler_config.json.
            scheduler=PNDMScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.save_pretrained(folder)
    return folder


def _unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=PIXELS // 8,
        block_out_channels=(HIDDEN, 64, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=HIDDEN,
        attention_head_dim=2,
        norm_num_groups=8,
    )


def _text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=HIDDEN,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def byte_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level tokenizer without any merges but one: a token a byte."""
    characters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = [*characters, *(f"{character}</w>" for character in characters), "th", "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[("t", "h")], model_max_length=MAX_TOKENS)


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=PIXELS,
    )


def load_pipe(folder: Path) -> StableDiffusionPipeline:
    """The checkpoint as plain diffusers loads it: 32 bits, on the CPU, without a progress bar."""
    pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write_adapter(
    path: Path,
    pipe: StableDiffusionPipeline,
    *,
    layout: Layout,
    rank: int = 4,
    alpha: float | None = None,
    seed: int = 0,
    targets: tuple[str, ...] = ATTENTION,
    text_encoder: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    use_rslora: bool = False,
    strength: float = 1.0,
) -> Path:
    """Writes a random adapter for the pipeline's UNet, and text encoder if asked, and returns `path`.

    A file, or for "peft_folder" a folder of adapter_config.json and adapter_model.safetensors. At strength 1 it changes
    weights by about as much as they are. `alpha` (default: the rank), patterns and rank-stabilising go where the layout
    keeps them; "diffusers_old" keeps none of them and must be written at its defaults.
    """
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        target_modules=[*targets, *(TEXT_LAYERS if text_encoder else ())],
        rank_pattern=dict(rank_pattern or {}),
        alpha_pattern=dict(alpha_pattern or {}),
        use_rslora=use_rslora,
    )
    models = {"unet": pipe.unet} | ({"text_encoder": pipe.text_encoder} if text_encoder else {})
    if layout == "peft_folder":
        # A folder holds one model: the UNet alone, as training scripts write it, or one made of both.
        trained = torch.nn.ModuleDict(models) if text_encoder else pipe.unet
        _randomised(trained, config, seed=seed, strength=strength).save_pretrained(path)
        return path

    adapted = {name: _randomised(model, config, seed=seed, strength=strength) for name, model in models.items()}
    if layout == "diffusers_new":
        _save_by_diffusers(path, adapted, config)
    elif layout == "kohya":
        safetensors.torch.save_file(_kohya(adapted), path)
    else:
        safetensors.torch.save_file(_diffusers_old(adapted), path)
    return path


def _randomised(model: torch.nn.Module, config: peft.LoraConfig, *, seed: int, strength: float) -> peft.PeftModel:
    adapted = peft.get_peft_model(copy.deepcopy(model), copy.deepcopy(config))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_A" in name:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5, generator=generator)
        elif "lora_B" in name:
            torch.nn.init.normal_(parameter, std=strength * parameter.shape[1] ** -0.5, generator=generator)
    return adapted


def _weights(adapted: peft.PeftModel) -> dict[str, torch.Tensor]:
    """The adapter's weights by PEFT's names within the model: "down_blocks.0….lora_A.weight"."""
    state = peft.get_peft_model_state_dict(adapted)
    return {name.removeprefix("base_model.model."): weight.contiguous() for name, weight in state.items()}


def _save_by_diffusers(path: Path, adapted: Mapping[str, peft.PeftModel], config: peft.LoraConfig) -> None:
    settings: dict[str, Any] = config.to_dict() | {"peft_type": "LORA"}
    layers = {f"{name}_lora_layers": _weights(model) for name, model in adapted.items()}
    metadata = {f"{name}_lora_adapter_metadata": settings for name in adapted}
    StableDiffusionPipeline.save_lora_weights(path.parent, weight_name=path.name, **layers, **metadata)


def _diffusers_old(adapted: Mapping[str, peft.PeftModel]) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for model, adapter in adapted.items():
        for name, weight in convert_state_dict_to_diffusers(_weights(adapter)).items():
            old = name.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up.")
            if model == "text_encoder":
                old = "text_model." + old.replace(".lora.", ".lora_linear_layer.")
            state[f"{model}.{old}"] = weight
    return state


def _kohya(adapted: Mapping[str, peft.PeftModel]) -> dict[str, torch.Tensor]:
    """As kohya's scripts name things, each layer with the alpha that PEFT scales it by."""
    state: dict[str, torch.Tensor] = {}
    for model, adapter in adapted.items():
        inner = "text_encoder.text_model" if model == "text_encoder" else model
        state |= convert_state_dict_to_kohya({f"{inner}.{name}": w for name, w in _weights(adapter).items()})
        for name, module in adapter.base_model.model.named_modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                layer = f"{inner}.{name}".replace("text_encoder", "lora_te").replace("unet", "lora_unet")
                state[f"{layer.replace('.', '_')}.alpha"] = torch.tensor(float(module.lora_alpha["default"]))
    return {name.replace("lora_te1_", "lora_te_"): weight for name, weight in state.items()}
