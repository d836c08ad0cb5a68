"""Adapters of SDXL and Z-Image: every layout changes the weights as diffusers' or PEFT's own loading does."""

import copy
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from diffusers.utils import convert_state_dict_to_kohya

from inference.lora.adapter import Adapter, check_fits, read_adapter
from inference.lora.errors import AdapterIncompatible, AdapterInvalid, AdapterUnsupported
from inference.lora.names.key_names import STABLE_DIFFUSION, Z_IMAGE, KeyNaming, sdxl
from tests.support.long import IS_LONG, long, long_but
from tests.support.models.adapter_changes import assert_same_changes, changes_by_peft, changes_of, product
from tests.support.models.tiny_adapters import Z_IMAGE_BLOCKS, Z_IMAGE_EVERY_LAYER
from tests.support.models.tiny_models import (
    build_tiny_sd,
    build_tiny_sdxl,
    build_tiny_z_image,
    load_pipe,
    write_adapter,
)

# PEFT's, about patterns and exclusions that only some of a pipeline's models have a layer for.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:peft.*", "ignore::UserWarning:peft.*")

Tensors = dict[str, torch.Tensor]
Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]
# A few of SDXL's layers of every kind, for speed.
SDXL_LAYERS = (
    *("to_q", "to_out.0", "ff.net.2", "proj_in", "conv1", "conv2", "time_emb_proj", "conv_shortcut"),
    *("downsamplers.0.conv", "upsamplers.0.conv"),
)


@pytest.fixture(scope="module")
def sd_pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_pipe(build_tiny_sd(tmp_path_factory.mktemp("sd")))


@pytest.fixture(scope="module")
def sdxl_pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_pipe(build_tiny_sdxl(tmp_path_factory.mktemp("sdxl")))


@pytest.fixture(scope="module")
def z_pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_pipe(build_tiny_z_image(tmp_path_factory.mktemp("z")))


def dialect_of(pipe: Any) -> KeyNaming:
    if hasattr(pipe, "transformer"):
        return Z_IMAGE
    return sdxl(pipe.unet.config.layers_per_block) if hasattr(pipe, "text_encoder_2") else STABLE_DIFFUSION


def models_of(pipe: Any) -> dict[str, torch.nn.Module]:
    return {name: getattr(pipe, name) for name in dialect_of(pipe).models}


def read(pipe: Any, path: Path) -> Adapter:
    is_folder = path.is_dir()
    weights, config = path / "adapter_model.safetensors", path / "adapter_config.json"
    adapter = read_adapter(weights if is_folder else path, config if is_folder else None, dialect_of(pipe))
    check_fits(adapter, models_of(pipe))
    return adapter


def ours(pipe: Any, path: Path) -> Tensors:
    """Return each layer's change of weight, by the layer's name."""
    return changes_of(read(pipe, path))


def theirs(pipe: Any, path: Path) -> Tensors:
    """Return the same from diffusers or, for its own folders, PEFT."""
    adapted = copy.deepcopy(pipe)
    if path.is_file():
        adapted.load_lora_weights(path.parent, weight_name=path.name, local_files_only=True)
    elif "unet." in (path / "adapter_model.safetensors").read_bytes()[:100_000].decode("latin-1"):
        peft.PeftModel.from_pretrained(torch.nn.ModuleDict(models_of(adapted)), path)
    else:
        peft.PeftModel.from_pretrained(models_of(adapted)[dialect_of(pipe).models[0]], path)
    return changes_by_peft(models_of(adapted))


def save(path: Path, tensors: Tensors) -> Path:
    safetensors.torch.save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    return path


# --- what diffusers and PEFT write, and kohya's scripts -------------------------------------------------------------

