"""The checkpoint's own safety checker: it flags what plain diffusers flags, and what is flagged goes nowhere."""

import json
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS
from inference.checkpoints.checkpoint import identify
from inference.checkpoints.pipeline import weight_bytes
from inference.engine.local_engine import LocalEngine
from inference.errors import EngineStartFailed, RequestFailed
from inference.request import GenerationRequest
from tests.support.engine.engine_requests import request_of
from tests.support.images.parity import MIN_PSNR_DB, draw, plain, psnr, settings_of
from tests.support.long import long
from tests.support.models.ldm_layout import write_single_file
from tests.support.models.tiny_models import build_tiny_sd, load_pipe
from tests.support.models.tiny_safety import EVERYTHING, NOTHING, add_tiny_checker, nearness
from tests.support.world import new_world

pytestmark = pytest.mark.usefixtures("one_thread")

SEEDS = tuple(range(6))


@pytest.fixture(scope="module")
def unchecked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a checkpoint without a safety checker."""
    return build_tiny_sd(tmp_path_factory.mktemp("unchecked") / "tiny-sd")


@pytest.fixture(scope="module")
def checked(unchecked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the same with a checker that flags some of its images and not the others."""
    folder = shutil.copytree(unchecked, tmp_path_factory.mktemp("checked") / "tiny-sd")
    add_tiny_checker(folder, NOTHING)
    pipe = load_pipe(folder)
    found = sorted(nearness(pipe, plain(pipe, tiny_request(seed))) for seed in SEEDS)
    # In the middle of the widest gap, as the checker rounds to thousandths.
    below, above = max(pairwise(found), key=lambda pair: pair[1] - pair[0])
    return add_tiny_checker(folder, (below + above) / 2)


@pytest.fixture(scope="module")
def engine(checked: Path) -> Iterator[LocalEngine]:
    made = LocalEngine(settings_of(checked, SAFETY_CHECKER="on"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def flagged(checked: Path) -> dict[int, bool]:
    """Return the seeds whose images plain diffusers flags."""
    pipe = load_pipe(checked)
    return {seed: is_flagged_by(pipe, tiny_request(seed)) for seed in SEEDS}


def tiny_request(*seeds: int) -> GenerationRequest:
    return request_of(width=64, height=64, num_inference_steps=2, seeds=seeds)


def is_flagged_by(pipe: Any, request: GenerationRequest) -> bool:
    """Return whether plain diffusers flags the image, which it blackens."""
    return plain(pipe, request).getextrema() == ((0, 0), (0, 0), (0, 0))


def refusal_of(engine: LocalEngine, request: GenerationRequest) -> RequestFailed:
    with pytest.raises(RequestFailed) as caught:
        draw(engine, request)
    return caught.value


def test_an_image_is_flagged_exactly_when_plain_diffusers_flags_it(
    engine: LocalEngine, unchecked: Path, flagged: dict[int, bool]
) -> None:
    assert set(flagged.values()) == {True, False}
    pipe = load_pipe(unchecked)

    for seed, is_flagged in flagged.items():
        if is_flagged:
            assert refusal_of(engine, tiny_request(seed)).code == "NSFW_CONTENT"
        else:
            assert psnr(draw(engine, tiny_request(seed))[0], plain(pipe, tiny_request(seed))) >= MIN_PSNR_DB


def test_one_flagged_image_of_several_fails_the_request(engine: LocalEngine, flagged: dict[int, bool]) -> None:
    clean, bad = [[seed for seed, is_bad in flagged.items() if is_bad == wanted] for wanted in (False, True)]

    refused = refusal_of(engine, tiny_request(clean[0], bad[0]))

    assert (refused.code, str(refused)) == (
        "NSFW_CONTENT",
        "the model's safety checker flagged the picture, which was not stored",
    )


def test_engine_starts_with_a_checker_that_flags_every_picture_and_gives_none(unchecked: Path, tmp_path: Path) -> None:
    """The first picture is the engine's own."""
    folder = add_tiny_checker(shutil.copytree(unchecked, tmp_path / "tiny-sd"), EVERYTHING)
    strict = LocalEngine(settings_of(folder, SAFETY_CHECKER="on"))

    assert refusal_of(strict, tiny_request(0, 1)).code == "NSFW_CONTENT"
    strict.close()


def test_disabled_checker_is_not_loaded_and_flags_nothing(checked: Path, flagged: dict[int, bool]) -> None:
    bad = next(seed for seed, is_bad in flagged.items() if is_bad)
    unasked = LocalEngine(settings_of(checked))

    (drawn,) = draw(unasked, tiny_request(bad))
    unasked.close()

    assert drawn.getextrema() != ((0, 0), (0, 0), (0, 0))
    assert unasked.default.family.safety_checker is None


def test_enabled_checker_s_weights_are_counted(checked: Path) -> None:
    off, on = (weight_bytes(identify(str(checked), None, has_checker=has), 4) for has in (False, True))

    assert off is not None
    assert on is not None
    checker = load_pipe(checked).safety_checker
    assert on == off | {"safety_checker": sum(parameter.nbytes for parameter in checker.parameters())}


# --- It is on, and there is none that could be believed


def why_not(model_id: Path) -> str:
    with pytest.raises(EngineStartFailed) as caught:
        LocalEngine(settings_of(model_id, SAFETY_CHECKER="on"))
    assert "SAFETY_CHECKER" in str(caught.value) or "safety_checker" in str(caught.value)
    return str(caught.value)


def test_checkpoint_without_a_checker_is_refused(unchecked: Path) -> None:
    assert why_not(unchecked).startswith(f"SAFETY_CHECKER is on, but MODEL_ID '{unchecked}' ships none: ")


def test_family_without_a_checker_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))

    assert "is a StableDiffusionXLPipeline, which has none" in why_not(tmp_path)


def test_a_single_file_is_refused(unchecked: Path, tmp_path: Path) -> None:
    assert "is a single file, which holds none" in why_not(
        write_single_file(tmp_path / "sd.safetensors", load_pipe(unchecked))
    )


def test_a_checker_short_of_weights_is_refused(checked: Path, tmp_path: Path) -> None:
    """What is missing would be random, and the checker flag nothing."""
    folder = shutil.copytree(checked, tmp_path / "model")
    weights = folder / "safety_checker" / "model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    del tensors["concept_embeds"]
    safetensors.torch.save_file(tensors, weights, metadata={"format": "pt"})

    assert "the config of its safety_checker describes" in why_not(folder)


def test_a_checker_that_is_a_pickle_is_refused(checked: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checked, tmp_path / "model")
    weights = folder / "safety_checker" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))

    assert "pytorch_model.bin is a pickle, which is never opened" in why_not(folder)


# --- Through a whole worker


@long
def test_a_flagged_job_fails_once_and_nothing_of_it_is_stored(
    rabbitmq: RabbitMQ, s3_server: SeaweedFS, unchecked: Path, tmp_path: Path
) -> None:
    # Given a checker that flags every picture, the engine's first one too
    folder = add_tiny_checker(shutil.copytree(unchecked, tmp_path / "tiny-sd"), EVERYTHING)
    with new_world(rabbitmq, s3_server, tmp_path) as world:
        world.start_worker(MODEL_ID=str(folder), SAFETY_CHECKER="on").wait_until_ready()

        generation_id = world.publish(num_images=2)

        end = world.wait_for_end(generation_id)
        assert (end.kind, end.body["error_code"], end.body["retry_count"]) == ("failed", "NSFW_CONTENT", 0)
        world.wait_until_clean()
        assert len(world.backend.ends(generation_id)) == 1
        assert world.keys("generations/") == []
