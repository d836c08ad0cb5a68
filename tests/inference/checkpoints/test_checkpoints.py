"""Checkpoints in every shape they are published in: what they are, what they take, and that they draw the same."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from benchmarks.loading import Case, build, measure_here
from inference.checkpoints.checkpoint import Location, identify
from inference.checkpoints.pipeline import download, load_pipeline, weight_bytes
from inference.errors import EngineStartFailed
from tests.support.long import long
from tests.support.models.hub_cache import write_to_hub_cache
from tests.support.models.ldm_layout import write_single_file
from tests.support.models.tiny_chroma import build_tiny_chroma
from tests.support.models.tiny_flux import build_tiny_flux
from tests.support.models.tiny_flux_2 import build_tiny_flux_2
from tests.support.models.tiny_krea2 import build_tiny_krea2
from tests.support.models.tiny_models import build_tiny_sd, build_tiny_sd2, build_tiny_sdxl, build_tiny_z_image
from tests.support.models.tiny_qwen_image import build_tiny_qwen_image

SD, SDXL, Z_IMAGE, FLUX = "StableDiffusionPipeline", "StableDiffusionXLPipeline", "ZImagePipeline", "FluxPipeline"
BUILDERS = {
    "sd": build_tiny_sd,
    "sd2": build_tiny_sd2,
    "sdxl": build_tiny_sdxl,
    "z-image": build_tiny_z_image,
    "flux": build_tiny_flux,
    "chroma": build_tiny_chroma,
    "flux-2": build_tiny_flux_2,
    "krea-2": build_tiny_krea2,
    "qwen-image": build_tiny_qwen_image,
}
CLASSES = {
    "sd": SD,
    "sd2": SD,
    "sdxl": SDXL,
    "z-image": Z_IMAGE,
    "flux": FLUX,
    "chroma": "ChromaPipeline",
    "flux-2": "Flux2KleinPipeline",
    "krea-2": "Krea2Pipeline",
    "qwen-image": "QwenImagePipeline",
}
SINGLE = ("sd", "sd2", "sdxl")

Change = Callable[[Path], None]
Copies = Callable[[str], Path]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write a diffusers folder of every family."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: build(root / name) for name, build in BUILDERS.items()}


@pytest.fixture(scope="module")
def single_files(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write the same weights in one file each, in the original layout."""
    root = tmp_path_factory.mktemp("single")
    return {name: write_single_file(root / f"{name}.safetensors", load(checkpoints[name])) for name in SINGLE}


@pytest.fixture(scope="module")
def wanted(checkpoints: dict[str, Path]) -> torch.Tensor:
    """Draw the image of the Stable Diffusion 1.x that most tests damage."""
    return draw(load(checkpoints["sd"]))


@pytest.fixture
def folder_of(checkpoints: dict[str, Path], tmp_path: Path) -> Copies:
    """Return a maker of copies of a folder, to be damaged."""
    return lambda name: shutil.copytree(checkpoints[name], tmp_path / "model")


@pytest.fixture
def folder(folder_of: Copies) -> Path:
    """Copy the Stable Diffusion 1.x."""
    return folder_of("sd")


def load(source: Path, config: Path | None = None, dtype: torch.dtype = torch.float32) -> Any:
    return load_pipeline(identify(str(source), config and str(config)), dtype)


def draw(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    done = pipe("a fox", num_inference_steps=1, generator=generator, output_type="pt", height=64, width=64)
    return torch.as_tensor(done.images)


def edit(name: str, change: Callable[[dict[str, Any]], object]) -> Change:
    """Change a JSON file of the folder."""

    def apply(folder: Path) -> None:
        found = json.loads((folder / name).read_text())
        change(found)
        (folder / name).write_text(json.dumps(found))

    return apply


def without(name: str, key: str) -> Change:
    return edit(name, lambda config: config.pop(key))


def as_variant(*components: str, variant: str = "fp16") -> Change:
    """Name the components' weights as published 16-bit files are."""

    def apply(folder: Path) -> None:
        for component in components:
            (weights,) = (folder / component).glob("*.safetensors")
            weights.rename(weights.with_name(weights.name.replace(".safetensors", f".{variant}.safetensors")))

    return apply


def cut(name: str, num_bytes: int) -> Change:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - num_bytes)


def replace(name: str, content: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content) and None