SDXL_LAYOUTS: dict[str, dict[str, Any]] = {
    "old diffusers names": {"layout": "diffusers_old", "targets": ("to_q", "conv1")},
    "new diffusers names with alphas and patterns in the metadata": {
        "layout": "diffusers_new",
        "targets": ("to_q", "ff.net.2", "conv1"),
        "alpha": 2,
        "rank_pattern": {"conv1": 2, "fc1": 3},
        "alpha_pattern": {"attn2.to_q": 1, "to_q": 8, "out_proj": 6},
    },
    "PEFT folder": {"layout": "peft_folder", "alpha": 6, "text_encoder": False},
    "PEFT folder of all models": {
        "layout": "peft_folder",
        "targets": ("to_k", "conv1"),
        "alpha": 2,
        "use_rslora": True,
    },
    "kohya's SGM names with ranks and alphas of their own": {
        "layout": "kohya",
        "targets": SDXL_LAYERS,
        "alpha": 2,
        "rank_pattern": {"conv1": 2, "ff.net.2": 9, "fc2": 3},
        # Nothing of a text encoder's: where its alphas differ, diffusers takes the most frequent one for all.
        "alpha_pattern": {"conv1": 1, "ff.net.2": 3},
    },
}


@pytest.mark.parametrize(
    "made",
    [pytest.param(made, id=name, marks=long if name == "PEFT folder" else ()) for name, made in SDXL_LAYOUTS.items()],
)
def test_sdxl_layout_changes_what_the_library_changes(made: dict[str, Any], sdxl_pipe: Any, tmp_path: Path) -> None:
    path = tmp_path / ("folder" if made["layout"] == "peft_folder" else "adapter.safetensors")
    write_adapter(path, sdxl_pipe, **{"text_encoder": True} | made)
    changes = ours(sdxl_pipe, path)
    assert_same_changes(changes, theirs(sdxl_pipe, path))
    assert {name.partition(".")[0] for name in changes} == (
        {"unet"} if made.get("text_encoder") is False else {"unet", "text_encoder", "text_encoder_2"}
    )


Z_IMAGE_LAYOUTS: dict[str, dict[str, Any]] = {
    "diffusers": {"layout": "diffusers_new", "targets": Z_IMAGE_EVERY_LAYER},
    "diffusers with alphas and patterns in the metadata": {
        "layout": "diffusers_new",
        "targets": Z_IMAGE_EVERY_LAYER,
        "alpha": 2,
        "rank_pattern": {"feed_forward.w2": 2},
        "alpha_pattern": {"to_k": 8, "all_x_embedder.2-1": 3},
    },
    "PEFT folder": {"layout": "peft_folder", "targets": Z_IMAGE_EVERY_LAYER, "alpha": 6},
    "kohya": {"layout": "kohya", "targets": Z_IMAGE_BLOCKS, "alpha": 2, "rank_pattern": {"to_k": 2}},
}


@pytest.mark.parametrize("made", Z_IMAGE_LAYOUTS.values(), ids=Z_IMAGE_LAYOUTS)
def test_z_image_layout_changes_what_the_library_changes(made: dict[str, Any], z_pipe: Any, tmp_path: Path) -> None:
    path = tmp_path / ("folder" if made["layout"] == "peft_folder" else "adapter.safetensors")
    write_adapter(path, z_pipe, **made)
    assert_same_changes(ours(z_pipe, path), theirs(z_pipe, path))


# --- other writers' names for the same weights -----------------------------------------------------------------------


def pairs(pipe: Any, folder: Path, targets: tuple[str, ...]) -> Pairs:
    """Make random A and B by the layer's name within the denoiser."""
    path = write_adapter(folder / "original.safetensors", pipe, layout="diffusers_new", targets=targets)
    stored = safetensors.torch.load_file(path)
    names = [name.removesuffix(".lora_A.weight") for name in stored if name.endswith(".lora_A.weight")]
    return {
        name.partition(".")[2]: (stored[f"{name}.lora_A.weight"], stored[f"{name}.lora_B.weight"]) for name in names
    }


