"""The recipe of the demo model: its parts one by one, and all of its stages for moments on three made-up pictures."""

import json
import os
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import nn

from examples.demo_model.recipe import adapters, denoiser, fetch, stages, training, vae
from examples.demo_model.recipe.adapters import adapt, train_adapter
from examples.demo_model.recipe.captions import (
    STYLE_WORDS,
    base_caption,
    caption,
    draw_ground,
    styled_caption,
    with_article,
)
from examples.demo_model.recipe.denoiser import build_unet, train_denoiser
from examples.demo_model.recipe.drawing import ImagePrompt, generator_for
from examples.demo_model.recipe.export import export
from examples.demo_model.recipe.grounds import GROUNDS, NAMED, WHITE
from examples.demo_model.recipe.latents import encode
from examples.demo_model.recipe.optimizer import Muon, orthogonalise
from examples.demo_model.recipe.reference import load_references, means_of
from examples.demo_model.recipe.render import load_images, on_white, render
from examples.demo_model.recipe.score import REFERENCES, english_prompts, hangul_prompts
from examples.demo_model.recipe.settings import MAX_TOKENS, SIDE, Budget, Workspace
from examples.demo_model.recipe.styles import STYLES, edges, on_ground
from examples.demo_model.recipe.things import Thing, read_things
from examples.demo_model.recipe.tokenizer import END, Reader, learn_tokenizer, make_tokenizer
from examples.demo_model.recipe.training import TrainingPlan, train
from examples.demo_model.recipe.vae import build_vae, normalise, train_vae
from examples.demo_model.recipe.workers import Workers

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
THINGS = read_things()
FOX = next(thing for thing in THINGS if thing.icon == "fox")
MOMENT = Budget(
    "moment",
    num_things=3,
    num_tokens=700,
    vae_steps=1,
    denoiser_steps=1,
    adapter_steps=1,
    sample_steps=2,
)


# --- Names and captions


def test_names_are_unique() -> None:
    names = [name for thing in THINGS for name in (thing.name, *thing.synonyms, *thing.hangul)]

    assert len(THINGS) >= 200
    assert sorted(names) == sorted(set(names))


def test_most_things_have_a_hangul_name_in_composed_syllables() -> None:
    hangul = [name for thing in THINGS for name in thing.hangul]

    assert sum(bool(thing.hangul) for thing in THINGS) >= 0.9 * len(THINGS)
    assert all(unicodedata.is_normalized("NFC", name) for name in hangul)
    assert all("HANGUL SYLLABLE" in unicodedata.name(letter) for name in hangul for letter in name.replace(" ", ""))


@pytest.mark.parametrize(
    ("noun", "said"),
    [
        ("fox", "a fox"),
        ("owl", "an owl"),
        ("unicorn", "a unicorn"),
        ("umbrella", "an umbrella"),
        ("grapes", "grapes"),
        ("bus", "a bus"),
    ],
)
def test_a_noun_gets_its_article(noun: str, said: str) -> None:
    assert with_article(noun) == said


def test_caption_names_its_thing_in_english_or_korean_and_the_chosen_ground() -> None:
    said = [caption(FOX, 1, Random(seed)) for seed in range(400)]
    korean = [text for text in said if "여우" in text]

    assert {text for text in said if "fox" not in text} == set(korean)
    assert all("blue" in text for text in said if text not in korean)
    assert all("파란" in text for text in korean)
    assert 0.2 < len(korean) / len(said) < 0.4


def test_a_thing_without_hangul_names_is_named_in_english() -> None:
    thing = Thing("top-hat", (), ())

    assert all("top hat" in caption(thing, None, Random(seed)) for seed in range(50))


def test_captions_are_functions_of_their_seeds() -> None:
    assert [base_caption(FOX, None, Random(n)) for n in range(50)] == [
        base_caption(FOX, None, Random(n)) for n in range(50)
    ]


def test_base_captions_include_styles_and_empty_ones() -> None:
    said = [base_caption(FOX, None, Random(seed)) for seed in range(2000)]

    assert 0.05 < said.count("") / len(said) < 0.12
    for english, hangul in STYLE_WORDS.values():
        assert any(english in text for text in said)
        assert any(hangul in text for text in said)


@pytest.mark.parametrize("style", STYLE_WORDS)
def test_an_adapter_s_captions_mostly_have_its_name(style: str) -> None:
    said = [styled_caption(FOX, style, Random(seed)) for seed in range(1000)]
    named = [text for text in said if any(word in text for word in STYLE_WORDS[style])]

    assert 0.7 < len(named) / len(said) < 0.9