def shard_the_unet(folder: Path) -> None:
    pipe = load(folder)
    shutil.rmtree(folder / "unet")
    pipe.unet.save_pretrained(folder / "unet", max_shard_size="2MB")
    assert len(list((folder / "unet").glob("*.safetensors"))) > 2


def message_of(source: Path, config: Path | None = None) -> str:
    with pytest.raises(EngineStartFailed) as caught:
        load(source, config)
    return str(caught.value)


# --- What it is and what it takes


@pytest.mark.parametrize("name", BUILDERS)
def test_folder_is_identified_by_its_index_and_its_memory_by_the_headers(
    checkpoints: dict[str, Path], name: str
) -> None:
    checkpoint = identify(str(checkpoints[name]), None)
    pipe = load_pipeline(checkpoint, torch.bfloat16)

    assert (checkpoint.pipeline_class, checkpoint.where, checkpoint.public_name) == (
        CLASSES[name],
        Location.FOLDER,
        name,
    )
    assert type(pipe).__name__ == CLASSES[name]
    assert weight_bytes(checkpoint, 2) == {
        # Krea 2's norms stay in 32 bits, thousandths of its weights.
        name: 2 * sum({one.data_ptr(): one.numel() for one in model.state_dict().values() if one.ndim}.values())
        for name, model in pipe.components.items()
        if isinstance(model, torch.nn.Module)
    }


@pytest.mark.parametrize("name", SINGLE)
def test_a_single_file_draws_what_the_folder_draws(
    checkpoints: dict[str, Path], single_files: dict[str, Path], name: str
) -> None:
    checkpoint = identify(str(single_files[name]), str(checkpoints[name]))

    pipe = load_pipeline(checkpoint, torch.float32)

    assert (checkpoint.pipeline_class, checkpoint.where, checkpoint.public_name) == (CLASSES[name], Location.FILE, name)
    # Not to the bit: some processors' kernels depend on where in memory the weights lie.
    assert (draw(pipe) - draw(load(checkpoints[name]))).abs().max() < 1e-5
    assert weight_bytes(checkpoint, 4) == weight_bytes(identify(str(checkpoints[name]), None), 4)


