"""Weights in eight and four bits: the images of the weights as they are turned back, and their memory."""

import itertools
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Params4bit

from benchmarks.loading import TRANSFORMER, Case, build, measure_here
from inference.checkpoints import quantization
from inference.checkpoints.checkpoint import identify
from inference.checkpoints.memory_plan import Placement
from inference.checkpoints.offload import offload_in_turns
from inference.checkpoints.pipeline import load_pipeline, weight_bytes
from inference.checkpoints.quantization import Storage, bytes_of, copied_to, is_quantized, quantize, quantized_bytes
from inference.checkpoints.weight_files import GB
from inference.models import compiling, loader
from inference.request import AdapterFile, GenerationRequest
from tests.support.engine.engine_requests import request_of
from tests.support.engine.watched_engine import WatchedEngine, submit_together
from tests.support.images.parity import MIN_PSNR_DB, draw, psnr
from tests.support.long import long, long_but
from tests.support.models.full_pipelines import build_pipeline
from tests.support.models.plain_families import drawn_by
from tests.support.models.quantized_pipelines import quantized_by_diffusers
from tests.support.models.tiny_adapters import write_adapter
from tests.support.models.tiny_flux import build_tiny_flux
from tests.support.models.tiny_flux_2 import build_tiny_flux_2
from tests.support.models.tiny_models import HIDDEN, build_tiny_sd, build_tiny_sdxl, build_tiny_z_image
from tests.support.paths import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")

BUILDERS: dict[str, Callable[[Path], Path]] = {
    "sd": build_tiny_sd,
    "sdxl": build_tiny_sdxl,
    "z_image": build_tiny_z_image,
    "flux": build_tiny_flux,
    "flux_2": build_tiny_flux_2,
}
CPU = torch.device("cpu")
MODELS_PAGE = ROOT / "docs" / "models.md"
STORAGES: tuple[Storage, ...] = ("fp8", "nf4")
SAME_DB = 60.0
# Of a full-size denoiser's memory, between the headers' names and the model's layers.
ESTIMATE_ERROR = 0.04


def load(checkpoint: Path) -> Any:
    return load_pipeline(identify(str(checkpoint), None), torch.float32)


def models_of(pipeline: Any) -> dict[str, torch.nn.Module]:
    return {name: one for name, one in pipeline.components.items() if isinstance(one, torch.nn.Module)}


def quantized_layers(pipeline: Any) -> dict[str, list[str]]:
    """Return the names of the quantized weights of each component that has some."""
    found = {
        name: [key for key, weight in model.named_parameters() if is_quantized(weight)]
        for name, model in models_of(pipeline).items()
    }
    return {name: keys for name, keys in found.items() if keys}


def turned_back(checkpoint: Path, folder: Path, storage: Storage) -> Path:
    """Write the checkpoint with the weights that quantized ones stand for."""
    quantized, plain = load(checkpoint), load(checkpoint)
    quantize(quantized, storage, CPU)
    for component, names in quantized_layers(quantized).items():
        for name in names:
            weight = getattr(quantized, component).get_parameter(name)
            is_nf4 = isinstance(weight, Params4bit)
            whole = dequantize_4bit(weight.data, weight.quant_state) if is_nf4 else weight.dequantize()
            getattr(plain, component).get_parameter(name).data = whole
    plain.save_pretrained(folder)
    return folder


def requests_with(adapter: Path) -> list[GenerationRequest]:
    return [
        request_of(width=64, height=64, num_inference_steps=2, seeds=(seed,), adapters=adapters)
        for seed, adapters in enumerate([(), (AdapterFile(adapter, None, 0.7),), (AdapterFile(adapter, None, 1.0),)])
    ]


def tensors_of(weight: Any) -> list[torch.Tensor]:
    """Return the tensors that a quantized weight is made of; a plain one is itself."""
    if isinstance(weight, Params4bit):
        return [weight.data, weight.quant_state.absmax]
    return [weight.qdata, weight.scale] if is_quantized(weight) else [weight]


def adapter_for(checkpoint: Path, folder: Path) -> Path:
    path = folder / "adapter.safetensors"
    write_adapter(path, load(checkpoint), layout="diffusers_new", rank=4, seed=1)
    return path