def test_a_ground_that_is_named_has_a_name() -> None:
    drawn = [draw_ground(Random(seed)) for seed in range(1000)]

    assert {number for number, is_named in drawn if is_named} == set(range(len(NAMED)))
    assert {number for number, is_named in drawn if not is_named} == {WHITE, *range(len(NAMED), len(GROUNDS))}


# --- Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer(THINGS, 3500)


def test_every_word_of_the_names_is_one_token(tokenizer: Any) -> None:
    words = {word for thing in THINGS for name in (thing.name, *thing.hangul) for word in name.split()}

    assert {word for word in words if len(tokenizer.tokenize(word)) > 1} == set()


@pytest.mark.parametrize("text", ["빨간 여우, 파란 배경", "zebra 한글 ~ 猫", "a fox"])
def test_any_text_is_written_without_loss(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text).input_ids

    assert tokenizer.convert_tokens_to_ids(END) not in ids[1:-1]
    assert tokenizer.decode(ids[1:-1]).replace(" ", "") == text.replace(" ", "")


def test_upper_case_and_taken_apart_syllables_are_read_as_what_they_are(tokenizer: Any) -> None:
    assert tokenizer("A FOX").input_ids == tokenizer("a fox").input_ids
    assert tokenizer(unicodedata.normalize("NFD", "빨간 여우")).input_ids == tokenizer("빨간 여우").input_ids


def test_tokenizer_encodes_as_the_pipeline_does(tokenizer: Any) -> None:
    texts = ["네온: 성", "", "a fox " * 60]

    padded = tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, truncation=True).input_ids

    assert Reader(tokenizer)(texts).tolist() == padded


# --- Pictures and styles


def red_disc() -> torch.Tensor:
    """Draw RGBA: an opaque red disc on nothing."""
    place = torch.arange(SIDE) - SIDE / 2
    alpha = (place.square() + place.square()[:, None] < (SIDE / 3) ** 2).float()
    return torch.stack((alpha, 0 * alpha, 0 * alpha, alpha))