def test_a_single_file_is_converted_to_the_dtype_asked_for(
    checkpoints: dict[str, Path], single_files: dict[str, Path]
) -> None:
    pipe = load(single_files["sdxl"], checkpoints["sdxl"], torch.bfloat16)

    models = [model for model in pipe.components.values() if isinstance(model, torch.nn.Module)]
    assert {parameter.dtype for model in models for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_weights_of_eight_and_sixteen_bits_are_what_they_say(
    checkpoints: dict[str, Path], single_files: dict[str, Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    tensors = safetensors.torch.load_file(single_files["sdxl"])
    rounded = {name: tensor.to(dtype) if tensor.ndim > 1 else tensor for name, tensor in tensors.items()}
    safetensors.torch.save_file(rounded, tmp_path / "rounded.safetensors")
    by_hand = {name: tensor.float() for name, tensor in rounded.items()}
    safetensors.torch.save_file(by_hand, tmp_path / "by_hand.safetensors")

    loaded = load(tmp_path / "rounded.safetensors", checkpoints["sdxl"])

    expected = load(tmp_path / "by_hand.safetensors", checkpoints["sdxl"]).unet.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.unet.state_dict().items())


def test_float8_weights_with_scales_are_refused(single_files: dict[str, Path], tmp_path: Path) -> None:
    tensors = safetensors.torch.load_file(single_files["sdxl"])
    tensors["model.diffusion_model.out.2.weight_scale"] = torch.ones(())
    safetensors.torch.save_file(tensors, tmp_path / "scaled.safetensors")

    assert "float8 weights with scales" in message_of(tmp_path / "scaled.safetensors")


def test_a_hub_id_in_the_cache_loads_without_the_hub(
    folder: Path, wanted: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given the cache as the hub's client leaves it, of a repository that has 16-bit files only
    as_variant("unet", "vae", "text_encoder")(folder)
    write_to_hub_cache(tmp_path / "hub", "acme/tiny", folder, monkeypatch)

    checkpoint = identify("acme/tiny", None)

    assert (checkpoint.where, checkpoint.public_name) == (Location.HUB, "acme/tiny")
    assert weight_bytes(checkpoint, 4) == weight_bytes(identify(str(folder), None), 4)
    assert torch.equal(draw(load_pipeline(checkpoint, torch.float32)), wanted)

    # And while its weights are not there yet, nobody knows what they take
    shutil.rmtree(checkpoint.path / "unet")
    assert weight_bytes(checkpoint, 4) is None
    with pytest.raises(EngineStartFailed, match="unet is missing"):
        weight_bytes(download(checkpoint), 4)


def test_checkpoint_on_this_machine_needs_no_download(folder: Path) -> None:
    checkpoint = identify(str(folder), None)

    assert download(checkpoint) == checkpoint


# --- Memory


def test_weights_of_the_same_dtype_stay_mapped_from_their_files(
    checkpoints: dict[str, Path], single_files: dict[str, Path]
) -> None:
    folder = load(checkpoints["sdxl"]).unet
    single_file = load(single_files["sd"], checkpoints["sd"]).unet

    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    mapped = [(*(int(end, 16) for end in line[0].split("-")), line[-1]) for line in maps]

    def file_of(parameter: torch.Tensor) -> str:
        return next(path for start, end, path in mapped if start <= parameter.data_ptr() < end)

    weights = checkpoints["sdxl"] / "unet" / "diffusion_pytorch_model.safetensors"
    assert {file_of(parameter) for parameter in folder.parameters()} == {str(weights)}
    assert {file_of(parameter) for parameter in single_file.parameters()} == {str(single_files["sd"])}


def test_converting_weights_makes_no_second_copy(tmp_path: Path) -> None:
    build(tmp_path, "short", [Case("float32", "folder", "bfloat16")])
    checkpoint = str(tmp_path / "float32 folder")

    loading = measure_here(checkpoint, checkpoint, "bfloat16", str(tmp_path / "tiny"))

    # What the libraries make once and keep, measured as 1 to 3 MB on checkpoints of 55 and of 860 MB alike.
    allowance_mb = 8
    assert loading.disk_mb > 50
    assert loading.peak_own_mb <= 1.2 * loading.memory_mb + allowance_mb
    assert loading.peak_all_mb <= 1.2 * loading.disk_mb + allowance_mb


# --- What we do not run


@pytest.mark.parametrize(
    ("model_id", "words"),
    [
        ("acme/nothing-of-the-kind", ("acme/nothing-of-the-kind", "folder", "hf download")),
        ("/nowhere", ("/nowhere", "no folder or file", "owner/name")),
        ("models/anything-v3.ckpt", ("pickle", "convert it to safetensors")),
        (__file__, ("neither a folder nor a .safetensors file",)),
        (str(Path(__file__).parent), ("model_index.json", "diffusers folder")),
    ],
)
def test_unknown_model_name_is_refused_with_advice(model_id: str, words: tuple[str, ...]) -> None:
    with pytest.raises(EngineStartFailed) as caught:
        identify(model_id, None)

    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("found", ["VQDiffusionPipeline", "StableDiffusionXLImg2ImgPipeline", ["code", "Own"], None])
def test_another_family_is_refused_before_anything_is_read(folder: Path, found: Any) -> None:
    edit("model_index.json", lambda index: index.update(_class_name=found))(folder)
    shutil.rmtree(folder / "unet")

    message = message_of(folder)

    assert str(found) in message
    assert all(name in message for name in (SD, SDXL, Z_IMAGE, FLUX))


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight": (4, 4)}, ("whole checkpoint",)),
        (
            {
                "model.diffusion_model.input_blocks.0.0.weight": (8, 8, 3, 3),
                "first_stage_model.decoder.conv_in.bias": (4,),
                "cond_stage_model.transformer.text_model.final_layer_norm.bias": (4,),
            },
            ("editing", "8 input channels"),
        ),
    ],
)
def test_incomplete_checkpoint_file_is_refused_by_its_header(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]], words: tuple[str, ...]
) -> None:
    safetensors.torch.save_file(
        {name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "a.safetensors"
    )

    message = message_of(tmp_path / "a.safetensors")

    assert all(word in message for word in words), message


def test_single_file_without_configs_is_refused(single_files: dict[str, Path]) -> None:
    assert "set MODEL_CONFIG" in message_of(single_files["sd"])


def test_configs_of_another_family_are_refused(checkpoints: dict[str, Path], single_files: dict[str, Path]) -> None:
    message = message_of(single_files["sd"], checkpoints["sdxl"])

    assert all(word in message for word in ("MODEL_CONFIG", SD, SDXL))


# --- What is published and loads


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(as_variant("unet", "vae", "text_encoder"), id="16-bit files only"),
        pytest.param(as_variant("unet"), id="one component as 16-bit files only"),
        pytest.param(as_variant("vae", variant="non_ema"), id="another variant"),
        pytest.param(shard_the_unet, id="shards"),
        pytest.param(
            edit(
                "model_index.json",
                lambda index: index.update(
                    requires_safety_checker=True,
                    safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
                    # As old checkpoints have it: transformers has no such class any more.
                    feature_extractor=["transformers", "CLIPFeatureExtractor"],
                ),
            ),
            id="a safety checker without its files",
        ),
        pytest.param(edit("model_index.json", lambda index: index.update(_diffusers_version="9.0")), id="newer index"),
        pytest.param(edit("unet/config.json", lambda c: c.update(_diffusers_version="9.0")), id="newer UNet"),
        pytest.param(without("unet/config.json", "_diffusers_version"), id="no version"),
        *(
            pytest.param(
                edit(name, lambda config: config.update(brand_new=[1])),
                id=f"an unknown key in {name}",
                marks=() if name in ("model_index.json", "unet/config.json") else long,
            )
            for name in (
                "model_index.json",
                "unet/config.json",
                "vae/config.json",
                "text_encoder/config.json",
                "scheduler/scheduler_config.json",
            )
        ),
        pytest.param(edit("unet/config.json", lambda c: c.pop("norm_type", None)), id="no norm_type"),
        pytest.param(without("scheduler/scheduler_config.json", "prediction_type"), id="no prediction_type"),
        pytest.param(without("vae/config.json", "sample_size"), id="no sample_size of the VAE"),
        pytest.param(without("vae/config.json", "force_upcast"), id="no force_upcast"),
        pytest.param(without("text_encoder/config.json", "architectures"), id="no architectures"),
        pytest.param(without("tokenizer/tokenizer_config.json", "model_max_length"), id="no length of the tokenizer"),
    ],
)
def test_published_layouts_load_and_draw_the_same(folder: Path, wanted: torch.Tensor, change: Change) -> None:
    change(folder)

    assert torch.equal(draw(load(folder)), wanted)


