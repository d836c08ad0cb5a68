"""Z-Image in one file, as ComfyUI and trainers publish it: it draws what the diffusers folder of its weights draws."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from inference.checkpoints.checkpoint import identify
from inference.checkpoints.pipeline import load_pipeline, weight_bytes
from inference.errors import EngineStartFailed
from tests.support.models.hub_cache import write_to_hub_cache
from tests.support.models.ldm_layout import Tensors, z_image_tensors
from tests.support.models.tiny_models import build_tiny_z_image

PREFIX = "model.diffusion_model."
# Of values from 0 to 1. Sums may be added up in another order where tensors lie elsewhere in memory.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a diffusers folder."""
    return build_tiny_z_image(tmp_path_factory.mktemp("z-image") / "model")


@pytest.fixture(scope="module")
def tensors(folder: Path) -> Tensors:
    """Return its weights as ComfyUI names them."""
    return z_image_tensors(load(folder))


@pytest.fixture(scope="module")
def transformer(tensors: Tensors) -> Tensors:
    """Return the transformer's among them, without a prefix."""
    return transformer_of(tensors)


@pytest.fixture(scope="module")
def configs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the folder without weights."""
    copied = tmp_path_factory.mktemp("configs") / "model"
    return shutil.copytree(folder, copied, ignore=shutil.ignore_patterns("*.safetensors"))


@pytest.fixture(scope="module")
def wanted(folder: Path) -> torch.Tensor:
    """Draw the folder's image."""
    return draw(load(folder))


def load(source: Path, config: Path | None = None) -> Any:
    return load_pipeline(identify(str(source), config and str(config)), torch.float32)


def draw(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return torch.as_tensor(
        pipe(
            "a fox", num_inference_steps=2, guidance_scale=0, generator=generator, output_type="pt", height=64, width=64
        ).images
    )


def is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=0, atol=TOLERANCE)


def written(path: Path, tensors: Tensors) -> Path:
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def transformer_of(tensors: Tensors, prefix: str = "") -> Tensors:
    own = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
    return {prefix + name: tensor for name, tensor in own.items()}


def test_whole_file_draws_what_the_folder_draws(
    tmp_path: Path, tensors: Tensors, configs: Path, folder: Path, wanted: torch.Tensor
) -> None:
    path = written(tmp_path / "whole.safetensors", tensors)

    assert is_same(draw(load(path, configs)), wanted)
    assert weight_bytes(identify(str(path), str(configs)), 4) == weight_bytes(identify(str(folder), None), 4)


@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_transformer_alone_draws_with_the_rest_of_a_folder(
    tmp_path: Path, tensors: Tensors, folder: Path, wanted: torch.Tensor, prefix: str
) -> None:
    path = written(tmp_path / "alone.safetensors", transformer_of(tensors, prefix))
    rest = shutil.copytree(folder, tmp_path / "rest")
    for file in (rest / "transformer").glob("*.safetensors"):
        file.unlink()

    assert is_same(draw(load(path, rest)), wanted)
    assert weight_bytes(identify(str(path), str(rest)), 4) == weight_bytes(identify(str(folder), None), 4)


def test_transformer_in_the_layout_of_diffusers_is_read_too(tmp_path: Path, folder: Path, wanted: torch.Tensor) -> None:
    path = tmp_path / "alone.safetensors"
    shutil.copy(next((folder / "transformer").glob("*.safetensors")), path)

    assert is_same(draw(load(path, folder)), wanted)


def test_text_encoder_without_the_language_model_s_prefix_is_read_too(
    tmp_path: Path, tensors: Tensors, configs: Path, wanted: torch.Tensor
) -> None:
    path = written(
        tmp_path / "whole.safetensors",
        {name.replace(".transformer.model.", ".transformer."): tensor for name, tensor in tensors.items()},
    )

    assert is_same(draw(load(path, configs)), wanted)


def test_rest_of_a_transformer_comes_from_a_hub_id_in_the_cache(
    tmp_path: Path, transformer: Tensors, folder: Path, wanted: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "alone.safetensors", transformer)
    repository = write_to_hub_cache(tmp_path / "hub", "acme/tiny", folder, monkeypatch)
    for file in (repository / "transformer").glob("*.safetensors"):
        file.unlink()

    # Nobody knows yet what its weights take.
    assert weight_bytes(identify(str(path), "acme/tiny"), 4) is None
    assert is_same(draw(load_pipeline(identify(str(path), "acme/tiny"), torch.float32)), wanted)


