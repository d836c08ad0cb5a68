"""Adapters as other programs write them: read exactly, whatever names, shapes and types they have, or refused by name.

What each layer is changed by is computed by hand: plain diffusers reads few of these.
"""

import itertools
import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from inference.lora.adapter import check_fits, read_adapter
from inference.lora.bank import AdapterBank
from inference.lora.errors import AdapterError, AdapterIncompatible, AdapterInvalid, AdapterUnsupported
from inference.lora.names.key_names import STABLE_DIFFUSION, Z_IMAGE, KeyNaming, sdxl
from inference.lora.tensor_names import OTHER_METHODS
from tests.support.models.tiny_models import (
    build_tiny_sd,
    build_tiny_sd2,
    build_tiny_sdxl,
    build_tiny_z_image,
    load_pipe,
)

Tensors = dict[str, torch.Tensor]
RANK = 4
BUILDERS = {"sd": build_tiny_sd, "sd2": build_tiny_sd2, "sdxl": build_tiny_sdxl, "z": build_tiny_z_image}
DOWN_UP, A_B = ("lora_down.weight", "lora_up.weight"), ("lora_A.weight", "lora_B.weight")

SD_Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
SD_FC = "text_encoder.encoder.layers.0.mlp.fc1"
XL_Q = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
XL_FC = "text_encoder_2.text_model.encoder.layers.0.mlp.fc1"
Z_Q = "transformer.layers.0.attention.to_q"