def test_an_image_on_a_ground_hides_it_where_it_is_opaque() -> None:
    shown = on_ground(red_disc(), (0.0, 0.0, 1.0))

    assert shown[:, SIDE // 2, SIDE // 2].tolist() == [1, 0, 0]
    assert shown[:, 0, 0].tolist() == [0, 0, 1]


def test_edges_are_where_the_shape_ends() -> None:
    found = edges(red_disc())[0]

    assert found[SIDE // 2, SIDE // 2] == 0
    assert found[0, 0] == 0
    assert found[SIDE // 2].max() == 1


@pytest.mark.parametrize("style", STYLES)
def test_styles_draw_one_image_and_many_alike(style: str) -> None:
    disc = red_disc()

    one, many = STYLES[style](disc), STYLES[style](torch.stack((disc, disc)))

    assert one.shape == (3, SIDE, SIDE)
    assert torch.allclose(many[1], one, atol=1e-6)
    assert one.min() >= 0
    assert one.max() <= 1


def test_a_blueprint_is_blue_with_white_lines_neon_dark_and_sepia_brown() -> None:
    blueprint, neon, sepia = (STYLES[name](red_disc()) for name in ("blueprint", "neon", "sepia"))

    red, _, blue = blueprint[:, 0, 0].tolist()
    assert blue > 2 * red
    assert blueprint.amin(0).max() == 1
    assert neon[:, 0, 0].max() < 0.1
    assert neon[0].max() == 1
    assert bool((sepia[0] >= sepia[1]).all() and (sepia[1] >= sepia[2]).all())


def test_a_pixel_image_is_made_of_squares() -> None:
    drawn = STYLES["pixel"](red_disc())

    squares = drawn.unflatten(1, (SIDE // 8, 8)).unflatten(3, (SIDE // 8, 8))
    assert squares.std((2, 4)).max() < 1e-6


def test_every_reference_is_the_nearest_to_itself() -> None:
    references = load_references(REFERENCES)

    assert [references.nearest(one) for one in references.means] == list(references.names)
    assert references.names == tuple(thing.name for thing in THINGS)
    assert set(hangul_prompts()) <= set(english_prompts(references.names))


def test_means_are_those_of_the_image_s_squares() -> None:
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    image[:16, :8] = 255

    assert means_of(image)[0, 0].tolist() == [128, 128, 128]
    assert means_of(image)[1:].max() == 0


# --- Training


class Sum(nn.Module):
    """Trains a matrix and an offset."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.linear = nn.Linear(6, 4)

    def loss(self, step: int, part: int) -> torch.Tensor:
        draws = training.Draws("sum", step, part)
        given = draws.normal(16, 6)
        return (self.linear(given) - given.cumsum(1)[:, :4]).square().mean()


@pytest.fixture
def workers() -> Iterator[Workers]:
    made = Workers(CPU)
    made.precision = torch.float32
    yield made
    made.close()


SUM_COURSE = TrainingPlan("sum", 120, 32, {"": 0.3})


def test_training_loop_reduces_the_loss(workers: Workers, tmp_path: Path) -> None:
    network = Sum()

    figures = train(network, network.loss, SUM_COURSE, workers, tmp_path / "progress.pt")

    losses: Any = figures["losses"]
    assert losses[-1] < 0.1 * losses[0]


def test_an_interrupted_training_goes_on_to_the_same_weights(
    workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    whole, cut, resumed = Sum(), Sum(), Sum()

    def cut_loss(step: int, part: int) -> torch.Tensor:
        if step == 57:
            raise KeyboardInterrupt
        return cut.loss(step, part)

    train(whole, whole.loss, SUM_COURSE, workers, tmp_path / "whole.pt")
    with pytest.raises(KeyboardInterrupt):
        train(cut, cut_loss, SUM_COURSE, workers, tmp_path / "cut.pt")
    train(resumed, resumed.loss, SUM_COURSE, workers, tmp_path / "cut.pt")

    assert torch.equal(resumed.linear.weight, whole.linear.weight)
    assert torch.equal(resumed.linear.bias, whole.linear.bias)


def test_slow_training_worker_changes_no_weights(workers: Workers, tmp_path: Path) -> None:
    quick, slow = Sum(), Sum()

    def slow_loss(step: int, part: int) -> torch.Tensor:
        time.sleep(0.002 * ((step + part) % 2))
        return slow.loss(step, part)

    train(quick, quick.loss, SUM_COURSE, workers, tmp_path / "quick.pt")
    train(slow, slow_loss, SUM_COURSE, workers, tmp_path / "slow.pt")

    assert torch.equal(quick.linear.weight, slow.linear.weight)


def test_a_loss_that_is_no_number_ends_the_training(workers: Workers, tmp_path: Path) -> None:
    network = Sum()

    with pytest.raises(ArithmeticError, match="sum is nan"):
        train(network, lambda *_: network.linear.weight.sum() * float("nan"), SUM_COURSE, workers, tmp_path / "p.pt")


@pytest.mark.parametrize("shape", [(3, 16, 64), (2, 64, 16), (1, 32, 32)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)

    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))

    assert values.max() < 1.3
    assert values.median() > 0.6


def test_muon_moves_a_kernel_as_much_as_adamw_would(workers: Workers) -> None:
    kernel = nn.Parameter(torch.zeros(32, 8, 3, 3))
    kernel.grad = torch.randn(kernel.shape, generator=torch.Generator().manual_seed(1))

    Muon([kernel], 0.01, workers.run, torch.float32).step()

    assert kernel.detach().square().mean().sqrt().item() == pytest.approx(0.2 * 0.01, rel=0.3)


# --- The networks


def test_normalised_latents_have_unit_variance_and_decode_to_the_same() -> None:
    torch.manual_seed(0)
    vae = build_vae().eval()
    shown = torch.rand(4, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        before = vae.encode(shown).latent_dist
        decoded = vae.decode(before.mean).sample

        normalise(vae, before.mean.mean((0, 2, 3)), before.mean.std((0, 2, 3)))

        after = vae.encode(shown).latent_dist
        assert torch.allclose(after.mean.mean((0, 2, 3)), torch.zeros(4), atol=1e-4)
        assert torch.allclose(after.mean.std((0, 2, 3)), torch.ones(4), atol=1e-3)
        assert torch.allclose(
            after.std / before.std, after.mean.std() / before.mean.std((0, 2, 3)).view(-1, 1, 1), rtol=0.02
        )
        assert torch.allclose(vae.decode(after.mean).sample, decoded, atol=1e-4)


def test_an_adapter_changes_nothing_before_it_is_trained() -> None:
    torch.manual_seed(0)
    unet = build_unet().eval()
    given = torch.randn(1, 4, 16, 16), torch.tensor([500]), torch.randn(1, MAX_TOKENS, 128)
    with torch.no_grad():
        plain = unet(*given).sample
        adapted, _ = adapt(unet)

        assert torch.allclose(adapted(*given).sample, plain, atol=1e-6)
    assert all("lora_" in name for name, parameter in adapted.named_parameters() if parameter.requires_grad)


# --- Stages


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Make everything up to the first adapter, from discs instead of the real images, of small batches."""
    made = Workspace(tmp_path_factory.mktemp("workspace"), MOMENT, CPU)
    discs = {
        thing.icon: {"body": f'<circle cx="16" cy="16" r="{6 + 3 * number}" fill="#c0{number}0{number}0"/>'}
        for number, thing in enumerate(read_things(MOMENT.num_things))
    }
    made.icons.write_text(json.dumps({"icons": discs, "width": 32, "height": 32}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vae, "NUM_CROPS", 4)
        for module in (denoiser, adapters):
            patch.setattr(module, "BATCH", 4)
        for stage in (render, learn_tokenizer, train_vae, encode, train_denoiser, export):
            stage(made)
        train_adapter("neon", made)
    return made


def test_rendered_images_are_round_where_the_discs_are(workspace: Workspace) -> None:
    images = load_images(workspace.images)

    assert images.shape == (3, 4, SIDE, SIDE)
    assert images[0, 3, SIDE // 2, SIDE // 2] == 1
    assert images[0, 3, 0, 0] == 0
    assert on_white((images[0] * 255).to(torch.uint8))[0, 0].tolist() == [255, 255, 255]


def test_export_is_a_folder_that_diffusers_loads(workspace: Workspace) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(workspace.checkpoint, dtype=torch.float32)
    pipe.load_lora_weights(workspace.adapters, weight_name="neon.safetensors")
    pipe.set_progress_bar_config(disable=True)

    drawn = pipe("여우", num_inference_steps=2, guidance_scale=3.0, width=SIDE, height=SIDE).images[0]

    assert drawn.size == (SIDE, SIDE)
    assert pipe.safety_checker is None
    assert pipe.scheduler.config.clip_sample is False
    assert pipe.unet.peft_config["default_0"].lora_alpha == 8


def test_export_is_drawn_by_the_worker_s_engine(workspace: Workspace) -> None:
    adapter = workspace.adapters / "neon.safetensors"

    with generator_for(workspace.checkpoint, "cpu") as generator:
        plain, styled = generator.draw([ImagePrompt("fox", num_steps=2), ImagePrompt("fox", adapter, num_steps=2)])

    assert plain.shape == styled.shape == (SIDE, SIDE, 3)


def test_a_stage_is_run_once_and_its_figures_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    monkeypatch.setattr(stages, "STAGES", {name: lambda _, name=name: ran.append(name) or {"n": 1} for name in "ab"})
    monkeypatch.setattr(stages, "_figures", lambda _: {})
    workspace = Workspace(tmp_path, MOMENT, CPU)

    stages.run_stages(workspace)
    stages.run_stages(workspace)

    assert ran == ["a", "b"]
    assert json.loads((tmp_path / "stages" / "a.json").read_text())["n"] == 1


def test_effort_is_a_share_of_the_trainings_steps_and_part_of_the_budget_s_name() -> None:
    half = Budget("whole", None, 900, 100, 200, 30, 20).with_effort(0.5)

    assert half == Budget("whole, effort 0.5", None, 900, 50, 100, 15, 20)
    assert half.with_effort(1.0) is half


def test_stages_behind_a_repeated_stage_are_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    monkeypatch.setattr(stages, "STAGES", {name: lambda _, name=name: ran.append(name) or {} for name in "abc"})
    monkeypatch.setattr(stages, "_figures", lambda _: {})
    workspace = Workspace(tmp_path, MOMENT, CPU)
    stages.run_stages(workspace)
    (tmp_path / "stages" / "b.json").unlink()

    stages.run_stages(workspace)

    assert ran == ["a", "b", "c", "b", "c"]


def test_results_of_another_budget_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "STAGES", {"a": lambda _: {}})
    monkeypatch.setattr(stages, "_figures", lambda _: {})
    stages.run_stages(Workspace(tmp_path, MOMENT, CPU))

    with pytest.raises(stages.OtherBudget, match="moment"):
        stages.run_stages(Workspace(tmp_path, Budget("longer", None, 9, 9, 9, 9, 9), CPU))


# --- Fetching


def test_a_package_with_another_digest_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a client that brings something else
    client = tmp_path / "bin" / "npm"
    client.parent.mkdir()
    client.write_text("#!/bin/sh\nprintf 'not a package' >package.tgz\n")
    client.chmod(0o755)
    monkeypatch.setenv("PATH", str(client.parent), prepend=os.pathsep)

    with pytest.raises(fetch.PackageAltered, match="digest"):
        fetch.fetch(Workspace(tmp_path, MOMENT, CPU))

    assert not (tmp_path / "icons.json").exists()