def written(
    layers: Pairs,
    stem: Callable[[str], str],
    halves: tuple[str, str],
    alpha: float | None,
) -> Tensors:
    tensors: Tensors = {}
    for name, (a, b) in layers.items():
        tensors |= {f"{stem(name)}.{half}.weight": weight for half, weight in zip(halves, (a, b), strict=True)}
        if alpha is not None:
            tensors[f"{stem(name)}.alpha"] = torch.tensor(alpha)
    return tensors


def kohya(name: str) -> str:
    return f"lora_unet_{name.replace('.', '_')}"


def comfy(name: str) -> str:
    return f"diffusion_model.{name}"


def bare_out(name: str) -> str:
    return name.replace(".to_out.0", ".out")


def published(name: str) -> str:
    """Name a layer outside the blocks as the code does that Z-Image was published with."""
    return name.replace("all_x_embedder.2-1", "x_embedder").replace("all_final_layer.2-1", "final_layer")


LORA_A, LORA_DOWN, DOTTED = ("lora_A", "lora_B"), ("lora_down", "lora_up"), ("lora.down", "lora.up")
# The stem's form, the halves' names, the alpha, the layers, and whether diffusers reads the file.
Z_IMAGE_FORMS: dict[str, tuple[Callable[[str], str], tuple[str, str], float | None, tuple[str, ...], bool]] = {
    "ai-toolkit": (comfy, LORA_A, None, Z_IMAGE_EVERY_LAYER, True),
    "ComfyUI, A and B with alphas": (comfy, LORA_A, 2.0, Z_IMAGE_EVERY_LAYER, True),
    "ComfyUI, down and up": (comfy, LORA_DOWN, None, Z_IMAGE_EVERY_LAYER, True),
    "ComfyUI, down and up with alphas": (comfy, LORA_DOWN, 1.0, Z_IMAGE_EVERY_LAYER, True),
    "PEFT's adapter name left in": (comfy, ("lora_A.default", "lora_B.default"), None, Z_IMAGE_BLOCKS, True),
    "PEFT's adapter name left in, with diffusers' prefix": (
        # diffusers takes the name out, but puts a second prefix in front.
        lambda name: f"transformer.{name}", ("lora_A.default", "lora_B.default"), None, Z_IMAGE_BLOCKS, False,
    ),
    "kohya": (kohya, LORA_DOWN, 2.0, Z_IMAGE_EVERY_LAYER, True),
    "kohya with dots": (kohya, DOTTED, 2.0, Z_IMAGE_BLOCKS, True),
    "attention.out": (lambda name: comfy(bare_out(name)), LORA_DOWN, 2.0, Z_IMAGE_BLOCKS, True),
    # diffusers knows this name of lora_down alone.
    "attention.out of A and B": (lambda name: comfy(bare_out(name)), LORA_A, 2.0, Z_IMAGE_BLOCKS, False),
    "kohya's attention_out": (lambda name: kohya(bare_out(name)), LORA_DOWN, 2.0, Z_IMAGE_BLOCKS, True),
    # diffusers renames these in checkpoints, but not in adapters.
    "published names": (lambda name: comfy(published(name)), LORA_A, 2.0, Z_IMAGE_EVERY_LAYER, False),
    # diffusers puts a second prefix in front.
    "diffusers' prefix with alphas": (lambda name: f"transformer.{name}", LORA_DOWN, 2.0, Z_IMAGE_EVERY_LAYER, False),
    # diffusers ignores names without a prefix.
    "no prefix": (lambda name: name, LORA_A, None, Z_IMAGE_EVERY_LAYER, False),
}  # fmt: skip


