"""The engine's use of a CUDA device, at full size: kernels a step, and where the host would wait for the device."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch

from inference.device.device import Device
from inference.engine.previews import Previews
from inference.lane import Conditioning, Embedding, Lane
from inference.models.inputs import sampler_of
from inference.request import Reference, Source
from tests.support.cuda.cuda_stand_ins import why_not
from tests.support.cuda.fake_cuda import FakeCuda
from tests.support.cuda.kernel_table import NUM_LANES, count_step
from tests.support.long import long, long_but
from tests.support.models.full_models import ATTENTION, FAMILIES, FullModel
from tests.support.models.full_pipelines import CONTROLNETS

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

# SDXL's UNet is the same code, and is built in ten seconds.
NAMES = long_but(FAMILIES, "sd15", "z-image")
UNET_NAMES = long_but(["sd15", "sdxl"], "sd15")


class Ceiling(NamedTuple):
    """The most kernels of one step: of the denoiser without adapters, of what the mix of adapters adds to it, and of
    all else. To be lowered whenever a step gets shorter."""

    denoiser: int
    bank: int
    outside: int


CEILINGS = {
    ("sd15", 1): Ceiling(695, 112, 10),
    ("sd15", 4): Ceiling(695, 112, 19),
    ("sd15", 10): Ceiling(695, 112, 37),
    ("sdxl", 1): Ceiling(1714, 490, 13),
    ("sdxl", 4): Ceiling(1714, 490, 25),
    ("sdxl", 10): Ceiling(1714, 490, 49),
    ("z-image", 1): Ceiling(2621, 170, 6),
    ("z-image", 4): Ceiling(2729, 170, 24),
    ("z-image", 10): Ceiling(3309, 170, 60),
    ("flux", 1): Ceiling(3125, 114, 13),
    ("flux", 4): Ceiling(3163, 114, 22),
    ("flux", 10): Ceiling(3163, 114, 40),
    ("klein", 1): Ceiling(1124, 60, 13),
    ("klein", 4): Ceiling(1134, 60, 22),
    ("klein", 10): Ceiling(1134, 60, 40),
}
# Outside the denoiser, of two lanes.
NOISY_CEILING = 30


class Models:
    """Full-size families, each built when it is first asked for, its first step behind it: what is computed once and
    kept is there."""

    def __init__(self) -> None:
        self._models: dict[str, FullModel] = {}

    def model(self, name: str) -> FullModel:
        if name not in self._models:
            cuda = FakeCuda()
            with cuda.installed():
                self._models[name] = FullModel(cuda, name)
                if "text2image" in self._models[name].family.kinds:
                    self._models[name].step(self._models[name].lanes(1))
        return self._models[name]


@pytest.fixture(scope="module")
def models() -> Models:
    return Models()


@pytest.fixture
def model(models: Models, name: str) -> Iterator[FullModel]:
    """Build the model called `name`, on a fake device that exists while the test runs."""
    found = models.model(name)
    with found.cuda.installed():
        yield found


def source_of(model: FullModel, *, is_masked: bool = False) -> Source:
    num_pixels = model.family.base_size**2
    return Source(bytes(3 * num_pixels), 0.6, b"\x00\xff" * (num_pixels // 2) if is_masked else None)


def images_of(model: FullModel) -> dict[str, Any]:
    """Build the images of a request that begins from one, or of an edit."""
    if "image2image" in model.family.kinds:
        return {"source": source_of(model)}
    return {"references": (Reference(1000, 700, bytes(3 * 1000 * 700)),) * 2}


def stalls_of(model: FullModel, lanes: Sequence[Lane]) -> list[str]:
    """List the waits of the host in a step of lanes that have taken one before."""
    model.step(lanes)
    return model.step(lanes).stalls


def tripled(embedding: Embedding) -> Embedding:
    """Triple the embedding, as of a text of three times as many chunks."""
    return replace(embedding, tokens=torch.cat([embedding.tokens] * 3))


# --- Steps


@pytest.mark.parametrize("num_lanes", long_but(NUM_LANES, 4))
@pytest.mark.parametrize("name", NAMES)
def test_a_step_launches_no_more_kernels_than_its_ceiling_and_waits_for_nothing(
    model: FullModel, name: str, num_lanes: int
) -> None:
    step, ceiling = count_step(model, num_lanes), CEILINGS[name, num_lanes]

    assert step.stalls == ()
    over = {part: getattr(step, part) for part, most in ceiling._asdict().items() if getattr(step, part) > most}
    assert over == {}, f"more than {ceiling}"


@pytest.mark.parametrize("name", UNET_NAMES)
@pytest.mark.parametrize("scheduler", long_but(["euler_a", "lcm"], "lcm"))
def test_a_step_of_a_scheduler_that_draws_noise_is_as_short_as_others_and_waits_for_nothing(
    model: FullModel, name: str, scheduler: str
) -> None:
    lanes = model.lanes(2, scheduler=scheduler)
    model.step(lanes)
    step = model.step(lanes)

    assert step.stalls == []
    assert step.num_kernels("outside") <= NOISY_CEILING


@pytest.mark.parametrize("name", ["z-image"])
def test_captions_of_any_length_share_a_step_without_a_mask(model: FullModel, name: str) -> None:
    step = model.step(model.lanes(4))

    assert step.num_masked_attentions == 0


@pytest.mark.parametrize("name", UNET_NAMES)
def test_a_step_of_prompts_of_one_and_of_three_chunks_waits_for_nothing(model: FullModel, name: str) -> None:
    one, three = model.lanes(2)
    conditioning = three.owner.conditioning
    assert conditioning is not None
    assert conditioning.negative is not None
    three.owner.conditioning = Conditioning(tripled(conditioning.positive), tripled(conditioning.negative))

    assert stalls_of(model, [one, three]) == []


@pytest.mark.parametrize("name", long_but([*(name for name in FAMILIES if name != "klein"), "sd15-inpaint"], "sd15"))
def test_inpainting_step_waits_for_nothing(model: FullModel, name: str) -> None:
    lanes = model.lanes(2, source=source_of(model, is_masked=True))

    assert stalls_of(model, lanes) == []


@pytest.mark.parametrize("name", long_but(CONTROLNETS, "sd15", "z-image"))
def test_a_step_with_a_controlnet_for_one_of_two_lanes_waits_for_nothing(model: FullModel, name: str) -> None:
    lanes = model.lanes(2, [(), *model.mixed(1)], [model.guide()])

    assert stalls_of(model, lanes) == []


@pytest.mark.parametrize("name", UNET_NAMES)
def test_rescaled_guidance_of_one_of_two_lanes_makes_no_step_wait(model: FullModel, name: str) -> None:
    requests = [model.request(0, guidance_rescale=0.7), model.request(1)]
    lanes = model.join(requests, [(), ()], [None, None])

    assert stalls_of(model, lanes) == []


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_at_a_scale_of_its_own_makes_no_step_wait(model: FullModel, name: str) -> None:
    lanes = model.lanes(1, [model.adapted(8, ATTENTION, scale=0.7)])

    assert stalls_of(model, lanes) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_preview_makes_no_step_wait(model: FullModel, name: str) -> None:
    previews = Previews(model.family, Device(model.family.device), every=1)
    (lane,) = model.lanes(1)
    (prediction,) = model.family.denoise([lane])
    # The first finds the projection, in the warm-up.
    previews.project(lane, prediction)
    previews.deliver()
    lane.owner.preview = None

    with model.cuda.counting() as tally:
        previews.project(lane, prediction)
        sampler_of(lane).advance(prediction)
        previews.deliver()

    assert tally.stalls == []
    assert lane.owner.preview is not None


@long
@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_whose_weights_come_later_takes_the_same_steps(name: str) -> None:
    cuda = FakeCuda()
    with cuda.installed():
        model = FullModel(cuda, name, is_hosted=True)
        steps = [model.step(model.lanes(2, [(), *model.mixed(1)], negative_prompt="blurry")) for _ in range(2)]
        (lane,) = model.lanes(1, source=source_of(model))
        model.step([lane])
        model.family.decode(sampler_of(lane).latents)

    assert steps[-1].stalls == []


# --- Joining and leaving


@pytest.mark.parametrize("name", NAMES)
def test_lanes_that_join_wait_for_no_step_that_is_running(model: FullModel, name: str) -> None:
    fields: Any = {"negative_prompt": "blurry", "prompt": "not encoded before"}
    with model.cuda.counting() as tally:
        model.lanes(2, [(), *model.mixed(1)], **fields)
        model.lanes(1, **images_of(model), **fields)

    assert tally.stalls == []


@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_decoded_without_waiting_for_the_device(model: FullModel, name: str) -> None:
    (lane,) = model.lanes(1)

    with model.cuda.counting() as tally:
        model.family.decode(sampler_of(lane).latents)

    assert tally.stalls == []