@pytest.mark.parametrize(
    ("name", "component", "assumed"),
    [
        ("sd", "unet", {"sample_size": 64}),
        ("sdxl", "unet", {"sample_size": 128}),
        ("sdxl", "vae", {"scaling_factor": 0.13025}),
        ("z-image", "vae", {"scaling_factor": 0.3611, "shift_factor": 0.1159, "sample_size": 1024}),
        ("flux", "vae", {"scaling_factor": 0.3611, "shift_factor": 0.1159, "sample_size": 1024}),
    ],
)
def test_config_field_left_out_gets_the_family_s_value(
    folder_of: Copies, caplog: pytest.LogCaptureFixture, name: str, component: str, assumed: dict[str, float]
) -> None:
    copy = folder_of(name)
    for key in assumed:
        without(f"{component}/config.json", key)(copy)

    with caplog.at_level(logging.WARNING):
        pipe = load(copy)

    assert {key: getattr(pipe, component).config[key] for key in assumed} == assumed
    assert [vars(record)["fields"] for record in caplog.records] == [{"component": component, "assumed": assumed}]


def test_a_whole_config_is_left_as_it_is(checkpoints: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for folder in checkpoints.values():
            load(folder)

    # diffusers itself does not expect the size that the tiny VAE of Krea 2 states.
    assert [one for one in caplog.records if one.name.startswith("inference.")] == []


def test_unused_weights_are_logged(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit("text_encoder/config.json", lambda config: config.update(num_hidden_layers=1))(folder)

    with caplog.at_level(logging.WARNING):
        load(folder)

    assert "weights left unused" in caplog.text


# --- What is damaged and says so


UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: shutil.rmtree(f / "vae"), ("/vae is missing",)),
        (lambda f: shutil.rmtree(f / "tokenizer"), ("/tokenizer is missing",)),
        (lambda f: shutil.rmtree(f / "scheduler"), ("/scheduler is missing",)),
        (lambda f: (f / UNET).unlink(), (UNET, "missing")),
        (lambda f: (f / UNET).rename((f / UNET).with_suffix(".bin")), ("pytorch_model.bin", "pickle", "convert")),
        (cut(UNET, 1), (UNET, "cut off")),
        (cut("text_encoder/model.safetensors", 1), ("text_encoder/model.safetensors", "cut off")),
        (replace(UNET, b""), (UNET, "cut off")),
        (replace(UNET, b"\x10\0\0\0\0\0\0\0nonsense"), (UNET, "no safetensors file")),
        (replace(UNET, b"version https://git-lfs.github.com/spec/v1\n"), (UNET, "git lfs pull")),
        (replace("model_index.json", b"{"), ("model_index.json", "JSON")),
        (replace("unet/config.json", b"{"), ("could not be loaded", "unet/config.json")),
        (lambda f: (f / "unet" / "config.json").unlink(), ("could not be loaded", "config.json")),
        (without("model_index.json", "unet"), ("model_index.json names no unet",)),
        (edit("model_index.json", lambda i: i.update(tokenizer=[None, None])), ("names no tokenizer",)),
        (without("unet/config.json", "block_out_channels"), ("could not be loaded", "block_out_channels")),
        (without("vae/config.json", "block_out_channels"), ("could not be loaded", "configs")),
        (without("text_encoder/config.json", "hidden_size"), ("could not be loaded",)),
        # The libraries would leave the layers that are not in the file as they were made: random.
        (without("text_encoder/config.json", "num_hidden_layers"), ("text_encoder", "do not belong together")),
        # And these would fail an assertion, and a check of which nobody says that it is a ValueError.
        (edit("text_encoder/config.json", lambda c: c.update(hidden_size=33)), ("could not be loaded", "hidden size")),
    ],
)
def test_damage_is_named_with_its_file(folder: Path, change: Change, words: tuple[str, ...]) -> None:
    change(folder)

    message = message_of(folder)

    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("sdxl", without("model_index.json", "text_encoder_2"), ("names no text_encoder_2",)),
        # Each layer of attention would lose its second block, and nobody would hear of it.
        ("sdxl", without("unet/config.json", "transformer_layers_per_block"), ("unet", "do not belong together")),
        ("sdxl", without("unet/config.json", "addition_embed_type"), ("unet", "do not belong together")),
        ("z-image", without("transformer/config.json", "n_layers"), ("transformer", "do not belong together")),
        ("flux", without("transformer/config.json", "num_layers"), ("transformer", "do not belong together")),
        ("z-image", without("transformer/config.json", "dim"), ("could not be loaded", "AssertionError")),
    ],
)
def test_damage_of_other_families_is_named_too(
    folder_of: Copies, name: str, change: Change, words: tuple[str, ...]
) -> None:
    folder = folder_of(name)
    change(folder)

    message = message_of(folder)

    assert all(word in message for word in words), message


