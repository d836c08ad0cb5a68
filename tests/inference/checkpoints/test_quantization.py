"""Weights in eight bits: the images of the weights as they are turned back, and their memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torchao.quantization import Float8Tensor

from inference.checkpoints import quantization
from inference.checkpoints.checkpoint import identify
from inference.checkpoints.memory_plan import Placement
from inference.checkpoints.pipeline import load_pipeline, weight_bytes
from inference.checkpoints.quantization import bytes_of, quantize
from inference.errors import EngineStartFailed
from inference.models import compiling, loader
from inference.request import AdapterFile
from tests.support.engine.engine_requests import request_of
from tests.support.engine.watched_engine import WatchedEngine, submit_together
from tests.support.images.parity import draw, psnr
from tests.support.long import long, long_but
from tests.support.models.full_pipelines import build_pipeline
from tests.support.models.tiny_adapters import write_adapter
from tests.support.models.tiny_flux_2 import build_tiny_flux_2
from tests.support.models.tiny_models import build_tiny_sd, build_tiny_sdxl, build_tiny_z_image

pytestmark = pytest.mark.usefixtures("one_thread")

BUILDERS: dict[str, Callable[[Path], Path]] = {
    "sd": build_tiny_sd,
    "sdxl": build_tiny_sdxl,
    "z_image": build_tiny_z_image,
    "flux_2": build_tiny_flux_2,
}
SAME_DB = 60.0
# Of a full-size denoiser's memory, between the headers' names and the model's layers.
ESTIMATE_ERROR = 0.03


def load(checkpoint: Path) -> Any:
    return load_pipeline(identify(str(checkpoint), None), torch.float32)


def quantized_layers(pipeline: Any) -> dict[str, list[str]]:
    """Return the names of the quantized weights of each component that has some."""
    models = {name: one for name, one in pipeline.components.items() if isinstance(one, torch.nn.Module)}
    found = {
        name: [key for key, weight in model.named_parameters() if isinstance(weight, Float8Tensor)]
        for name, model in models.items()
    }
    return {name: keys for name, keys in found.items() if keys}


def turned_back(checkpoint: Path, folder: Path) -> Path:
    """Write the checkpoint with the weights that quantized ones stand for."""
    pipeline = load(checkpoint)
    quantize(pipeline)
    for model in (one for one in pipeline.components.values() if isinstance(one, torch.nn.Module)):
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Float8Tensor):
                module.weight = torch.nn.Parameter(weight.dequantize(), requires_grad=False)
    pipeline.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", long_but(BUILDERS, "sd", "sdxl", "z_image"))
def test_batch_of_adapters_has_the_images_of_the_weights_turned_back(tmp_path: Path, name: str) -> None:
    checkpoint = BUILDERS[name](tmp_path / "model")
    adapter = tmp_path / "adapter.safetensors"
    write_adapter(adapter, load(checkpoint), layout="diffusers_new", rank=4, seed=1)
    requests = [
        request_of(width=64, height=64, num_inference_steps=2, seeds=(seed,), adapters=adapters)
        for seed, adapters in enumerate([(), (AdapterFile(adapter, None, 0.7),), (AdapterFile(adapter, None, 1.0),)])
    ]
    engine = WatchedEngine(checkpoint, WEIGHTS="fp8")
    reference = WatchedEngine(turned_back(checkpoint, tmp_path / "reference"))

    calls = submit_together(engine, requests)

    assert quantized_layers(engine.model._pipeline)
    assert min(psnr(call.image, draw(reference, call.request)[0]) for call in calls) >= SAME_DB
    engine.close()
    reference.close()


@long
def test_compiled_blocks_have_the_images_of_eager_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    torch._dynamo.reset()
    checkpoint = build_tiny_z_image(tmp_path / "model")
    request = request_of(width=64, height=64, num_inference_steps=2)
    compiled, eager = (
        WatchedEngine(checkpoint, WEIGHTS="fp8", COMPILE="blocks"),
        WatchedEngine(checkpoint, WEIGHTS="fp8"),
    )

    assert psnr(draw(compiled, request)[0], draw(eager, request)[0]) >= SAME_DB
    compiled.close()
    eager.close()


def test_large_text_encoders_are_quantized_and_others_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = load(build_tiny_sdxl(tmp_path / "model"))
    num_large = sum(one.numel() for one in pipeline.text_encoder_2.parameters())
    assert num_large > sum(one.numel() for one in pipeline.text_encoder.parameters())
    monkeypatch.setattr(quantization, "MIN_ENCODER_PARAMETERS", num_large)

    quantize(pipeline)

    layers = quantized_layers(pipeline)
    assert set(layers) == {"unet", "text_encoder_2"}
    assert not [name for name in layers["unet"] if "norm" in name]


@pytest.mark.parametrize(("name", "most"), [("sd15", 0.87), ("sdxl", 0.6), ("z-image", 0.52)])
def test_memory_is_foretold_by_the_names_in_the_files(name: str, most: float) -> None:
    pipeline = build_pipeline(name)
    component = "transformer" if name == "z-image" else "unet"
    model = getattr(pipeline, component)
    kept = quantization.kept_layers(model)
    layers = {
        f"{key}.weight" for key, one in model.named_modules() if quantization._is_large_layer(one, key, kept=kept)
    }
    shapes = {key: tuple(one.shape) for key, one in model.state_dict().items()}
    exact = sum(
        torch.Size(shape).numel() * (1 if key in layers else 2) + (4 * shape[0] if key in layers else 0)
        for key, shape in shapes.items()
    )

    assert bytes_of(component, shapes, 2, "fp8") == pytest.approx(exact, rel=ESTIMATE_ERROR)
    assert exact < most * bytes_of(component, shapes, 2, "auto")


def test_checkpoint_takes_less_than_in_sixteen_bits(tmp_path: Path) -> None:
    found = identify(str(build_tiny_z_image(tmp_path / "model")), None)

    whole, less = weight_bytes(found, 2), weight_bytes(found, 2, "fp8")

    assert whole is not None
    assert less is not None
    assert less["transformer"] < whole["transformer"]
    assert {name: less[name] for name in ("text_encoder", "vae")} == {
        name: whole[name] for name in ("text_encoder", "vae")
    }


def test_model_whose_parts_would_take_turns_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "plan_and_warn", lambda *_: Placement.OFFLOADED)

    with pytest.raises(EngineStartFailed, match=r"^WEIGHTS=fp8: the model does not fit the GPU as a whole"):
        WatchedEngine(build_tiny_sd(tmp_path / "model"), WEIGHTS="fp8")
