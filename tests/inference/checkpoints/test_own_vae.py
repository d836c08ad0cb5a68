"""A VAE in place of the checkpoint's own: in every form it is published in, against plain diffusers with that VAE."""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKL, DiffusionPipeline

from inference.checkpoints.checkpoint import identify
from inference.checkpoints.pipeline import download, load_pipeline, weight_bytes
from inference.engine.local_engine import LocalEngine
from inference.errors import EngineStartFailed
from inference.request import GenerationRequest, Source
from tests.support.engine.engine_requests import request_of
from tests.support.images.parity import DIFFERENT_DB, MIN_PSNR_DB, draw, psnr, settings_of
from tests.support.models.hub_cache import write_to_hub_cache
from tests.support.models.ldm_layout import write_single_file, write_vae_file
from tests.support.models.plain_families import drawn_by
from tests.support.models.tiny_models import build_tiny_sd, build_tiny_sdxl, build_tiny_z_image, load_pipe
from worker.cli.check.checks import CheckFailed
from worker.cli.check.machine import check_memory
from worker.cli.check.models import check_model

pytestmark = pytest.mark.usefixtures("one_thread")

WEIGHTS = "diffusion_pytorch_model.safetensors"
RGB = bytes(torch.randint(256, (64 * 64 * 3,), generator=torch.Generator().manual_seed(1)).tolist())
REQUESTS = [
    request_of(width=64, height=64, num_inference_steps=2),
    request_of(width=64, height=64, num_inference_steps=4, source=Source(RGB, 0.5)),
]
# diffusers' own names of a VAE's attention before it shared the layer with the UNet.
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_sdxl(tmp_path_factory.mktemp("models") / "sdxl")


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a VAE of other weights, another size and another scale, as a folder of its own."""
    folder = tmp_path_factory.mktemp("vae")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        made = AutoencoderKL(
            block_out_channels=(8, 16, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            norm_num_groups=4,
            sample_size=512,
            scaling_factor=0.2,
            force_upcast=False,
        )
        made.encoder.conv_out.weight.data.mul_(16)
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def alike(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a VAE of other weights with the checkpoint's config, which a single file is read by."""
    other = load_pipe(build_tiny_sdxl(tmp_path_factory.mktemp("other"), seed=7))
    folder = tmp_path_factory.mktemp("alike")
    other.vae.save_pretrained(folder)
    return folder


def load(checkpoint: Path, vae_id: Path | str, config: Path | None = None) -> Any:
    return load_pipeline(identify(str(checkpoint), config and str(config), vae_id=str(vae_id)), torch.float32)


def message_of(checkpoint: Path, vae_id: Path | str) -> str:
    with pytest.raises(EngineStartFailed) as caught:
        load(checkpoint, vae_id)
    return str(caught.value)


def with_old_names(path: Path) -> None:
    tensors = safetensors.torch.load_file(path)
    renamed = {}
    for name, tensor in tensors.items():
        if ".attentions." in name:
            for new, old in OLD_NAMES.items():
                name = name.replace(f".{new}.", f".{old}.")  # noqa: PLW2901 - one of four
        renamed[name] = tensor
    assert renamed.keys() != tensors.keys()
    safetensors.torch.save_file(renamed, path)


def in_original_layout(alike: Path, folder: Path) -> Path:
    return write_vae_file(folder / "a.safetensors", AutoencoderKL.from_pretrained(alike))


def in_a_whole_checkpoint(alike: Path, folder: Path) -> Path:
    return write_vae_file(folder / "a.safetensors", AutoencoderKL.from_pretrained(alike), prefix="first_stage_model.")


def in_diffusers_layout(alike: Path, folder: Path) -> Path:
    return shutil.copy(alike / WEIGHTS, folder / "a.safetensors")


def in_old_names(alike: Path, folder: Path) -> Path:
    path = in_diffusers_layout(alike, folder)
    with_old_names(path)
    return path


def as_folder(alike: Path, folder: Path) -> Path:
    return shutil.copytree(alike, folder / "vae")


def as_folder_of_16_bits_alone(alike: Path, folder: Path) -> Path:
    copy = as_folder(alike, folder)
    (copy / WEIGHTS).rename(copy / WEIGHTS.replace(".safetensors", ".fp16.safetensors"))
    return copy


def as_folder_with_old_names(alike: Path, folder: Path) -> Path:
    copy = as_folder(alike, folder)
    with_old_names(copy / WEIGHTS)
    return copy


@pytest.fixture(scope="module")
def engine(checkpoint: Path, vae: Path) -> Iterator[LocalEngine]:
    made = LocalEngine(settings_of(checkpoint, VAE_ID=str(vae)))
    yield made
    made.close()