@pytest.mark.parametrize(
    ("name", "storage"), long_but(itertools.product(BUILDERS, STORAGES), ("sd", "fp8"), ("z_image", "nf4"))
)
def test_batch_of_adapters_has_the_images_of_the_weights_turned_back(
    tmp_path: Path, name: str, storage: Storage
) -> None:
    checkpoint = BUILDERS[name](tmp_path / "model")
    engine = WatchedEngine(checkpoint, WEIGHTS=storage)
    reference = WatchedEngine(turned_back(checkpoint, tmp_path / "reference", storage))

    calls = submit_together(engine, requests_with(adapter_for(checkpoint, tmp_path)))

    assert quantized_layers(engine.model._pipeline)
    assert min(psnr(call.image, draw(reference, call.request)[0]) for call in calls) >= SAME_DB
    engine.close()
    reference.close()


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", long_but(BUILDERS, "z_image"))
def test_adapters_have_the_images_of_diffusers_own_quantization(tmp_path: Path, name: str, storage: Storage) -> None:
    checkpoint = BUILDERS[name](tmp_path / "model")
    adapter = adapter_for(checkpoint, tmp_path)
    requests = requests_with(adapter)
    engine = WatchedEngine(checkpoint, WEIGHTS=storage)
    ((component, layers),) = quantized_layers(engine.model._pipeline).items()

    calls = submit_together(engine, requests)

    for call in calls:
        pipe = quantized_by_diffusers(checkpoint, storage, component, layers)
        if call.request.adapters:
            pipe.load_lora_weights(adapter.parent, weight_name=adapter.name, adapter_name="one")
            pipe.set_adapters("one", call.request.adapters[0].scale)
        assert psnr(call.image, drawn_by(pipe, call.request)) >= MIN_PSNR_DB
    engine.close()


@long
@pytest.mark.parametrize("storage", STORAGES)
def test_compiled_blocks_have_the_images_of_eager_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: Storage
) -> None:
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    torch._dynamo.reset()
    checkpoint = build_tiny_z_image(tmp_path / "model")
    request = request_of(width=64, height=64, num_inference_steps=2)
    compiled, eager = (
        WatchedEngine(checkpoint, WEIGHTS=storage, COMPILE="blocks"),
        WatchedEngine(checkpoint, WEIGHTS=storage),
    )

    assert psnr(draw(compiled, request)[0], draw(eager, request)[0]) >= SAME_DB
    compiled.close()
    eager.close()


@pytest.mark.parametrize("storage", STORAGES)
def test_large_text_encoders_are_quantized_and_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: Storage
) -> None:
    pipeline = load(build_tiny_sdxl(tmp_path / "model"))
    num_large = sum(one.numel() for one in pipeline.text_encoder.parameters())
    monkeypatch.setattr(quantization, "MIN_ENCODER_PARAMETERS", num_large)
    monkeypatch.setattr(quantization, "NF4_BLOCK", HIDDEN)

    quantize(pipeline, storage, CPU)

    layers = quantized_layers(pipeline)
    assert {"unet", "text_encoder"} <= set(layers)
    assert not [name for name in layers["unet"] if "norm" in name]


PUBLISHED = {"Stable Diffusion 1.5": "sd15", "SDXL": "sdxl", "Z-Image": "z-image", "FLUX.1 dev": "flux"}
FEWEST = {
    "sd15": {"fp8": 0.87, "nf4": 0.8},
    "sdxl": {"fp8": 0.6, "nf4": 0.39},
    "z-image": {"fp8": 0.52, "nf4": 0.29},
    "flux": {"fp8": 0.65, "nf4": 0.49},
}


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", long_but(FEWEST, "sd15", "flux"))
def test_memory_is_foretold_by_the_names_in_the_files(name: str, storage: Storage) -> None:
    pipeline = build_pipeline(name)
    component = "transformer" if hasattr(pipeline, "transformer") else "unet"
    model = getattr(pipeline, component)
    is_large = partial(quantization._is_large_layer, storage=storage, kept=quantization.kept_layers(model))
    layers = {f"{key}.weight" for key, one in model.named_modules() if is_large(one, key)}
    shapes = {key: tuple(one.shape) for key, one in model.state_dict().items()}
    exact = sum(
        quantized_bytes(storage, *shape) if key in layers else 2 * math.prod(shape) for key, shape in shapes.items()
    )

    assert bytes_of(component, shapes, 2, storage) == pytest.approx(exact, rel=ESTIMATE_ERROR)
    assert exact < FEWEST[name][storage] * bytes_of(component, shapes, 2, "auto")


