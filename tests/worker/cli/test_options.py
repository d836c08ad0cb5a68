"""The options of `generate` and `submit`: the same for both, and what the decoder makes of the fields they become."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner

from clients.storage.location import ObjectRef
from config.model import ModelSettings
from config.store import StoreSettings
from tests.support.paths import DEMO_MODEL
from tests.worker.messages.test_decoder import job_of, message, rejection_of
from watermark.geometry import Position
from watermark.product.placement import Layout
from watermark.resizing import Fit
from watermark.text.overlay import TextOverlay
from worker.cli.main import app
from worker.cli.options import GenerateOptions, fields_of, with_generate_options
from worker.messages.decoder import rules_from
from worker.messages.job import Job, JobAdapter, JobControl, JobSource, Kind, Preprocess
from worker.messages.rules import JobRules

EVERYTHING_PLAIN = (
    *("--negative", "blurry", "--style", "anime", "--industry", "cafe", "--lora", "a.safetensors", "--lora", "b/"),
    *("--scale", "0.5", "--signature", "s.png", "--artist", "서울", "--aspect", "1:2", "--steps", "9", "--seed", "7"),
    *("--guidance", "0", "--guidance-rescale", "0.7", "-n", "2", "--scheduler", "euler"),
)


@pytest.fixture(scope="module")
def rules() -> JobRules:
    return rules_from(ModelSettings(), StoreSettings(AWS_STORAGE_BUCKET_NAME="media"))  # type: ignore[call-arg]


def typed(*words: str) -> dict[str, Any]:
    """Return the fields of the options behind `a fox`."""
    seen: list[tuple[GenerateOptions, int]] = []
    command = typer.Typer()

    @command.command()
    @with_generate_options
    def order(order: GenerateOptions, count: Annotated[int, typer.Option()] = 3) -> None:
        seen.append((order, count))

    done = CliRunner().invoke(command, ["a fox", *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    [(made, count)] = seen
    assert count == 3
    return fields_of(made)


def drawn(rules: JobRules, *words: str) -> Job:
    return job_of(rules, message(**typed(*words)))


def at(key: str) -> ObjectRef:
    return ObjectRef("media", key)


# --- The options


def test_both_commands_take_the_same_options_beside_their_own() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    names = {name: {option.name for option in commands[name].params} for name in ("generate", "submit")}
    both = {field.name for field in fields(GenerateOptions)}

    assert names["submit"] - both == {"generation_id", "priority", "queue", "timeout"}
    assert names["generate"] - both == {"out"}
    assert both <= names["submit"] & names["generate"]


def test_command_keeps_its_name_and_help() -> None:
    shown = CliRunner().invoke(app, ["submit", "--help"]).output

    assert "Publish a job and follow it until it ends" in shown
    assert "--generation-id" in shown
    assert "required" in shown


def test_prompt_alone_gives_no_other_field() -> None:
    assert typed() == {"prompt": "a fox"}


# --- What becomes of them


def test_the_plain_options_reach_the_job(rules: JobRules) -> None:
    job = drawn(rules, *EVERYTHING_PLAIN)

    assert "a fox" in job.prompt
    assert job.negative_prompt.startswith("blurry, ")
    assert (job.style, job.industry) == ("anime", "cafe")
    assert job.adapters == (JobAdapter(at("a.safetensors"), 0.5), JobAdapter(at("b/"), 0.5))
    assert (job.signature_ref, job.artist_name, job.aspect) == (at("s.png"), "서울", (1, 2))
    assert (job.num_inference_steps, job.guidance_scale, job.seeds, job.scheduler) == (9, 0, (7, 8), "euler")
    assert job.guidance_rescale == 0.7
    assert job.kind is Kind.TEXT2IMAGE


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (["--init", "a.png"], Kind.IMAGE2IMAGE),
        (["--init", "a.png", "--mask", "m.png"], Kind.INPAINT),
        (["--reference", "a.png", "--reference", "b.png"], Kind.EDIT),
        (["--product", "p.png"], Kind.PRODUCT),
        (["--cutout", "c.png", "--composite", "x.png"], Kind.PRODUCT),
        (["--init", "a.png", "--mask", "m.png", "--kind", "inpaint"], Kind.INPAINT),
    ],
)
def test_the_kind_is_that_of_the_images(rules: JobRules, words: list[str], kind: Kind) -> None:
    assert drawn(rules, *words).kind is kind


def test_a_model_reaches_the_job_by_its_name(rules: JobRules) -> None:
    assert drawn(replace(rules, model_names=("default", "photo")), "--model", "photo").model == "photo"
    assert drawn(rules).model == "default"


def test_an_image_to_begin_from_reaches_the_job(rules: JobRules) -> None:
    job = drawn(rules, "--init", "a.png", "--mask", "m.png", "--strength", "0.4", "--fit", "contain")

    assert job.source == JobSource(at("a.png"), at("m.png"), 0.4)
    assert job.fit is Fit.CONTAIN


def test_an_image_to_follow_reaches_the_job(rules: JobRules) -> None:
    edges = drawn(rules, "--control", "c.png", "--control-model", "canny", "--control-scale", "0.5", "--control-edges")
    plain = drawn(rules, "--control", "c.png", "--control-model", "pose")

    assert edges.control == JobControl(at("c.png"), "canny", 0.5, 0.0, 1.0, Preprocess.CANNY)
    assert plain.control == JobControl(at("c.png"), "pose", 1.0, 0.0, 1.0, Preprocess.NONE)


def test_a_product_reaches_the_job(rules: JobRules) -> None:
    placed = ("--layout-scale", "0.3", "--layout-position", "bottom-left", "--refine", "0.2")
    product = drawn(rules, "--product", "p.png", "--background", "b.png", *placed).product

    assert product is not None
    assert (product.image_ref, product.background_ref, product.cutout_ref) == (at("p.png"), at("b.png"), None)
    assert (product.layout, product.refine_strength) == (Layout(0.3, Position.BOTTOM_LEFT), 0.2)


def test_headlines_reach_the_job(rules: JobRules) -> None:
    placed = ("--text-position", "top-center", "--text-color", "#ff0000", "--text-size", "0.1")
    job = drawn(rules, "--text", "서울", "--text", "Open", *placed)

    assert [overlay.text for overlay in job.overlays] == ["서울", "Open"]
    assert {(one.position, one.colour, one.size) for one in job.overlays} == {(Position.TOP_CENTER, "#ff0000", 0.1)}
    assert drawn(rules, "--text", "Open", "--text-size", "fit").overlays == (TextOverlay("Open"),)


# --- What does not go together


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--scale", "1"], "--scale belongs to --lora"),
        (["--control-scale", "1"], "--control-scale belongs to --control"),
        (["--control-edges"], "--control-edges belongs to --control"),
        (["--control", "a.png"], "--control needs --control-model"),
        (["--text-color", "auto"], "--text-color belongs to --text"),
        (["--text", "a", "--text-size", "big"], "neither a number nor fit"),
        (["--kind", "sketch"], "sketch"),
        (["--fit", "stretch"], "stretch"),
    ],
)
def test_option_without_effect_is_refused(words: list[str], reason: str) -> None:
    done = CliRunner().invoke(app, ["submit", "a fox", "--generation-id", "1", *words], env=ENOUGH)

    assert done.exit_code == 2
    assert reason in " ".join(done.output.replace("│", " ").split())


ENOUGH = {
    "COLUMNS": "200",
    "AWS_STORAGE_BUCKET_NAME": "media",
    "BACKEND_API_URL": "http://b",
    "INTERNAL_API_TOKEN": "t",
}


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--strength", "0.5"], "data.strength belongs to kind"),
        (["--layout-scale", "0.5"], "data.product belongs to kind product"),
        (["--mask", "m.png"], "needs data.init_image_path"),
        (["--kind", "text2image", "--init", "a.png"], "data.init_image_path belongs to kind"),
        (["--text", "a", "--text-size", "nan"], "data.text_overlay"),
        (["--product", "p.png", "-n", "2"], "data.num_images"),
        (["--style", "nope"], "data.style 'nope' is not known"),
        (["--init", "/etc/passwd"], "init_image_path"),
    ],
)
def test_other_mistakes_are_refused_as_a_message_s_fields_are(rules: JobRules, words: list[str], reason: str) -> None:
    assert reason in str(rejection_of(rules, message(**typed(*words))))


def test_submit_publishes_nothing_that_would_be_refused() -> None:
    done = CliRunner().invoke(app, ["submit", "a fox", "--generation-id", "1", "--mask", "m.png"], env=ENOUGH)

    assert done.exit_code == 1
    assert "needs data.init_image_path" in done.output
    assert "published" not in done.output


# --- generate reads files of this machine


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--init", "none.png"], "none.png"),
        (["--init", "s3://media/a.png"], "is in a store, which is not read here"),
        (["--signature", "black.png", "--init", "torn.png"], "init_image_path: the picture is no PNG"),
        (["--init", "black.png", "--mask", "black.png"], "nothing in the mask is white"),
        (["--text", "\ue000"], "U+E000"),
        (["--cutout", "black.png"], "product.cutout_path has no transparent part"),
        (["--control", "black.png", "--control-model", "canny"], "control.model 'canny'"),
    ],
)
def test_generate_reports_a_mistake_in_an_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODEL_ID", str(DEMO_MODEL / "checkpoint"))
    Image.new("L", (64, 64)).save(tmp_path / "black.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "black.png").read_bytes()[:60])

    done = CliRunner().invoke(app, ["generate", "a fox", "-o", "out.png", *words], env={"COLUMNS": "200"})

    assert done.exit_code == 1
    assert "Not drawn" in done.output
    assert reason in done.output
    assert not (tmp_path / "out.png").exists()