@pytest.mark.parametrize("form", Z_IMAGE_FORMS.values(), ids=Z_IMAGE_FORMS)
def test_z_image_names_of_every_writer_mean_the_same_layers(
    form: tuple[Callable[[str], str], tuple[str, str], float | None, tuple[str, ...], bool], z_pipe: Any, tmp_path: Path
) -> None:
    stem, halves, alpha, targets, is_read_by_diffusers = form
    layers = pairs(z_pipe, tmp_path, targets)
    path = save(tmp_path / "a.safetensors", written(layers, stem, halves, alpha))
    scale = 1.0 if alpha is None else alpha / 4
    expected = {f"transformer.{name}": scale * product(a, b) for name, (a, b) in layers.items()}
    assert_same_changes(ours(z_pipe, path), expected)
    if IS_LONG:
        assert matches_diffusers(z_pipe, path, expected) == is_read_by_diffusers


def fused(layers: Pairs) -> Pairs:
    """Fuse q, k and v of the layers into one: the A of q for all three, their B on top of each other."""
    one: Pairs = {}
    for name, (a, b) in layers.items():
        block, _, kind = name.rpartition(".to_")
        if kind == "q":
            one[f"{block}.qkv"] = (a, torch.cat([b, layers[f"{block}.to_k"][1], layers[f"{block}.to_v"][1]]))
        elif kind not in ("k", "v"):
            one[name] = (a, b)
    return one


def taken_apart(layers: Pairs, *, scale: float) -> Tensors:
    expected: Tensors = {}
    for name, (a, b) in layers.items():
        if name.endswith(".qkv"):
            thirds = zip("qkv", b.chunk(3), strict=True)
            expected |= {
                f"transformer.{name.removesuffix('qkv')}to_{q}": scale * product(a, part) for q, part in thirds
            }
        else:
            expected[f"transformer.{name}"] = scale * product(a, b)
    return expected


# diffusers splits the fused layer of kohya's names alone, and drops ComfyUI's.
@pytest.mark.parametrize(
    ("stem", "halves", "is_read_by_diffusers"),
    [(kohya, LORA_DOWN, True), (comfy, LORA_DOWN, False), pytest.param(comfy, LORA_A, False, marks=long)],
)
def test_fused_attention_is_three_layers_of_one_a(
    stem: Callable[[str], str], halves: tuple[str, str], is_read_by_diffusers: bool, z_pipe: Any, tmp_path: Path
) -> None:
    layers = fused(pairs(z_pipe, tmp_path, Z_IMAGE_BLOCKS))
    path = save(tmp_path / "a.safetensors", written(layers, stem, halves, 2.0))
    expected = taken_apart(layers, scale=0.5)
    assert "transformer.layers.1.attention.to_v" in expected
    assert_same_changes(ours(z_pipe, path), expected)
    assert matches_diffusers(z_pipe, path, expected) == is_read_by_diffusers


def test_fused_layers_beside_their_parts_are_copies(z_pipe: Any, tmp_path: Path) -> None:
    layers = pairs(z_pipe, tmp_path, Z_IMAGE_BLOCKS)
    copies = {bare_out(name): pair for name, pair in fused(layers).items() if name.endswith((".qkv", ".to_out.0"))}
    path = save(tmp_path / "a.safetensors", written(copies | layers, kohya, DOTTED, 2.0))
    expected = {f"transformer.{name}": 0.5 * product(a, b) for name, (a, b) in layers.items()}
    assert_same_changes(ours(z_pipe, path), expected)
    assert matches_diffusers(z_pipe, path, expected)


QKV, TO_Q = "diffusion_model.layers.0.attention.qkv", "diffusion_model.layers.0.attention.to_q"


def layer(stem: str, *, outputs: int = 63) -> Tensors:
    return {f"{stem}.lora_A.weight": torch.ones(2, 64), f"{stem}.lora_B.weight": torch.ones(outputs, 2)}


CONTRADICTIONS = {
    "q apart, and once more in qkv": layer(QKV) | layer(TO_Q),
    "a layer by two writers' names": layer(TO_Q) | layer("lora_unet_layers_0_attention_to_q"),
    "qkv that are no three layers": layer(QKV, outputs=64),
    "the adapter's name both in and out": layer(TO_Q)
    | {name.replace("weight", "default.weight"): weight for name, weight in layer(TO_Q).items()},
}


