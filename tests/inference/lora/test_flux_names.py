"""FLUX.1's adapters: every writer's names change the weights as the same weights by diffusers' names do."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch

from inference.lora.adapter import check_fits, read_adapter
from inference.lora.errors import AdapterError, AdapterIncompatible, AdapterInvalid, AdapterUnsupported
from inference.lora.names.key_names import FLUX, STABLE_DIFFUSION, Z_IMAGE
from tests.support.long import long_but
from tests.support.models.adapter_changes import Changes, assert_same_changes, changes_by_peft, changes_of
from tests.support.models.flux_adapters import (
    FLUX_EVERY_LAYER,
    Pairs,
    by_diffusers_names,
    published_layers,
    random_pairs,
    write_pairs,
    xlabs_layers,
)
from tests.support.models.tiny_flux import build_tiny_flux
from tests.support.models.tiny_models import build_tiny_sd, load_pipe, write_adapter

# PEFT's, about patterns and exclusions that only some of a pipeline's models have a layer for.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:peft.*", "ignore::UserWarning:peft.*")

RANK = 4
LORA_A, LORA_DOWN, DOWN = ("lora_A", "lora_B"), ("lora_down", "lora_up"), ("down", "up")
T5_LAYER = "encoder.block.0.layer.0.SelfAttention.q"
# OneTrainer numbers the parts of fused layers.
PARTS = {
    "attn.to_q": "img_attn.qkv.0",
    "attn.to_k": "img_attn.qkv.1",
    "attn.to_v": "img_attn.qkv.2",
    "attn.add_q_proj": "txt_attn.qkv.0",
    "attn.add_k_proj": "txt_attn.qkv.1",
    "attn.add_v_proj": "txt_attn.qkv.2",
}
SINGLE_PARTS = {
    "attn.to_q": "linear1.0",
    "attn.to_k": "linear1.1",
    "attn.to_v": "linear1.2",
    "proj_mlp": "linear1.3",
}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_pipe(build_tiny_flux(tmp_path_factory.mktemp("flux")))


def models_of(pipe: Any) -> dict[str, torch.nn.Module]:
    return {name: getattr(pipe, name) for name in FLUX.models}


def ours(pipe: Any, path: Path) -> Changes:
    """Return each layer's change of weight, by the layer's name."""
    adapter = read_adapter(path, None, FLUX)
    check_fits(adapter, models_of(pipe))
    return changes_of(adapter)


def theirs(pipe: Any, path: Path) -> Changes:
    """Return the same from diffusers."""
    adapted = copy.deepcopy(pipe)
    adapted.load_lora_weights(path.parent, weight_name=path.name, local_files_only=True)
    return changes_by_peft(models_of(adapted))


def kohya(name: str) -> str:
    return f"lora_unet_{name.replace('.', '_')}"


def comfy(name: str) -> str:
    return f"diffusion_model.{name}"


def bare(name: str) -> str:
    return name


def toolkit(name: str) -> str:
    return f"transformer.{name}"


def one_trainer(name: str) -> str:
    return f"lora_transformer_{name.replace('.', '_')}"


class Form(NamedTuple):
    """A writer's names: of its stems, its halves, its alpha, and whether it splits what the published code fuses."""

    stem: Callable[[str], str]
    halves: tuple[str, str]
    alpha: float | None
    is_split: bool = False


FORMS = {
    "kohya": Form(kohya, LORA_DOWN, 2.0),
    "kohya without alphas": Form(kohya, LORA_DOWN, None),
    "ComfyUI": Form(comfy, LORA_DOWN, 2.0),
    "ComfyUI, A and B": Form(comfy, LORA_A, None),
    "published": Form(bare, LORA_A, None),
    "ai-toolkit": Form(toolkit, LORA_A, None, is_split=True),
    "diffusers' names with alphas": Form(toolkit, LORA_DOWN, 2.0, is_split=True),
    "OneTrainer": Form(one_trainer, LORA_DOWN, 2.0, is_split=True),
    "ComfyUI of diffusers' names": Form(comfy, LORA_A, None, is_split=True),
}