@pytest.mark.parametrize("name", long_but(PUBLISHED, "Z-Image", "FLUX.1 dev"))
def test_the_page_s_table_is_counted_from_the_configs(name: str) -> None:
    figures = r" ([\d.]+) \|" * 3
    (row,) = re.findall(rf"^\| {re.escape(name)} \|{figures}$", MODELS_PAGE.read_text(), re.MULTILINE)
    # Tied weights are in the files once.
    shapes = {
        component: {key: tuple(one.shape) for key, one in model.named_parameters()}
        for component, model in models_of(build_pipeline(PUBLISHED[name])).items()
    }

    for shown, storage in zip(row, ("auto", *STORAGES), strict=True):
        num_bytes = sum(bytes_of(component, own, 2, storage) for component, own in shapes.items())
        assert shown == f"{num_bytes / GB:.1f}"


@pytest.mark.parametrize("storage", STORAGES)
def test_memory_of_a_matrix_is_what_its_tensors_take(storage: Storage) -> None:
    pipeline = SimpleNamespace(components={"unet": torch.nn.Sequential(torch.nn.Linear(128, 96, dtype=torch.bfloat16))})

    quantize(pipeline, storage, CPU)

    weight = pipeline.components["unet"][0].weight
    assert sum(one.nbytes for one in tensors_of(weight)) == quantized_bytes(storage, 96, 128)
    assert weight.dtype == torch.bfloat16


@pytest.mark.parametrize("storage", STORAGES)
def test_checkpoint_takes_less_than_in_sixteen_bits(tmp_path: Path, storage: Storage) -> None:
    found = identify(str(build_tiny_z_image(tmp_path / "model")), None)

    whole, less = weight_bytes(found, 2), weight_bytes(found, 2, storage)

    assert whole is not None
    assert less is not None
    assert less["transformer"] < whole["transformer"]
    assert {name: less[name] for name in ("text_encoder", "vae")} == {
        name: whole[name] for name in ("text_encoder", "vae")
    }


@pytest.mark.parametrize("storage", STORAGES)
def test_quantizing_makes_no_second_copy(tmp_path: Path, storage: Storage) -> None:
    case = Case("bfloat16", TRANSFORMER, "bfloat16", storage)
    source = str(build(tmp_path, "short", [case]) / f"bfloat16 {TRANSFORMER}")

    loading = measure_here(source, source, "bfloat16", str(tmp_path / "tiny"), storage)

    # What one layer takes while it is quantized, and what the libraries keep.
    allowance_mb = 16
    assert loading.disk_mb > 40
    assert loading.memory_mb < 0.6 * loading.disk_mb
    assert loading.peak_own_mb <= 1.2 * loading.memory_mb + allowance_mb


# --- Parts that take turns on the device


@pytest.mark.parametrize("storage", STORAGES)
def test_offloaded_model_has_the_images_of_a_resident_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: Storage
) -> None:
    checkpoint = build_tiny_z_image(tmp_path / "model")
    requests = requests_with(adapter_for(checkpoint, tmp_path))
    resident = WatchedEngine(checkpoint, WEIGHTS=storage)
    monkeypatch.setattr(loader, "plan_and_warn", lambda *_: Placement.OFFLOADED)
    offloaded = WatchedEngine(checkpoint, WEIGHTS=storage)

    calls = submit_together(offloaded, requests)

    assert min(psnr(call.image, draw(resident, call.request)[0]) for call in calls) >= SAME_DB
    resident.close()
    offloaded.close()


@pytest.mark.parametrize("storage", STORAGES)
def test_quantized_weights_are_others_while_their_model_is_called(storage: Storage) -> None:
    models = {name: torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)) for name in ("unet", "vae")}
    pipeline = SimpleNamespace(components=models)
    quantize(pipeline, storage, CPU)
    before = [layer.weight for layer in models["unet"]]
    offload_in_turns(pipeline, CPU)

    with torch.inference_mode():
        for name, are_others in (("unet", True), ("unet", True), ("vae", False)):
            models[name](torch.zeros(1, 64))
            assert [layer.weight is not one for layer, one in zip(models["unet"], before, strict=True)] == [
                are_others
            ] * 2


@pytest.mark.parametrize("storage", STORAGES)
def test_copying_a_quantized_weight_leaves_it_where_it_is(storage: Storage) -> None:
    pipeline = SimpleNamespace(components={"unet": torch.nn.Sequential(torch.nn.Linear(64, 64))})
    quantize(pipeline, storage, CPU)
    weight = pipeline.components["unet"][0].weight

    with torch.inference_mode():
        copied = copied_to(weight, torch.device("meta"))

    assert {one.device.type for one in tensors_of(copied)} == {copied.device.type} == {"meta"}
    assert {one.device.type for one in tensors_of(weight)} == {weight.device.type} == {"cpu"}
    assert type(copied) is type(weight)