@pytest.mark.parametrize("tensors", CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_z_image_adapter_that_contradicts_itself_is_refused(tensors: Tensors, tmp_path: Path) -> None:
    with pytest.raises(AdapterInvalid):
        read_adapter(save(tmp_path / "a.safetensors", tensors), None, Z_IMAGE)


def matches_diffusers(pipe: Any, path: Path, expected: Tensors) -> bool:
    try:
        assert_same_changes(theirs(pipe, path), expected)
    except (AssertionError, KeyError, ValueError):
        return False
    return True


# --- SDXL's names -----------------------------------------------------------------------------------------------------

# Outside the blocks, by kohya's names.
OUTSIDE_BLOCKS = {
    "time_embed_0": "time_embedding.linear_1",
    "time_embed_2": "time_embedding.linear_2",
    "label_emb_0_0": "add_embedding.linear_1",
    "label_emb_0_2": "add_embedding.linear_2",
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
}


def test_sgm_names_outside_the_blocks_are_read_as_diffusers_reads_them(sdxl_pipe: Any, tmp_path: Path) -> None:
    layers = pairs(sdxl_pipe, tmp_path, tuple(OUTSIDE_BLOCKS.values()))
    assert len(layers) == len(OUTSIDE_BLOCKS)
    names = {f"lora_unet_{theirs}": layers[ours] for theirs, ours in OUTSIDE_BLOCKS.items()}
    path = save(tmp_path / "a.safetensors", written(names, str, LORA_DOWN, 2.0))
    expected = {f"unet.{name}": 0.5 * product(a, b) for name, (a, b) in layers.items()}
    assert_same_changes(ours(sdxl_pipe, path), expected)
    assert matches_diffusers(sdxl_pipe, path, expected)


def test_kohya_names_with_diffusers_blocks_are_read_as_diffusers_reads_them(sdxl_pipe: Any, tmp_path: Path) -> None:
    original = write_adapter(tmp_path / "a.safetensors", sdxl_pipe, layout="diffusers_new", text_encoder=True)
    # diffusers' own conversion counts the encoders from one by whether "text_encoder_2" is in a name.
    tensors = convert_state_dict_to_kohya(
        {
            re.sub(r"^text_encoder\.encoder", "text_encoder.text_model.encoder", name): weight
            for name, weight in safetensors.torch.load_file(original).items()
        }
    )
    assert {name.split("_")[1] for name in tensors} == {"unet", "te1", "te2"}
    path = save(tmp_path / "b.safetensors", tensors)
    changes = ours(sdxl_pipe, path)
    assert_same_changes(changes, theirs(sdxl_pipe, path))
    assert_same_changes(changes, ours(sdxl_pipe, original))


def test_comfy_names_of_sdxl_are_kohyas_with_dots(sdxl_pipe: Any, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a.safetensors", sdxl_pipe, layout="kohya", targets=("to_q", "conv1"), alpha=2)
    stored = safetensors.torch.load_file(path)
    words = re.compile(
        "input_blocks|middle_block|output_blocks|in_layers|transformer_blocks|to_q|lora_down|lora_up|(_)"
    )
    dotted = {
        "diffusion_model."
        + words.sub(lambda word: "." if word[1] else word[0], name.removeprefix("lora_unet_")): weight
        for name, weight in stored.items()
    }
    assert "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.lora_up.weight" in dotted
    assert "diffusion_model.input_blocks.1.0.in_layers.2.lora_down.weight" in dotted
    assert_same_changes(ours(sdxl_pipe, save(tmp_path / "b.safetensors", dotted)), ours(sdxl_pipe, path))


def test_each_alpha_of_a_text_encoder_counts_for_its_own_layer(sdxl_pipe: Any, tmp_path: Path) -> None:
    # diffusers takes the most frequent of them for all.
    tensors: Tensors = {}
    expected: Tensors = {}
    places = [("1", "."), ("2", "_2.text_model.")]
    for alpha, (projection, (number, level)) in enumerate(itertools.product("qk", places), 1):
        a, b = torch.randn(2, 2, 32 if number == "1" else 48).unbind()
        stem = f"lora_te{number}_text_model_encoder_layers_0_self_attn_{projection}_proj"
        tensors |= written({stem: (a, b.T.contiguous())}, str, LORA_DOWN, alpha)
        expected[f"text_encoder{level}encoder.layers.0.self_attn.{projection}_proj"] = alpha / 2 * b.T @ a
    assert_same_changes(ours(sdxl_pipe, save(tmp_path / "a.safetensors", tensors)), expected)


def test_text_encoders_are_read_with_and_without_the_level_that_transformers_dropped_from_one(sdxl_pipe: Any) -> None:
    layer = "encoder.layers.0.mlp.fc1"
    names = sdxl(sdxl_pipe.unet.config.layers_per_block).layer_names(
        [f"text_encoder.{layer}", f"text_encoder_2.{layer}", "text_encoder_2.text_projection"]
    )
    older = sdxl(sdxl_pipe.unet.config.layers_per_block).layer_names(
        [f"text_encoder.text_model.{layer}", f"text_encoder_2.text_model.{layer}"]
    )
    assert list(names.values()) == [*older.values(), "text_encoder_2.text_projection"]
    known = {f"{model}.{name}" for model, root in models_of(sdxl_pipe).items() for name, _ in root.named_modules()}
    assert known.issuperset(names.values())


@pytest.mark.parametrize("family", ["sd_pipe", "sdxl_pipe", "z_pipe"])
def test_every_layer_is_found_by_its_name_in_underscores(family: str, request: pytest.FixtureRequest) -> None:
    pipe = request.getfixturevalue(family)
    prefixes = {"text_encoder": "lora_te1_text_model_", "text_encoder_2": "lora_te2_"}
    stems = {
        prefixes.get(model, "lora_unet_") + name.replace(".", "_"): f"{model}.{name}"
        for model, root in models_of(pipe).items()
        for name, module in root.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }
    assert dialect_of(pipe).layer_names(list(stems)) == stems


def test_blocks_named_in_two_ways_are_read_where_diffusers_drops_one_of_them(sdxl_pipe: Any, tmp_path: Path) -> None:
    tensors = layer("lora_unet_input_blocks_4_1_proj_in") | layer("lora_unet_down_blocks_1_attentions_0_proj_out")
    adapter = read_adapter(save(tmp_path / "a.safetensors", tensors), None, dialect_of(sdxl_pipe))
    assert list(adapter.layers) == [f"unet.down_blocks.1.attentions.0.proj_{way}" for way in ("in", "out")]


def test_one_layer_named_in_two_ways_is_refused(sdxl_pipe: Any, tmp_path: Path) -> None:
    tensors = layer("lora_unet_input_blocks_4_1_proj_in") | layer("lora_unet_down_blocks_1_attentions_0_proj_in")
    with pytest.raises(AdapterInvalid, match="two names for one layer"):
        read_adapter(save(tmp_path / "a.safetensors", tensors), None, dialect_of(sdxl_pipe))


# --- other families and other methods --------------------------------------------------------------------------------

FAMILIES = ("sd_pipe", "sdxl_pipe", "z_pipe")
LAYOUTS = ("diffusers_old", "diffusers_new", "peft_folder", "kohya")


@pytest.mark.parametrize(
    ("family", "layout"),
    long_but(
        [(family, layout) for family in FAMILIES for layout in LAYOUTS],
        ("sd_pipe", "diffusers_old"),
        ("sdxl_pipe", "kohya"),
        ("z_pipe", "diffusers_new"),
        ("z_pipe", "peft_folder"),
    ),
)
def test_adapter_of_another_family_is_refused_as_such(
    family: str, layout: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    targets = Z_IMAGE_EVERY_LAYER if family == "z_pipe" else ("to_q", "to_out.0", "conv1")
    path = write_adapter(tmp_path / "a", request.getfixturevalue(family), layout=layout, targets=targets)
    for other in (request.getfixturevalue(name) for name in FAMILIES if name != family):
        with pytest.raises(AdapterIncompatible, match="another model"):
            read(other, path)


STRANGERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "Z-Image by ComfyUI": (TO_Q, ("sd_pipe", "sdxl_pipe")),
    "Z-Image without a prefix": ("layers.0.attention.to_q", ("sd_pipe", "sdxl_pipe")),
    "Z-Image's two time layers by kohya": ("lora_unet_t_embedder_mlp_{}", ("sd_pipe", "sdxl_pipe")),
    "the oldest of SD": ("mid_block.attentions.{}.transformer_blocks.0.attn1.processor.to_q_lora", ("z_pipe",)),
    "SD's text encoder": ("lora_te_text_model_encoder_layers_{}_mlp_fc1", ("z_pipe",)),
    "SD's text encoder by PEFT": ("text_encoder.encoder.layers.{}.mlp.fc1", ("z_pipe",)),
    "a text encoder's layer of no known kind": ("lora_te_text_model_x{}", FAMILIES),
    "SDXL's second text encoder": ("lora_te2_text_model_encoder_layers_{}_mlp_fc1", ("sd_pipe", "z_pipe")),
    "SDXL by ComfyUI": ("diffusion_model.label_emb.0.{}", ("sd_pipe", "z_pipe")),
    "more blocks than SDXL has": ("lora_unet_input_blocks_1{}_1_proj_in", FAMILIES),
    "blocks within blocks that SDXL has not": ("lora_unet_output_blocks_2_{}_7_proj_in", FAMILIES),
    "blocks without numbers": ("lora_unet_output_blocks_x{}_proj_in", FAMILIES),
    "blocks where SDXL has none": ("lora_unet_time_embed_input_blocks_x{}", FAMILIES),
    "Flux": ("lora_unet_double_blocks_{}_img_attn_proj", FAMILIES),
    "Krea 2": ("lora_unet_blocks_{}_attn_wq", FAMILIES),
    "SD 3's third text encoder": ("lora_te3_encoder_block_{}_layer_0_SelfAttention_q", FAMILIES),
}


@pytest.mark.parametrize(("stem", "families"), STRANGERS.values(), ids=STRANGERS)
def test_layers_of_another_family_are_refused_as_such(
    stem: str, families: tuple[str, ...], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    halves = ("down", "up") if stem.endswith("_lora") else LORA_DOWN
    two = {stem.format(index): (torch.ones(2, 64), torch.ones(64, 2)) for index in range(2)}
    path = save(tmp_path / "a.safetensors", written(two, str, halves, 1.0))
    for family in families:
        with pytest.raises(AdapterIncompatible, match="another model"):
            read(request.getfixturevalue(family), path)


METHODS = {
    "DoRA": ("dora_scale",),
    "LoHa": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"),
    "LoKr": ("lokr_w1", "lokr_w2", "alpha"),
    "Tucker": ("lora_mid.weight",),
}


@pytest.mark.parametrize(("method", "endings"), METHODS.items(), ids=METHODS)
@pytest.mark.parametrize("stem", ["lora_unet_input_blocks_4_1_proj_in", TO_Q])
def test_another_method_is_refused_by_its_name(
    method: str, endings: tuple[str, ...], stem: str, sdxl_pipe: Any, tmp_path: Path
) -> None:
    tensors = layer(stem) | {f"{stem}.{ending}": torch.ones(1) for ending in endings}
    path = save(tmp_path / "a.safetensors", tensors)
    for naming in (STABLE_DIFFUSION, sdxl(sdxl_pipe.unet.config.layers_per_block), Z_IMAGE):
        with pytest.raises(AdapterUnsupported, match=method):
            read_adapter(path, None, naming)