@pytest.mark.parametrize("name", long_but(FORMS, "kohya", "ComfyUI, A and B", "ai-toolkit", "OneTrainer"))
def test_names_of_every_writer_mean_the_layers_that_diffusers_names(name: str, pipe: Any, tmp_path: Path) -> None:
    form, layers = FORMS[name], published_layers(pipe.transformer)
    fused = random_pairs(pipe.transformer, layers, rank=RANK, seed=1)
    scale = 1.0 if form.alpha is None else form.alpha / RANK
    split = by_diffusers_names(pipe.transformer, layers, fused)
    path = write_pairs(tmp_path / "a.safetensors", split if form.is_split else fused, *form[:3])
    scaled = by_diffusers_names(pipe.transformer, layers, fused, scale=scale)
    plain = write_pairs(tmp_path / "plain.safetensors", scaled, toolkit, LORA_A)

    changes = ours(pipe, path)

    assert_same_changes(changes, theirs(pipe, plain))
    linears = [layer for layer, one in pipe.transformer.named_modules() if isinstance(one, torch.nn.Linear)]
    assert changes.keys() == {f"transformer.{layer}" for layer in linears}


def of_attention(pairs: Pairs) -> Pairs:
    return {name: pair for name, pair in pairs.items() if ".attn." in name}


# diffusers splits a single block's first layer at the widths of the published model alone, and has no prefix for what
# lies outside the blocks.
def in_blocks(pairs: Pairs) -> Pairs:
    return {name: pair for name, pair in pairs.items() if "_blocks." in name and not name.endswith("linear1")}


@pytest.mark.parametrize("name", ["kohya", "ComfyUI", "OneTrainer"])
def test_names_that_diffusers_converts_mean_the_same_to_it(name: str, pipe: Any, tmp_path: Path) -> None:
    form, layers = FORMS[name], published_layers(pipe.transformer)
    pairs = random_pairs(pipe.transformer, layers, rank=RANK, seed=2)
    chosen = of_attention(by_diffusers_names(pipe.transformer, layers, pairs)) if form.is_split else in_blocks(pairs)
    path = write_pairs(tmp_path / "a.safetensors", chosen, *form[:3])

    assert_same_changes(ours(pipe, path), theirs(pipe, path))


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_x_labs_names_are_read_as_diffusers_reads_them(prefix: str, pipe: Any, tmp_path: Path) -> None:
    pairs = random_pairs(pipe.transformer, xlabs_layers(pipe.transformer), rank=RANK, seed=3)
    path = write_pairs(tmp_path / "a.safetensors", pairs, lambda name: prefix + name, DOWN)

    changes = ours(pipe, path)

    assert_same_changes(changes, theirs(pipe, path))
    assert len(changes) == 2 * 8 + 2 * 4


def test_numbered_parts_of_fused_layers_are_their_layers() -> None:
    names = {
        **{f"transformer.double_blocks.1.{part}": f"transformer.transformer_blocks.1.{n}" for n, part in PARTS.items()},
        **{
            f"transformer.single_blocks.1.{part}": f"transformer.single_transformer_blocks.1.{n}"
            for n, part in SINGLE_PARTS.items()
        },
        "transformer.img_in.proj": "transformer.x_embedder",
        "clip_l.text_model.encoder.layers.0.mlp.fc1": "text_encoder.encoder.layers.0.mlp.fc1",
    }

    assert FLUX.layer_names(list(names)) == names