class Model:
    """A tiny checkpoint of a family, and the dialect of its adapters."""

    def __init__(self, family: str, folder: Path) -> None:
        self.pipe: Any = load_pipe(BUILDERS[family](folder))
        self.naming: KeyNaming = {"sd": STABLE_DIFFUSION, "sd2": STABLE_DIFFUSION, "z": Z_IMAGE}.get(family) or sdxl(
            self.pipe.unet.config.layers_per_block
        )
        self.roots = {name: getattr(self.pipe, name) for name in self.naming.models}
        self.modules = {
            f"{root}.{name}": one for root, model in self.roots.items() for name, one in model.named_modules()
        }

    def pair(self, layer: str, *, rank: int = RANK) -> tuple[torch.Tensor, torch.Tensor]:
        """Make random A and B for the layer, in its own shape."""
        weight: Any = self.modules[layer].weight
        ones = [1, 1] if weight.ndim == 4 else []
        return torch.randn(rank, *weight.shape[1:]), torch.randn(weight.shape[0], rank, *ones)

    def changes(self, path: Path) -> Tensors:
        """Return each layer's change of weight, as a matrix, once the adapter is read, fits and is packed."""
        adapter = read_adapter(path, None, self.naming)
        check_fits(adapter, self.roots)
        AdapterBank(self.roots, device=torch.device("cpu"), dtype=torch.float32).pack(adapter)
        return {name: delta(layer.a, layer.b) for name, layer in adapter.layers.items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    return {family: Model(family, tmp_path_factory.mktemp(family)) for family in BUILDERS}


def delta(a: torch.Tensor, b: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    return scale * b.float().flatten(1) @ a.float().flatten(1)


def named(stem: str, pair: tuple[torch.Tensor, torch.Tensor], halves: tuple[str, str] = DOWN_UP) -> Tensors:
    return {f"{stem}.{half}": weight for half, weight in zip(halves, pair, strict=True)}


def save(folder: Path, tensors: Tensors) -> Path:
    path = folder / "adapter.safetensors"
    safetensors.torch.save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)
    return path


def assert_changes(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, change in expected.items():
        torch.testing.assert_close(found[name], change, rtol=1e-5, atol=1e-5)


def refusal(path: Path, naming: KeyNaming) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        read_adapter(path, None, naming)
    return caught.value


# --- names ------------------------------------------------------------------------------------------------------------

# The family, what a writer calls a layer and its halves, and the layer.
NAMES: dict[str, tuple[str, str, tuple[str, str], str]] = {
    "ComfyUI, SD 1": ("sd", "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q", A_B, SD_Q),
    "kohya's SGM blocks, SD 1": ("sd", "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q", DOWN_UP, SD_Q),
    "SGM's last blocks, SD 1": (
        "sd",
        "lora_unet_middle_block_2_out_layers_3",
        DOWN_UP,
        "unet.mid_block.resnets.1.conv2",
    ),
    "a UNet inside a PEFT model": ("sd", f"unet.base_model.model.{SD_Q[5:]}", A_B, SD_Q),
    "a compiled UNet": ("sd", f"unet._orig_mod.{SD_Q[5:]}", A_B, SD_Q),
    "ComfyUI's processors": ("sd", SD_Q.replace("attn1.", "attn1.processor."), A_B, SD_Q),
    "an output without its number": (
        *("sd", "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out", A_B),
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",
    ),
    "SimpleTuner": ("sd", f"lycoris_{SD_Q[5:].replace('.', '_')}", DOWN_UP, SD_Q),
    "ComfyUI's encoder": ("sd", "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1", DOWN_UP, SD_FC),
    "OMI's UNet": ("sdxl", "unet.input_blocks.4.1.transformer_blocks.0.attn1.to_q", DOWN_UP, XL_Q),
    "OMI's second encoder": ("sdxl", "clip_g.text_model.encoder.layers.0.mlp.fc1", DOWN_UP, XL_FC),
    "ComfyUI's second encoder": (
        *("sdxl", "text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc1", DOWN_UP, XL_FC),
    ),
    "a checkpoint's prefix": (
        *("sdxl", "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q", A_B, XL_Q),
    ),
    "SGM's way down": ("sdxl", "unet.input_blocks.3.0.op", DOWN_UP, "unet.down_blocks.0.downsamplers.0.conv"),
    "SGM's way up": ("sdxl", "unet.output_blocks.2.2.conv", DOWN_UP, "unet.up_blocks.0.upsamplers.0.conv"),
    "a projection of the second encoder": (
        "sdxl",
        "lora_te2_text_projection",
        DOWN_UP,
        "text_encoder_2.text_projection",
    ),
    "VideoX-Fun": ("z", "lora_unet__layers_0_attention_to_q", DOWN_UP, Z_Q),
    "OneTrainer": ("z", "lora_transformer_layers_0_attention_to_q", DOWN_UP, Z_Q),
    "two underscores": ("z", "lora_transformer__layers_0_attention_to_q", DOWN_UP, Z_Q),
    "a checkpoint's prefix, Z-Image": ("z", "model.diffusion_model.layers.0.attention.to_q", A_B, Z_Q),
    "two prefixes": ("z", "transformer.diffusion_model.layers.0.attention.to_q", A_B, Z_Q),
    "DiffSynth": ("z", "pipe.dit.layers.0.attention.to_q", A_B, Z_Q),
    "a wrapped layer": ("z", "layers.0.attention.to_q", ("lora.lora_A.weight", "lora.lora_B.weight"), Z_Q),
    "lower case": (
        *("z", "diffusion_model.layers.0.adaln_modulation.0", A_B, "transformer.layers.0.adaLN_modulation.0"),
    ),
    **{
        f"PEFT's adapter called {name}": (family, stem, (f"lora_A.{name}.weight", f"lora_B.{name}.weight"), layer)
        for name in ("my_style", "default_0", "Style-1", "v 2", "서울")
        for family, stem, layer in (("sd", SD_Q, SD_Q), ("z", f"diffusion_model.{Z_Q[12:]}", Z_Q))
    },
}


@pytest.mark.parametrize("name", NAMES)
def test_layer_is_found_by_the_name_that_another_program_gives_it(
    name: str, models: dict[str, Model], tmp_path: Path
) -> None:
    family, stem, halves, layer = NAMES[name]
    pair = models[family].pair(layer)
    assert_changes(models[family].changes(save(tmp_path, named(stem, pair, halves))), {layer: delta(*pair)})


def sgm_names(model: Model) -> dict[str, str]:
    """Yield every layer of the UNet by its place in the published code's rows of blocks, and diffusers' name."""
    config = model.pipe.unet.config
    row = config.layers_per_block + 1
    resnet = {"conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "conv2": "out_layers.3"}
    names = {}
    for name in (layer[5:] for layer in model.modules if layer.startswith("unet.")):
        parts = name.split(".")
        if len(parts) < 4 or not isinstance(model.modules[f"unet.{name}"], torch.nn.Linear | torch.nn.Conv2d):
            continue
        rest = ".".join(parts[4:])
        rest = resnet.get(rest, rest.replace("conv_shortcut", "skip_connection"))
        match parts[0], parts[2]:
            case "down_blocks", "downsamplers":
                place = f"input_blocks.{(int(parts[1]) + 1) * row}.0.op"
            case "down_blocks", kind:
                place = f"input_blocks.{int(parts[1]) * row + int(parts[3]) + 1}.{int(kind == 'attentions')}.{rest}"
            case "up_blocks", "upsamplers":
                has_attention = any(one.startswith(f"unet.up_blocks.{parts[1]}.attentions.") for one in model.modules)
                place = f"output_blocks.{(int(parts[1]) + 1) * row - 1}.{1 + has_attention}.conv"
            case "up_blocks", kind:
                place = f"output_blocks.{int(parts[1]) * row + int(parts[3])}.{int(kind == 'attentions')}.{rest}"
            case _:
                continue
        names[place] = f"unet.{name}"
    return names


def test_every_layer_of_a_block_has_its_place_in_the_published_codes_rows(models: dict[str, Model]) -> None:
    model = models["sdxl"]
    names = sgm_names(model)
    assert len(names) > 100
    for spelling in ("unet.{}", "diffusion_model.{}", "lora_unet_{}"):
        stems = {
            spelling.format(place if spelling.endswith(".{}") else place.replace(".", "_")): layer
            for place, layer in names.items()
        }
        assert model.naming.layer_names(list(stems)) == stems


# --- shapes and types -------------------------------------------------------------------------------------------------

PROJ_IN = "unet.down_blocks.0.attentions.0.proj_in"
SHAPES = {
    "a matrix for a convolution of one pixel": ("sd", PROJ_IN, "flat", "flat"),
    "a matrix whose up weight has a kernel": ("sd", PROJ_IN, "flat", "kernel"),
    "a convolution for a Linear": ("sd2", PROJ_IN, "kernel", "kernel"),
    "a convolution for an attention": ("sd", SD_Q, "kernel", "kernel"),
    "a convolution for Z-Image": ("z", Z_Q, "kernel", "kernel"),
}


def shaped(weight: torch.Tensor, how: str) -> torch.Tensor:
    return weight.flatten(1) if how == "flat" else weight.flatten(1)[..., None, None]


@pytest.mark.parametrize("name", SHAPES)
def test_same_matrix_in_another_shape_is_applied(name: str, models: dict[str, Model], tmp_path: Path) -> None:
    family, layer, down, up = SHAPES[name]
    a, b = models[family].pair(layer)
    path = save(tmp_path, named(layer, (shaped(a, down), shaped(b, up)), A_B))
    assert_changes(models[family].changes(path), {layer: delta(a, b)})


@pytest.mark.parametrize("shape", [(RANK, 32, 3, 3), (RANK, 288), (RANK, 1, 32)])
def test_kernel_is_refused_for_a_linear_layer(shape: tuple[int, ...], models: dict[str, Model], tmp_path: Path) -> None:
    path = save(tmp_path, named(SD_Q, (torch.ones(shape), torch.ones(32, RANK, *[1] * (len(shape) - 2))), A_B))
    with pytest.raises((AdapterIncompatible, AdapterInvalid)):
        models["sd"].changes(path)


@pytest.mark.parametrize("up", [torch.float32, torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("down", [torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_weights_of_any_floating_type_are_read(
    down: torch.dtype, up: torch.dtype, models: dict[str, Model], tmp_path: Path
) -> None:
    a, b = models["sd"].pair(SD_Q)
    a, b = a.to(down), b.to(up)
    assert_changes(models["sd"].changes(save(tmp_path, named(SD_Q, (a, b)))), {SD_Q: delta(a, b)})


NUMBERS = [torch.tensor(2, dtype=kind) for kind in (torch.int8, torch.uint8, torch.int16, torch.int64, torch.float64)]


@pytest.mark.parametrize(
    "alpha", [*NUMBERS, torch.tensor([2.0]), torch.tensor([[2]]), torch.tensor(2.0).to(torch.float8_e4m3fn)]
)
def test_alpha_of_any_type_scales_its_layer(alpha: torch.Tensor, models: dict[str, Model], tmp_path: Path) -> None:
    pair = models["sd"].pair(SD_Q)
    path = save(tmp_path, named(SD_Q, pair) | {f"{SD_Q}.alpha": alpha})
    assert_changes(models["sd"].changes(path), {SD_Q: delta(*pair, 2 / RANK)})


def test_scalar_of_an_early_locon_scales_its_layer_beside_the_alpha(models: dict[str, Model], tmp_path: Path) -> None:
    pair = models["sd"].pair(SD_Q)
    tensors = named(SD_Q, pair) | {f"{SD_Q}.alpha": torch.tensor(2.0), f"{SD_Q}.scalar": torch.tensor(0.5)}
    assert_changes(models["sd"].changes(save(tmp_path, tensors)), {SD_Q: delta(*pair, 1 / RANK)})


def test_layers_that_change_nothing_are_left_out(models: dict[str, Model], tmp_path: Path) -> None:
    # Given what tools leave that take layers out of an adapter or make it smaller: an alpha, and weights of rank 0
    other, pair = SD_Q.replace("to_q", "to_k"), models["sd"].pair(SD_Q)
    a, b = models["sd"].pair(other, rank=0)
    alphas = {f"{other}.alpha": torch.tensor(4.0), "unet.conv_in.alpha": torch.tensor(4.0)}
    assert_changes(
        models["sd"].changes(save(tmp_path, named(SD_Q, pair) | named(other, (a, b)) | alphas)), {SD_Q: delta(*pair)}
    )


def test_adapter_of_rank_0_alone_holds_nothing(models: dict[str, Model], tmp_path: Path) -> None:
    error = refusal(save(tmp_path, named(SD_Q, models["sd"].pair(SD_Q, rank=0))), STABLE_DIFFUSION)
    assert type(error) is AdapterInvalid
    assert "rank 0" in str(error)


# --- refusals ---------------------------------------------------------------------------------------------------------


def header_alone(folder: Path, names: Iterable[str]) -> Path:
    """Write a file of these names whose tensors are empty, so that any refusal is of the names."""
    header = json.dumps({name: {"dtype": "I8", "shape": [0], "data_offsets": [0, 0]} for name in names}).encode()
    path = folder / "adapter.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    return path


# As many as a method of five tensors a layer has on SDXL's UNet and both of its encoders.
SDXL_STEMS = [f"lora_unet_input_blocks_{block}_1_transformer_blocks_{i}_{part}" for block, i, part in
              itertools.product((4, 5, 7, 8), range(10), range(27))]  # fmt: skip
WHOLE_SDXL = {
    "LoHa": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"),
    "LoKr": ("lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "alpha"),
    "DoRA": ("lora_down.weight", "lora_up.weight", "dora_scale", "alpha"),
    "OFT": ("oft_blocks", "oft_diag", "rescale", "alpha", "constraint"),
    "GLoRA": ("a1.weight", "a2.weight", "b1.weight", "b2.weight", "alpha"),
}


@pytest.mark.parametrize("method", WHOLE_SDXL)
def test_method_is_named_before_the_number_of_tensors(method: str, tmp_path: Path) -> None:
    names = [f"{stem}.{ending}" for stem in SDXL_STEMS for ending in WHOLE_SDXL[method]]
    assert len(names) > 4000
    error = refusal(header_alone(tmp_path, names), STABLE_DIFFUSION)
    assert type(error) is AdapterUnsupported
    assert f"has {method}: " in str(error)


FOREIGN = {
    "DoRA": "diffusion_model.layers.0.attention.to_q.magnitude",
    "DoRA of PEFT": "base_model.model.conv_in.lora_magnitude_vector.my_style.weight",
    "IA3": "lora_te_text_model_encoder_layers_0_mlp_fc2.on_input",
    "LoCon in Tucker form": "lora_unet_conv_in.lora_mid.weight",
    "AdaLoRA": "base_model.model.conv_in.lora_E.default",
    "trained norms": "lora_unet_conv_norm_out.w_norm",
    "full differences of weights": "diffusion_model.out.0.diff_b",
    "an embedding": "bundle_emb.mystyle.string_to_param.*",
    "an embedding of OneTrainer": "bundle_emb.ema yasuhara.clip_l",
    "an embedding alone": "emb_params",
    "an embedding of SDXL": "clip_g",
    "an embedding of diffusers": "<고양이>",
    "the numbered layers of an IP-Adapter": "0.to_q_lora.down.weight",
    "a control network": "lora_controlnet",
    "weights of an unknown kind": "diffusion_model.out.0.weight of mine",
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("number", [1, 5000])
def test_tensors_of_other_methods_are_refused_by_name(kind: str, number: int, tmp_path: Path) -> None:
    names = [FOREIGN[kind], *(f"x{i}.lora_A.weight" for i in range(number))]
    error = refusal(header_alone(tmp_path, names), Z_IMAGE)
    assert type(error) is AdapterUnsupported
    assert kind.partition(" of ")[0].removesuffix(" alone") in str(error)
    assert str(error).isascii()
    assert len(str(error)) < 400


def test_each_method_has_one_pattern_of_its_own() -> None:
    # The name of a method is found by the number of the group that matched.
    assert not any("(" in pattern.replace("(?:", "") for pattern in OTHER_METHODS.values())


OTHER_FAMILIES = {
    "Stable Cascade": ("lora_prior_unet_down_blocks_0_0_attention_attn_to_q", "prior"),
    "FLUX": ("lora_unet_double_blocks_0_img_attn_proj", "double_blocks"),
    "FLUX by diffusers": ("transformer.single_transformer_blocks.0.attn.to_q", "transformer"),
    "T5 by ComfyUI": ("text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q", "text_encoder_3"),
    "SDXL's second encoder by OMI": ("clip_g.text_model.encoder.layers.0.mlp.fc1", "text_encoder_2"),
    "Z-Image": ("lora_unet__layers_0_attention_to_q", "layers_0"),
}


@pytest.mark.parametrize("name", OTHER_FAMILIES)
@pytest.mark.parametrize("number", [1, 2500])
def test_another_family_is_named_before_the_number_of_tensors(name: str, number: int, tmp_path: Path) -> None:
    stem, word = OTHER_FAMILIES[name]
    names = [f"{stem}{i}.{half}" for i in range(number) for half in DOWN_UP]
    error = refusal(header_alone(tmp_path, names), STABLE_DIFFUSION)
    assert type(error) is AdapterIncompatible
    assert "another model" in str(error)
    assert word in str(error)


UNAPPLIED = {
    "lora_te1_layers_0_self_attn_q_proj": "layers of the text encoder",
    "text_encoder.model.layers.0.self_attn.q_proj": "layers of the text encoder",
    "text_encoders.qwen3_4b.transformer.model.layers.0.self_attn.q_proj": "layers of the text encoder",
    "diffusion_model.layers.0.feed_forward.w13": "w1 and w3 in one",
}


@pytest.mark.parametrize("stem", UNAPPLIED)
def test_z_image_layers_that_are_not_applied_are_no_other_models(stem: str, tmp_path: Path) -> None:
    pair = torch.ones(4, 32), torch.ones(32, 4)
    error = refusal(save(tmp_path, named(Z_Q, pair, A_B) | named(stem, pair)), Z_IMAGE)
    assert type(error) is AdapterUnsupported
    assert UNAPPLIED[stem] in str(error)


def test_several_adapters_in_one_file_are_refused(tmp_path: Path) -> None:
    pair = torch.ones(4, 32), torch.ones(32, 4)
    tensors = named(SD_Q, pair, ("lora_A.day.weight", "lora_B.day.weight"))
    tensors |= named(SD_Q.replace("to_q", "to_k"), pair, ("lora_A.night.weight", "lora_B.night.weight"))
    error = refusal(save(tmp_path, tensors), STABLE_DIFFUSION)
    assert type(error) is AdapterInvalid
    assert "several adapters: day, night" in str(error)


def test_pefts_names_are_read_without_settings_only_where_alphas_state_the_scale(
    models: dict[str, Model], tmp_path: Path
) -> None:
    pair, stem = models["z"].pair(Z_Q), f"base_model.model.{Z_Q[12:]}"
    path = save(tmp_path, named(stem, pair, A_B))
    assert "adapter_config.json" in str(refusal(path, Z_IMAGE))
    path = save(tmp_path, named(stem, pair, A_B) | {f"{stem}.alpha": torch.tensor(2.0)})
    assert_changes(models["z"].changes(path), {Z_Q: delta(*pair, 2 / RANK)})
