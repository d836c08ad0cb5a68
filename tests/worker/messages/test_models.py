"""Jobs that name one of the worker's models, and the settings that name them."""

import pytest
from pydantic import ValidationError

from config.model import DEFAULT_MODEL, DEFAULT_MODEL_ID, ModelSettings
from config.store import StoreSettings
from tests.worker.messages.test_decoder import job_of, message, rejection_of
from worker.messages.decoder import rules_from
from worker.messages.rules import JobRules

# Variables that are for the default model alone.
OF_DEFAULT = {
    "INFERENCE_STEPS": 20,
    "GUIDANCE_SCALE": 5,
    "GUIDANCE_RESCALE": 0.7,
    "MODEL_CONFIG": "/configs",
    "VAE_ID": "/vae",
    "CONTROLNETS": "edges=/edges",
}


def settings_with(models: str, **variables: object) -> ModelSettings:
    return ModelSettings.model_validate({"MODELS": models, **variables})


@pytest.fixture
def rules() -> JobRules:
    """Build the rules of a worker with three models."""
    store = StoreSettings(AWS_STORAGE_BUCKET_NAME="media")  # type: ignore[call-arg]
    return rules_from(settings_with("photo=owner/photo,ink=/models/ink.safetensors", **OF_DEFAULT), store)


@pytest.mark.parametrize("name", ["photo", "ink", "default"])
def test_a_job_has_the_model_that_it_names(rules: JobRules, name: str) -> None:
    assert job_of(rules, message(model=name)).model == name


@pytest.mark.parametrize("given", [{}, {"model": None}, {"model": ""}])
def test_a_job_without_a_model_has_the_default_one(rules: JobRules, given: dict[str, str | None]) -> None:
    assert job_of(rules, message(**given)).model == DEFAULT_MODEL


@pytest.mark.parametrize("name", ["Photo", "owner/photo", "photo ", "flux", "../ink", "a" * 100, "é\u202e"])
def test_a_model_that_the_worker_lacks_is_refused_with_the_list(rules: JobRules, name: str) -> None:
    rejection = rejection_of(rules, message(model=name))

    assert rejection.code == "UNKNOWN_MODEL"
    assert str(rejection).endswith("is not known: this worker has default, photo, ink")


@pytest.mark.parametrize("name", ["a" * 101, 7, ["photo"], "photo\0", "\ud800"])
def test_a_model_that_is_no_name_is_invalid(rules: JobRules, name: object) -> None:
    rejection = rejection_of(rules, message(model=name))

    assert rejection.code == "INVALID_INPUT"
    assert "model" in str(rejection)


def test_a_worker_with_one_model_refuses_a_job_for_another_rather_than_draw_it_with_that() -> None:
    rules = rules_from(ModelSettings(), StoreSettings(AWS_STORAGE_BUCKET_NAME="media"))  # type: ignore[call-arg]

    assert rejection_of(rules, message(model="photo")).code == "UNKNOWN_MODEL"
    assert job_of(rules, message(model="default")).model == DEFAULT_MODEL


def test_defaults_of_the_settings_are_for_the_default_model_alone(rules: JobRules) -> None:
    default, other = (job_of(rules, message(model=name)) for name in ("default", "photo"))

    assert (default.num_inference_steps, default.guidance_scale, default.guidance_rescale) == (20, 5, 0.7)
    assert (other.num_inference_steps, other.guidance_scale, other.guidance_rescale) == (None, None, 0)


def test_settings_of_another_model_have_nothing_of_the_default_one_s_own() -> None:
    settings = settings_with("photo=owner/photo", DTYPE="float16", ADAPTER_SLOTS=8, **OF_DEFAULT)
    other, default = settings.of_model("photo"), settings.of_model(DEFAULT_MODEL)

    assert other == ModelSettings.model_validate({"MODEL_ID": "owner/photo", "DTYPE": "float16", "ADAPTER_SLOTS": 8})
    assert default == ModelSettings.model_validate({"DTYPE": "float16", "ADAPTER_SLOTS": 8, **OF_DEFAULT})
    assert default.model_id == DEFAULT_MODEL_ID
    assert settings.model_names == ("default", "photo")


@pytest.mark.parametrize(
    "given",
    ["photo", "photo=", "=owner/photo", "a=x,a=y", "default=x", "pho to=x", "a/b=x", "a=x,,b", "a" * 101 + "=x"],
)
def test_models_that_are_no_pairs_of_name_and_source_are_refused(given: str) -> None:
    with pytest.raises(ValidationError, match="MODELS"):
        settings_with(given)


def test_graphs_are_refused_with_several_models() -> None:
    with pytest.raises(ValidationError, match="cannot be graphs with MODELS"):
        settings_with("photo=x", COMPILE="graphs")
    assert settings_with("photo=x", COMPILE="blocks").compile == "blocks"