def test_a_missing_shard_is_named(folder: Path) -> None:
    shard_the_unet(folder)
    shard = sorted((folder / "unet").glob("*.safetensors"))[1]
    shard.unlink()

    assert f"{shard} is missing" in message_of(folder)


def test_a_cut_off_single_file_is_named(single_files: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copy(single_files["sd"], tmp_path / "cut.safetensors")
    cut("cut.safetensors", 4)(tmp_path)

    assert f"{copy} is cut off" in message_of(copy)


def test_a_single_file_without_its_vae_is_no_whole_checkpoint(single_files: dict[str, Path], tmp_path: Path) -> None:
    state = safetensors.torch.load_file(single_files["sd"])
    rest = {name: tensor for name, tensor in state.items() if not name.startswith("first_stage_model.")}
    safetensors.torch.save_file(rest, tmp_path / "rest.safetensors")

    assert "VAE" in message_of(tmp_path / "rest.safetensors")


def test_a_single_file_that_lacks_a_layer_is_refused(
    checkpoints: dict[str, Path], single_files: dict[str, Path], tmp_path: Path
) -> None:
    state = safetensors.torch.load_file(single_files["sd"])
    del state["model.diffusion_model.out.2.weight"]
    safetensors.torch.save_file(state, tmp_path / "less.safetensors")

    assert "less.safetensors" in message_of(tmp_path / "less.safetensors", checkpoints["sd"])