def test_whole_file_without_configs_asks_for_them(tmp_path: Path, tensors: Tensors) -> None:
    path = written(tmp_path / "whole.safetensors", tensors)

    with pytest.raises(EngineStartFailed, match=r"set MODEL_CONFIG to a diffusers folder of a ZImagePipeline"):
        load(path)


def test_transformer_alone_without_configs_is_refused(tmp_path: Path, tensors: Tensors) -> None:
    path = written(tmp_path / "alone.safetensors", transformer_of(tensors))

    with pytest.raises(EngineStartFailed, match="without text encoder or VAE: set MODEL_CONFIG"):
        identify(str(path), None)


def test_folder_without_the_rest_is_refused(tmp_path: Path, tensors: Tensors, configs: Path) -> None:
    path = written(tmp_path / "alone.safetensors", transformer_of(tensors))

    with pytest.raises(EngineStartFailed, match=r"text_encoder.* is missing"):
        load(path, configs)


@pytest.mark.parametrize(
    ("ending", "is_by_row", "dtype"),
    [
        (".weight_scale", False, torch.float8_e4m3fn),
        (".weight_scale", True, torch.float8_e4m3fn),
        (".scale_weight", False, torch.float8_e5m2),
    ],
)
def test_float8_weights_are_multiplied_by_their_scales(
    tmp_path: Path, transformer: Tensors, folder: Path, *, ending: str, is_by_row: bool, dtype: torch.dtype
) -> None:
    quantized, turned_back = {}, {}
    for name, tensor in transformer.items():
        if not name.endswith(".weight") or tensor.ndim != 2 or not name.startswith("layers."):
            quantized[name] = turned_back[name] = tensor
            continue
        most = tensor.abs().amax(dim=1, keepdim=True) if is_by_row else tensor.abs().max()
        scale = most / torch.finfo(dtype).max
        quantized[name] = (tensor / scale).to(dtype)
        layer = name.removesuffix(".weight")
        quantized[layer + ending] = scale.squeeze()
        quantized[f"{layer}.input_scale"] = torch.ones(())
        turned_back[name] = quantized[name].float() * scale
    quantized["scaled_fp8"] = torch.zeros(2, dtype=dtype)
    path = written(tmp_path / "quantized.safetensors", quantized)
    by_hand = written(tmp_path / "by_hand.safetensors", turned_back)

    assert is_same(draw(load(path, folder)), draw(load(by_hand, folder)))


def test_float8_weights_without_scales_are_what_they_say(tmp_path: Path, tensors: Tensors, folder: Path) -> None:
    alone = transformer_of(tensors)
    rounded = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in alone.items()}
    path = written(tmp_path / "rounded.safetensors", rounded)
    by_hand = written(tmp_path / "by_hand.safetensors", {name: tensor.float() for name, tensor in rounded.items()})

    assert is_same(draw(load(path, folder)), draw(load(by_hand, folder)))


def test_weights_of_four_bits_are_refused_by_name(tmp_path: Path, tensors: Tensors, folder: Path) -> None:
    alone = transformer_of(tensors)
    name = "layers.0.feed_forward.w1.weight"
    alone[name] = torch.zeros(alone[name].shape[0], alone[name].shape[1] // 2, dtype=torch.uint8)
    alone[f"{name}_scale"] = torch.zeros(4, 4, dtype=torch.float8_e4m3fn)
    path = written(tmp_path / "four_bits.safetensors", alone)

    with pytest.raises(EngineStartFailed, match=rf"{name} is quantized to torch.uint8"):
        load(path, folder)


def test_scales_of_blocks_are_refused(tmp_path: Path, tensors: Tensors, folder: Path) -> None:
    alone = transformer_of(tensors)
    name = "layers.0.feed_forward.w1.weight"
    alone |= {name: alone[name].to(torch.float8_e4m3fn), f"{name}_scale": torch.ones(2, 2)}
    path = written(tmp_path / "blocks.safetensors", alone)

    with pytest.raises(EngineStartFailed, match="4 scales; this version reads one for a layer"):
        load(path, folder)