def test_layout_of_diffusers_with_the_text_encoder_changes_what_diffusers_changes(pipe: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_adapter(path, pipe, layout="diffusers_new", targets=FLUX_EVERY_LAYER, text_encoder=True, alpha=2)

    changes = ours(pipe, path)

    assert_same_changes(changes, theirs(pipe, path))
    assert any(name.startswith("text_encoder.") for name in changes)


@pytest.mark.parametrize("prefix", ["lora_te1_text_model_", "lora_te_text_model_"])
def test_kohya_s_names_of_clip_are_read_as_diffusers_reads_them(prefix: str, pipe: Any, tmp_path: Path) -> None:
    layers = {
        name: (name,)
        for name, one in pipe.text_encoder.named_modules()
        if name.startswith("encoder.") and isinstance(one, torch.nn.Linear)
    }
    pairs = random_pairs(pipe.text_encoder, layers, rank=RANK, seed=5)
    path = write_pairs(
        tmp_path / "a.safetensors", pairs, lambda name: prefix + name.replace(".", "_"), LORA_DOWN, alpha=2.0
    )

    assert_same_changes(ours(pipe, path), theirs(pipe, path))


def test_every_layer_is_found_by_its_name_in_underscores(pipe: Any) -> None:
    prefixes = {"transformer": "lora_transformer_", "text_encoder": "lora_te1_text_model_"}
    stems = {
        prefixes[model] + name.replace(".", "_"): f"{model}.{name}"
        for model, root in models_of(pipe).items()
        for name, module in root.named_modules()
        if isinstance(module, torch.nn.Linear)
    }

    assert FLUX.layer_names(list(stems)) == stems


@pytest.mark.parametrize(
    "stem",
    [
        f"text_encoders.t5xxl.transformer.{T5_LAYER}",
        f"text_encoder_2.{T5_LAYER}",
        f"t5.{T5_LAYER}",
        f"lora_te2_{T5_LAYER.replace('.', '_')}",
        f"lora_te3_{T5_LAYER.replace('.', '_')}",
    ],
)
def test_layers_of_t5_are_refused_as_such(stem: str, tmp_path: Path) -> None:
    assert refusal_of({stem: (64, 32)}, tmp_path) == (AdapterUnsupported, "layers of T5")


@pytest.mark.parametrize(
    "stem",
    [
        "lora_unet_down_blocks_0_attentions_0_proj_in",
        "lora_unet_layers_0_attention_to_q",
        "unet.mid_block.attentions.0.proj_in",
        "text_encoder_2.text_model.encoder.layers.0.mlp.fc1",
    ],
)
def test_layers_of_another_family_are_refused_by_their_names(stem: str, tmp_path: Path) -> None:
    assert refusal_of({stem: (64, 32)}, tmp_path) == (AdapterIncompatible, "another model")


@pytest.mark.parametrize("naming", [STABLE_DIFFUSION, Z_IMAGE])
def test_another_family_refuses_its_layers(naming: Any, pipe: Any, tmp_path: Path) -> None:
    pairs = random_pairs(pipe.transformer, published_layers(pipe.transformer), rank=RANK, seed=4)
    path = write_pairs(tmp_path / "a.safetensors", pairs, kohya, LORA_DOWN, 2.0)

    with pytest.raises(AdapterIncompatible, match="another model"):
        read_adapter(path, None, naming)


def test_an_adapter_of_stable_diffusion_is_refused(tmp_path: Path) -> None:
    sd = load_pipe(build_tiny_sd(tmp_path / "sd"))
    path = write_adapter(tmp_path / "a.safetensors", sd, layout="kohya", text_encoder=True)

    with pytest.raises(AdapterIncompatible, match="another model"):
        read_adapter(path, None, FLUX)


def test_a_fused_layer_whose_rows_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    assert refusal_of({"lora_unet_single_blocks_0_linear1": (64, 450)}, tmp_path) == (AdapterInvalid, "cannot be")


def test_a_control_adapter_is_refused_by_its_norms(tmp_path: Path) -> None:
    pairs = {"double_blocks.0.img_attn.proj": (torch.ones(2, 64), torch.ones(64, 2))}
    path = write_pairs(tmp_path / "a.safetensors", pairs, bare, LORA_A)
    tensors = safetensors.torch.load_file(path) | {"double_blocks.0.img_attn.norm.query_norm.scale": torch.ones(16)}
    safetensors.torch.save_file(tensors, path)

    with pytest.raises(AdapterUnsupported, match="unknown kind"):
        read_adapter(path, None, FLUX)


def refusal_of(shapes: dict[str, tuple[int, int]], folder: Path) -> tuple[type[AdapterError], str]:
    """Return the error of an adapter of these layers, by inputs and outputs, and the words of it that say why."""
    pairs = {stem: (torch.ones(2, fan_in), torch.ones(fan_out, 2)) for stem, (fan_in, fan_out) in shapes.items()}
    path = write_pairs(folder / "a.safetensors", pairs, bare, LORA_DOWN)
    with pytest.raises(AdapterError) as failure:
        read_adapter(path, None, FLUX)
    words = ("layers of T5", "another model", "cannot be")
    return type(failure.value), next(one for one in words if one in str(failure.value))
