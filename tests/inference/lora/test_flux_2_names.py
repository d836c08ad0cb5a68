"""FLUX.2's adapters: every writer's names change the weights as the same weights by diffusers' names do."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from inference.lora.adapter import check_fits, read_adapter
from inference.lora.errors import AdapterIncompatible
from inference.lora.names.key_names import FLUX_2, STABLE_DIFFUSION, Z_IMAGE
from tests.support.long import long_but
from tests.support.models import flux_adapters
from tests.support.models.adapter_changes import Changes, assert_same_changes, changes_by_peft, changes_of
from tests.support.models.flux_2_adapters import published_layers
from tests.support.models.flux_adapters import Pairs, by_diffusers_names, random_pairs, write_pairs
from tests.support.models.tiny_flux import build_tiny_flux
from tests.support.models.tiny_flux_2 import build_tiny_flux_2
from tests.support.models.tiny_models import load_pipe

RANK = 4
LORA_A, LORA_DOWN = ("lora_A", "lora_B"), ("lora_down", "lora_up")


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_pipe(build_tiny_flux_2(tmp_path_factory.mktemp("klein")))


def ours(pipe: Any, path: Path) -> Changes:
    """Return each layer's change of weight, by the layer's name."""
    adapter = read_adapter(path, None, FLUX_2)
    check_fits(adapter, {"transformer": pipe.transformer})
    return changes_of(adapter)


def theirs(pipe: Any, path: Path) -> Changes:
    """Return the same from diffusers."""
    adapted = copy.deepcopy(pipe)
    adapted.load_lora_weights(path.parent, weight_name=path.name, local_files_only=True)
    return changes_by_peft({"transformer": adapted.transformer})


def kohya(name: str) -> str:
    return f"lora_unet_{name.replace('.', '_')}"


def comfy(name: str) -> str:
    return f"diffusion_model.{name}"


def bare(name: str) -> str:
    return name


def diffusers(name: str) -> str:
    return f"transformer.{name}"


def underscored(name: str) -> str:
    return f"lora_transformer_{name.replace('.', '_')}"


def shortened(name: str) -> str:
    return f"diffusion_model.{name.removeprefix('tran')}"


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
    "ai-toolkit": Form(comfy, LORA_A, None),
    "published": Form(bare, LORA_A, None),
    "diffusers with alphas": Form(diffusers, LORA_DOWN, 2.0, is_split=True),
    "underscores of diffusers' names": Form(underscored, LORA_DOWN, 2.0, is_split=True),
    "ComfyUI of diffusers' names": Form(comfy, LORA_A, None, is_split=True),
    "names cut off": Form(shortened, LORA_A, None, is_split=True),
}


@pytest.mark.parametrize("name", long_but(FORMS, "kohya", "ai-toolkit", "underscores of diffusers' names"))
def test_names_of_every_writer_mean_the_layers_that_diffusers_names(name: str, pipe: Any, tmp_path: Path) -> None:
    form, layers = FORMS[name], published_layers(pipe.transformer)
    fused = random_pairs(pipe.transformer, layers, rank=RANK, seed=1)
    scale = 1.0 if form.alpha is None else form.alpha / RANK
    split = by_diffusers_names(pipe.transformer, layers, fused)
    path = write_pairs(tmp_path / "a.safetensors", split if form.is_split else fused, *form[:3])
    scaled = by_diffusers_names(pipe.transformer, layers, fused, scale=scale)
    plain = write_pairs(tmp_path / "plain.safetensors", scaled, diffusers, LORA_A)

    changes = ours(pipe, path)

    assert_same_changes(changes, theirs(pipe, plain))
    linears = [layer for layer, one in pipe.transformer.named_modules() if isinstance(one, torch.nn.Linear)]
    assert changes.keys() == {f"transformer.{layer}" for layer in linears}


def kept(pairs: Pairs, *, has_modulation: bool) -> Pairs:
    """Leave out the last modulation, whose halves diffusers does not exchange, and others that a loader ignores."""
    names = ("final_layer.adaLN_modulation.1",) if has_modulation else ("modulation",)
    return {name: pair for name, pair in pairs.items() if not any(one in name for one in names)}


@pytest.mark.parametrize(
    ("stem", "halves", "alpha"), [(kohya, LORA_DOWN, 2.0), (comfy, LORA_A, None)], ids=["kohya", "ai-toolkit"]
)
def test_published_names_are_read_as_diffusers_reads_them(
    stem: Callable[[str], str], halves: tuple[str, str], alpha: float | None, pipe: Any, tmp_path: Path
) -> None:
    pairs = random_pairs(pipe.transformer, published_layers(pipe.transformer), rank=RANK, seed=2)
    read = kept(pairs, has_modulation=stem is comfy)
    path = write_pairs(tmp_path / "a.safetensors", read, stem, halves, alpha)

    assert_same_changes(ours(pipe, path), theirs(pipe, path))


@pytest.mark.parametrize("naming", [STABLE_DIFFUSION, Z_IMAGE])
def test_another_family_refuses_its_layers(naming: Any, pipe: Any, tmp_path: Path) -> None:
    pairs = random_pairs(pipe.transformer, published_layers(pipe.transformer), rank=RANK, seed=4)
    path = write_pairs(tmp_path / "a.safetensors", pairs, kohya, LORA_DOWN, 2.0)

    with pytest.raises(AdapterIncompatible, match="another model"):
        read_adapter(path, None, naming)


def test_an_adapter_of_flux_1_is_refused(pipe: Any, tmp_path: Path) -> None:
    transformer = load_pipe(build_tiny_flux(tmp_path / "flux")).transformer
    pairs = random_pairs(transformer, flux_adapters.published_layers(transformer), rank=RANK, seed=4)
    path = write_pairs(tmp_path / "a.safetensors", pairs, kohya, LORA_DOWN, 2.0)

    with pytest.raises(AdapterIncompatible):
        ours(pipe, path)