@pytest.mark.parametrize("request_", REQUESTS, ids=["text2image", "image2image"])
def test_own_vae_draws_what_plain_diffusers_draws_with_it(
    engine: LocalEngine, checkpoint: Path, vae: Path, request_: GenerationRequest
) -> None:
    plain = load_pipe(checkpoint)
    plain.register_modules(vae=AutoencoderKL.from_pretrained(vae))

    drawn = draw(engine, request_)[0]

    assert psnr(drawn, drawn_by(plain, request_)) >= MIN_PSNR_DB
    assert psnr(drawn, drawn_by(load_pipe(checkpoint), request_)) < DIFFERENT_DB


@pytest.mark.parametrize(
    "form",
    [
        in_original_layout,
        in_a_whole_checkpoint,
        in_diffusers_layout,
        in_old_names,
        as_folder,
        as_folder_of_16_bits_alone,
        as_folder_with_old_names,
    ],
)
def test_every_published_form_has_the_same_weights(
    checkpoint: Path, alike: Path, tmp_path: Path, form: Callable[[Path, Path], Path]
) -> None:
    wanted = AutoencoderKL.from_pretrained(alike).state_dict()

    loaded = load(checkpoint, form(alike, tmp_path)).vae

    state = loaded.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in wanted.items())
    assert loaded.config.scaling_factor == load_pipe(checkpoint).vae.config.scaling_factor
    assert not loaded.training


def test_single_file_checkpoint_takes_an_own_vae(checkpoint: Path, vae: Path, tmp_path: Path) -> None:
    single = write_single_file(tmp_path / "a.safetensors", load_pipe(checkpoint))

    loaded = load(single, vae, checkpoint).vae

    assert loaded.config.scaling_factor == 0.2
    assert torch.equal(loaded.decoder.conv_in.weight, AutoencoderKL.from_pretrained(vae).decoder.conv_in.weight)


def test_own_config_is_the_vae_s_but_for_the_size_of_the_model(checkpoint: Path, vae: Path) -> None:
    config = load(checkpoint, vae).vae.config

    assert (config.scaling_factor, config.force_upcast) == (0.2, False)
    assert config.sample_size == load_pipe(checkpoint).vae.config.sample_size


