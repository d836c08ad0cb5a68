"""Strong random adapters for tiny checkpoints of every family, in the layouts that training scripts write."""

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import peft
import safetensors.torch
import torch
from diffusers.utils import convert_state_dict_to_diffusers

Layout = Literal["diffusers_old", "diffusers_new", "peft_folder", "kohya"]

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
# Every kind of layer that adapters are trained on: attention, feed-forward, 1x1 and 3x3 convolutions, time embedding.
EVERY_LAYER = (*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2", "time_emb_proj")
# Z-Image's blocks, as its trainers choose them, and then the layers around the blocks too. The modulation with its
# block's number: in the last layer an activation has its name.
Z_IMAGE_MODULATION = ("0.adaLN_modulation.0", "1.adaLN_modulation.0")
Z_IMAGE_BLOCKS = (*ATTENTION, "feed_forward.w1", "feed_forward.w2", "feed_forward.w3", *Z_IMAGE_MODULATION)
Z_IMAGE_EVERY_LAYER = (
    *Z_IMAGE_BLOCKS,
    "all_x_embedder.2-1",
    "cap_embedder.1",
    "t_embedder.mlp.0",
    "t_embedder.mlp.2",
    "all_final_layer.2-1.linear",
    "all_final_layer.2-1.adaLN_modulation.1",
)
SGM_LAYERS = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
    "downsamplers.0.conv": "downsamplers.0.op",
}
TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def write_adapter(
    path: Path,
    pipe: Any,
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
    """Write a random adapter for the pipeline's UNet or transformer, and text encoders if chosen, and return `path`.

    A file, or for "peft_folder" a folder of adapter_config.json and adapter_model.safetensors. At strength 1 it changes
    weights by about as much as they are. `alpha` (default: the rank), patterns and rank-stabilising go where the layout
    keeps them; "diffusers_old" keeps none of them and must be written at its defaults.
    """
    denoiser = "transformer" if hasattr(pipe, "transformer") else "unet"
    encoders = [name for name in ("text_encoder", "text_encoder_2") if text_encoder and _is_clip(pipe, name)]
    models = {name: getattr(pipe, name) for name in (denoiser, *encoders)}
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        target_modules=[*targets, *(TEXT_LAYERS if text_encoder else ())],
        rank_pattern=dict(rank_pattern or {}),
        alpha_pattern=dict(alpha_pattern or {}),
        use_rslora=use_rslora,
    )
    if layout == "peft_folder":
        # A folder holds one model: the denoiser alone, as training scripts write it, or one made of all.
        trained = torch.nn.ModuleDict(models) if text_encoder else models[denoiser]
        _randomised(trained, config, seed=seed, strength=strength).save_pretrained(path)
        return path

    adapted = {name: _randomised(model, config, seed=seed, strength=strength) for name, model in models.items()}
    if layout == "diffusers_new":
        _save_by_diffusers(path, type(pipe), adapted, config)
    elif layout == "kohya":
        is_sdxl = hasattr(pipe, "text_encoder_2")
        safetensors.torch.save_file(_kohya(adapted, is_sdxl=is_sdxl), path)
    else:
        safetensors.torch.save_file(_diffusers_old(adapted), path)
    return path


def _is_clip(pipe: Any, name: str) -> bool:
    return hasattr(pipe, name) and getattr(pipe, name).config.model_type.startswith("clip")


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
    """Make the adapter's weights by PEFT's names within the model: "down_blocks.0….lora_A.weight"."""
    state = peft.get_peft_model_state_dict(adapted)
    return {name.removeprefix("base_model.model."): weight.contiguous() for name, weight in state.items()}


def _save_by_diffusers(
    path: Path, pipeline: Any, adapted: Mapping[str, peft.PeftModel], config: peft.LoraConfig
) -> None:
    settings: dict[str, Any] = config.to_dict() | {"peft_type": "LORA"}
    layers = {f"{name}_lora_layers": _weights(model) for name, model in adapted.items()}
    metadata = {f"{name}_lora_adapter_metadata": settings for name in adapted}
    pipeline.save_lora_weights(path.parent, weight_name=path.name, **layers, **metadata)


def _diffusers_old(adapted: Mapping[str, peft.PeftModel]) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for model, adapter in adapted.items():
        for name, weight in convert_state_dict_to_diffusers(_weights(adapter)).items():
            old = name.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up.")
            if model.startswith("text_encoder"):
                old = _clip_name(old).replace(".lora.", ".lora_linear_layer.")
            state[f"{model}.{old}"] = weight
    return state


def _kohya(adapted: Mapping[str, peft.PeftModel], *, is_sdxl: bool) -> dict[str, torch.Tensor]:
    """Rename as kohya's scripts do, each layer with the alpha that PEFT scales it by."""
    state: dict[str, torch.Tensor] = {}
    for model, adapter in adapted.items():
        for name, module in adapter.base_model.model.named_modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                layer = _kohya_name(model, name, is_sdxl=is_sdxl)
                state[f"{layer}.lora_down.weight"] = module.lora_A["default"].weight.detach()
                state[f"{layer}.lora_up.weight"] = module.lora_B["default"].weight.detach()
                state[f"{layer}.alpha"] = torch.tensor(float(module.lora_alpha["default"]))
    return state


def _kohya_name(model: str, name: str, *, is_sdxl: bool) -> str:
    if model == "text_encoder":
        path = ("lora_te1." if is_sdxl else "lora_te.") + _clip_name(name)
    elif model == "text_encoder_2":
        path = "lora_te2." + _clip_name(name)
    else:
        path = "lora_unet." + (_sgm_name(name) if is_sdxl else name)
    return path.replace(".", "_")


def _clip_name(name: str) -> str:
    """Name a text encoder's layer as all the files do, whatever transformers calls it today."""
    return name if name.startswith("text_model.") else f"text_model.{name}"


def _sgm_name(name: str) -> str:
    """Name a layer of SDXL's UNet as the original code does, which kohya's scripts train."""
    for ours, theirs in SGM_LAYERS.items():
        name = name.replace(ours, theirs)
    place = re.match(r"(down_blocks|up_blocks)\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)", name)
    if place is None:
        return re.sub(r"mid_block\.(resnets\.0|attentions\.0|resnets\.1)", _sgm_middle, name)
    side, block, kind, index = place[1], int(place[2]), place[3], int(place[4])
    position = 2 if kind.endswith("samplers") else index
    number = 3 * block + position + (1 if side == "down_blocks" else 0)
    inner = {"resnets": 0, "attentions": 1, "downsamplers": 0, "upsamplers": 2}[kind]
    outer = "input_blocks" if side == "down_blocks" else "output_blocks"
    return f"{outer}.{number}.{inner}{name[place.end() :]}"


def _sgm_middle(found: re.Match[str]) -> str:
    return f"middle_block.{('resnets.0', 'attentions.0', 'resnets.1').index(found[1])}"