def test_another_scale_is_logged(checkpoint: Path, vae: Path, alike: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load(checkpoint, alike)
        assert caplog.records == []
        load(checkpoint, vae)

    assert "the VAE scales latents otherwise" in caplog.text


def test_config_without_a_scale_has_the_family_s(checkpoint: Path, alike: Path, tmp_path: Path) -> None:
    copy = as_folder(alike, tmp_path)
    config = json.loads((copy / "config.json").read_text())
    del config["scaling_factor"]
    (copy / "config.json").write_text(json.dumps(config))

    assert load(checkpoint, copy).vae.config.scaling_factor == 0.13025


def test_memory_counts_the_own_vae_in_place_of_the_checkpoint_s(checkpoint: Path, vae: Path) -> None:
    without = weight_bytes(identify(str(checkpoint), None), 4)
    counted = weight_bytes(identify(str(checkpoint), None, vae_id=str(vae)), 4)

    assert without is not None
    assert counted == without | {"vae": sum(one.nbytes for one in AutoencoderKL.from_pretrained(vae).parameters())}
    assert counted != without


def test_z_image_takes_a_vae_of_16_channels_and_keeps_its_base_size(tmp_path: Path) -> None:
    checkpoint = build_tiny_z_image(tmp_path / "model")
    own = load_pipe(build_tiny_z_image(tmp_path / "other", seed=3)).vae
    own.register_to_config(sample_size=1024)
    own.save_pretrained(tmp_path / "vae")

    engine = LocalEngine(settings_of(checkpoint, VAE_ID=str(tmp_path / "vae")))

    engine.close()
    assert engine.facts.base_size == 64


def test_hub_id_in_the_cache_is_taken_from_there(
    checkpoint: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "hub" / "models--acme--vae"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("c0ffee")
    snapshot = repository / "snapshots" / "c0ffee"
    shutil.copytree(vae, snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    found = identify(str(checkpoint), None, vae_id="acme/vae")

    assert weight_bytes(found, 4) == weight_bytes(identify(str(checkpoint), None, vae_id=str(vae)), 4)
    assert load_pipeline(found, torch.float32).vae.config.scaling_factor == 0.2

    # And while its weights are not there yet, nobody knows what they take
    (snapshot / WEIGHTS).unlink()
    assert weight_bytes(found, 4) is None
    with pytest.raises(EngineStartFailed, match="VAE_ID 'acme/vae'"):
        download(found)


def test_weights_of_the_vae_that_is_replaced_are_not_needed(
    checkpoint: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = write_to_hub_cache(tmp_path / "hub", "acme/tiny", checkpoint, monkeypatch)
    (snapshot / "vae" / WEIGHTS).unlink()
    request = REQUESTS[0]

    found = identify("acme/tiny", None, vae_id=str(vae))

    assert weight_bytes(download(found), 4) == weight_bytes(identify(str(checkpoint), None, vae_id=str(vae)), 4)
    engines = [LocalEngine(settings_of(one, VAE_ID=str(vae))) for one in (Path("acme/tiny"), checkpoint)]
    images = [draw(engine, request)[0] for engine in engines]
    assert images[0] == images[1]
    for engine in engines:
        engine.close()


def test_the_vae_that_is_replaced_is_not_downloaded(
    checkpoint: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_to_hub_cache(tmp_path / "hub", "acme/tiny", checkpoint, monkeypatch)
    asked: list[dict[str, Any]] = []

    def download_offline(_: str, **options: Any) -> Path:
        asked.append(options)
        return checkpoint

    monkeypatch.setattr(DiffusionPipeline, "download", download_offline)

    for vae_id in (str(vae), None):
        download(identify("acme/tiny", None, vae_id=vae_id))

    assert [one.get("vae", "is asked for") for one in asked] == [None, "is asked for"]


# --- What is refused


@pytest.mark.parametrize(
    ("vae_id", "words"),
    [
        ("acme/nothing-of-the-kind", ("VAE_ID 'acme/nothing-of-the-kind'", "hf download")),
        ("/nowhere", ("VAE_ID '/nowhere'", "no folder or file", "owner/name")),
        ("vae/kl-f8.ckpt", ("VAE_ID", "pickle", "convert it to safetensors")),
        (__file__, ("VAE_ID", "neither a folder nor a .safetensors file")),
        (str(Path(__file__).parent), ("VAE_ID", "without config.json", "its vae")),
    ],
)
def test_unknown_vae_is_refused_with_advice(checkpoint: Path, vae_id: str, words: tuple[str, ...]) -> None:
    message = message_of(checkpoint, vae_id)

    assert all(word in message for word in words), message


@pytest.mark.parametrize("is_file", [False, True], ids=["folder", "file"])
def test_vae_of_other_latents_is_refused(checkpoint: Path, tmp_path: Path, is_file: bool) -> None:
    folder = build_tiny_z_image(tmp_path) / "vae"

    message = message_of(checkpoint, folder / WEIGHTS if is_file else folder)

    assert "has latents of 16 channels, and those of a StableDiffusionXLPipeline have 4" in message


@pytest.mark.parametrize(
    "shapes",
    [
        {"decoder.1.weight": (64, 4, 3, 3), "encoder.0.weight": (64, 3, 3, 3)},  # TAESD
        {"decoder.conv_in.weight": (16, 4, 3, 3)},  # no encoder
        {"decoder.conv_in.weight": (16, 4, 3, 3, 3), "encoder.conv_in.weight": (16, 3, 3, 3, 3)},  # of a video
        {"lora_unet.lora_up.weight": (4, 4)},
    ],
)
def test_file_that_is_no_vae_of_images_is_refused(
    checkpoint: Path, tmp_path: Path, shapes: dict[str, tuple[int, ...]]
) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path)

    assert "is no VAE of images" in message_of(checkpoint, path)


def edited(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: edited(f, _class_name="AutoencoderTiny"), ("holds AutoencoderTiny",)),
        (lambda f: edited(f, block_out_channels=[8, 8]), ("has 2 blocks",)),
        (lambda f: edited(f, layers_per_block=2), ("VAE_ID",)),
        (lambda f: (f / WEIGHTS).unlink(), ("VAE_ID", WEIGHTS, "missing")),
        (lambda f: os.truncate(f / WEIGHTS, 5000), (WEIGHTS, "cut off")),
    ],
    ids=["class", "blocks", "layers", "no weights", "cut off"],
)
def test_damaged_folder_is_refused(
    checkpoint: Path, alike: Path, tmp_path: Path, change: Callable[[Path], object], words: tuple[str, ...]
) -> None:
    copy = as_folder(alike, tmp_path)
    change(copy)

    message = message_of(checkpoint, copy)

    assert all(word in message for word in words), message


def test_file_of_another_architecture_is_refused(checkpoint: Path, vae: Path) -> None:
    assert "VAE_ID" in message_of(checkpoint, vae / WEIGHTS)


def test_check_covers_the_vae(tmp_path: Path, vae: Path) -> None:
    checkpoint = build_tiny_sd(tmp_path)

    with pytest.raises(CheckFailed, match="VAE_ID '/nowhere'"):
        check_model(settings_of(checkpoint, VAE_ID="/nowhere"), lambda _: pytest.fail("nothing to load"))
    assert "they fit" in check_memory(settings_of(checkpoint, VAE_ID=str(vae)))
