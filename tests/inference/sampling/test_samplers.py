"""A lane's denoise steps against plain diffusers' schedulers, driven by random predictions."""

from collections.abc import Iterator
from itertools import pairwise, product
from typing import Any

import diffusers
import pytest
import torch

from inference.errors import RequestFailed
from inference.sampling import samplers as sampling
from inference.sampling.samplers import Sampler, Samplers, SchedulerSampler, TrajectorySampler
from inference.sampling.schedulers import DIFFUSION, FLOW, SchedulerTable, parameters_of, set_timesteps
from inference.sampling.source_blend import SourceLatents
from inference.sampling.trajectory import StepPlan, derive_trajectory
from tests.support.copies import NOWHERE, Copies
from tests.support.long import long
from tests.support.paths import DEMO_MODEL

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (4, 8, 8)
MASK = (torch.arange(8) < 5).float().expand(1, 8, 8)
MAX_RELATIVE_ERROR = 1e-4
# Euler's course from pure noise begins at 4096 times the noise, nearly all of which is taken away again. What 32 bits
# leave of the rest depends on the order of adding up.
ROUNDING = 2.0**-22

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CONFIGS: dict[str, Any] = {
    "as Stable Diffusion 1.5": BETAS
    | {"clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1},
    "as the demo model": diffusers.DPMSolverMultistepScheduler.load_config(DEMO_MODEL / "checkpoint" / "scheduler"),
    "clipping": diffusers.DDIMScheduler(**BETAS, clip_sample=True, steps_offset=1).config,
    "thresholding": diffusers.DDIMScheduler(**BETAS, clip_sample=False, thresholding=True).config,
    "from pure noise": diffusers.DDIMScheduler(
        **BETAS,
        clip_sample=False,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    ).config,
}
FLOWS: dict[str, Any] = {
    "a flow as Z-Image Turbo": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config,
    "a flow by size": diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).config,
    "a flow that draws": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True).config,
}
SHIFT = 0.8
CASES = [(name, config) for config in CONFIGS for name in DIFFUSION.makers]
CASES += [(name, config) for config in FLOWS for name in FLOW.makers if config != "a flow that draws"]
CASES += [("euler", "a flow that draws")]
CLIPPED = {("clipping", name) for name in ("ddim", "heun", "lcm")}
CLIPPED |= {("thresholding", name) for name in DIFFUSION.makers if name not in ("euler", "euler_a", "heun")}
LONG_PLAN = 30
# diffusers' own mistake: the first two timesteps are equal, and it begins with the second and ends beyond the last.
BEGINS_LATE = ("dpm++_karras", "from pure noise", LONG_PLAN)
# Its second evaluation multiplies what 32 bits leave of the first, and the plain scheduler errs more than ours.
ROUNDED = ("heun", "from pure noise")


def table_of(config: Any) -> SchedulerTable:
    return FLOW if config in FLOWS.values() else DIFFUSION


def begin(config: str, name: str, num_steps: int, seed: int) -> tuple[str, Sampler]:
    """Begin a sampler from a checkpoint of this scheduler config."""
    found = (CONFIGS | FLOWS)[config]
    shift = SHIFT if found.get("use_dynamic_shifting") else None
    return Samplers(table_of(found), found).begin(StepPlan(name, num_steps, shift), *noise_of(seed))


class Plain:
    """What diffusers' own pipeline does with a scheduler, a step at a time."""

    def __init__(self, name: str, config: Any, num_steps: int, noise: torch.Tensor, generator: torch.Generator) -> None:
        self.is_flow = config in FLOWS.values()
        _, self.scheduler = table_of(config).make(name, config)
        # The pipelines' tests hold the noise levels of a flow; here they only have to be the same.
        set_timesteps(self.scheduler, num_steps, SHIFT if config.get("use_dynamic_shifting") else None)
        self.times = self.scheduler.timesteps
        self.latents = noise[None] * (1 if self.is_flow else self.scheduler.init_noise_sigma)
        takes_generator = "generator" in parameters_of(type(self.scheduler).step)
        self.extra = {"generator": generator} if takes_generator else {}

    def steps(self, predictions: Iterator[torch.Tensor]) -> Iterator[tuple[float, torch.Tensor, torch.Tensor]]:
        """Yield each step's timestep, the model's input before it, and the latents after it."""
        for now, prediction in zip(self.times, predictions, strict=False):
            model_input = self.latents if self.is_flow else self.scheduler.scale_model_input(self.latents, now)
            self.latents = self.scheduler.step(prediction[None], now, self.latents, return_dict=False, **self.extra)[0]
            yield float(now), model_input[0], self.latents[0]


class PlainInpainting(Plain):
    """What diffusers' inpainting pipelines do: without the first steps, the picture kept where the mask is 0."""

    def __init__(self, name: str, config: Any, num_steps: int, num_skipped: int, image: torch.Tensor) -> None:
        self.noise, generator = noise_of(1)
        super().__init__(name, config, num_steps, self.noise, generator)
        begin = num_skipped * self.scheduler.order
        self.times = self.scheduler.timesteps[begin:]
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(begin)
        self.image = image
        self.latents = self.noised(self.times[:1])

    def noised(self, times: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor
        if hasattr(self.scheduler, "scale_noise"):
            made = self.scheduler.scale_noise(self.image[None], times, self.noise[None])
        else:
            made = self.scheduler.add_noise(self.image[None], self.noise[None], times)
        return made

    def steps(self, predictions: Iterator[torch.Tensor]) -> Iterator[tuple[float, torch.Tensor, torch.Tensor]]:
        for index, (now, prediction) in enumerate(zip(self.times, predictions, strict=False)):
            model_input = self.latents if self.is_flow else self.scheduler.scale_model_input(self.latents, now)
            stepped = self.scheduler.step(prediction[None], now, self.latents, return_dict=False, **self.extra)[0]
            is_last = index == len(self.times) - 1
            kept = self.image[None] if is_last else self.noised(self.times[index + 1 : index + 2])
            self.latents = (1 - MASK) * kept + MASK * stepped
            yield float(now), model_input[0], self.latents[0]


def noise_of(seed: int) -> tuple[torch.Tensor, torch.Generator]:
    """Return a lane's noise, and the generator where the noise left it."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SHAPE, generator=generator), generator


def predictions_of(seed: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 + seed)
    while True:
        yield torch.randn(SHAPE, generator=generator)


def is_near(ours: torch.Tensor, theirs: torch.Tensor, *, largest: torch.Tensor) -> bool:
    """Return whether they are equal but for rounding, where the latents were as large as `largest` on the way."""
    allowed = MAX_RELATIVE_ERROR * theirs.abs().max() + ROUNDING * largest
    return bool((ours - theirs).abs().max() <= allowed)


def assert_follows(sampler: Sampler, plain: Plain, seed: int) -> None:
    """Assert that at every step of the plan the sampler is where the plain scheduler is."""
    assert sampler.num_steps == len(plain.times)
    ours = predictions_of(seed)
    largest = sampler.latents.abs().max()
    for index, (timestep, model_input, latents) in enumerate(plain.steps(predictions_of(seed))):
        assert sampler.step_index == index
        assert sampler.timestep == timestep
        assert is_near(sampler.model_input(), model_input, largest=largest), f"input of step {index}"
        sampler.advance(next(ours))
        assert is_near(sampler.latents, latents, largest=largest), f"step {index}"
        largest = largest.maximum(latents.abs().max())
    assert sampler.step_index == sampler.num_steps


@pytest.mark.parametrize(
    ("name", "config", "num_steps"),
    [
        pytest.param(*case, steps, marks=long if steps == LONG_PLAN else ())
        for case, steps in product(CASES, (1, 2, 6, LONG_PLAN))
        if (*case, steps) != BEGINS_LATE and case != ROUNDED
    ],
)
def test_every_step_is_the_one_that_the_plain_scheduler_takes(name: str, config: str, num_steps: int) -> None:
    reported_name, sampler = begin(config, name, num_steps, seed=1)

    assert reported_name == name
    assert_follows(sampler, Plain(name, (CONFIGS | FLOWS)[config], num_steps, *noise_of(1)), seed=1)


@pytest.mark.parametrize(("name", "config"), CASES)
def test_a_lane_with_a_source_and_a_mask_is_always_where_plain_diffusers_inpainting_is(name: str, config: str) -> None:
    num_skipped = 3
    found = (CONFIGS | FLOWS)[config]
    image = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    plan = StepPlan(name, 8, SHIFT if found.get("use_dynamic_shifting") else None, num_skipped)

    _, sampler = Samplers(table_of(found), found).begin(plan, *noise_of(1), SourceLatents(image, mask=MASK == 1))

    assert_follows(sampler, PlainInpainting(name, found, 8, num_skipped, image), seed=1)


def test_step_plan_that_diffusers_begins_late_is_taken_from_its_first_step() -> None:
    name, config, num_steps = BEGINS_LATE
    with pytest.raises(IndexError):
        list(Plain(name, CONFIGS[config], num_steps, *noise_of(1)).steps(predictions_of(1)))

    _, sampler = begin(config, name, num_steps, seed=1)

    begun = Plain(name, CONFIGS[config], num_steps, *noise_of(1))
    begun.scheduler.set_begin_index(0)
    assert_follows(sampler, begun, seed=1)


@pytest.mark.parametrize("name", DIFFUSION.makers)
def test_every_number_of_steps_is_taken_from_pure_noise(name: str) -> None:
    samplers = Samplers(DIFFUSION, CONFIGS["from pure noise"])

    for num_steps in range(1, 51):
        samplers.prepare(StepPlan(name, num_steps))


@pytest.mark.parametrize("num_steps", [1, 2, 6, LONG_PLAN])
def test_heun_from_pure_noise_takes_the_steps_of_its_paper_in_64_bits(num_steps: int) -> None:
    name, config = ROUNDED
    _, euler = DIFFUSION.make("euler", CONFIGS[config])
    euler.set_timesteps(num_steps)

    _, sampler = begin(config, name, num_steps, seed=1)

    predictions = predictions_of(1)
    for latents in heun_in_64_bits(noise_of(1)[0].double(), euler.sigmas.double(), predictions_of(1)):
        sampler.advance(next(predictions))
        assert is_near(sampler.latents, latents, largest=torch.tensor(0.0))
    assert sampler.step_index == sampler.num_steps


def heun_in_64_bits(
    noise: torch.Tensor, sigmas: torch.Tensor, predictions: Iterator[torch.Tensor]
) -> Iterator[torch.Tensor]:
    """Yield the latents after each evaluation: algorithm 1 of Karras et al. 2022 without churn, with velocities."""

    def slope(latents: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        variance = sigma**2 + 1
        x0 = latents / variance - next(predictions).double() * sigma / variance.sqrt()
        return (latents - x0) / sigma

    latents = noise * sigmas[0]
    for sigma, following in pairwise(sigmas):
        first = slope(latents, sigma)
        tentative = latents + first * (following - sigma)
        yield tentative
        if following > 0:
            latents = latents + (first + slope(tentative, following)) / 2 * (following - sigma)
            yield latents


def test_more_steps_than_a_scheduler_can_take_are_refused_before_the_first() -> None:
    with pytest.raises(RequestFailed, match="60 steps") as failure:
        Samplers(DIFFUSION, CONFIGS["as Stable Diffusion 1.5"]).prepare(StepPlan("lcm", 60))

    assert failure.value.code == "INVALID_INPUT"


@pytest.mark.parametrize(("name", "config"), CASES)
def test_every_scheduler_that_does_not_clip_is_a_trajectory(name: str, config: str) -> None:
    _, sampler = begin(config, name, 12, seed=1)

    assert type(sampler) is (SchedulerSampler if (config, name) in CLIPPED else TrajectorySampler)


@pytest.mark.parametrize(
    ("name", "config", "num_drawn"),
    [
        ("euler_a", "as Stable Diffusion 1.5", 5),
        ("lcm", "as Stable Diffusion 1.5", 4),  # none at the last step
        ("lcm", "clipping", 4),
        ("lcm", "a flow by size", 5),
        ("euler", "a flow that draws", 5),
        ("dpm++", "as Stable Diffusion 1.5", 0),
    ],
)
def test_a_lane_draws_noise_at_the_steps_at_which_its_scheduler_draws(name: str, config: str, num_drawn: int) -> None:
    found = (CONFIGS | FLOWS)[config]
    noise, generator = noise_of(1)
    shift = SHIFT if found.get("use_dynamic_shifting") else None
    _, sampler = Samplers(table_of(found), found).begin(StepPlan(name, 5, shift), noise, generator)

    for _ in range(5):
        sampler.advance(noise)

    _, expected = noise_of(1)
    for _ in range(num_drawn):
        torch.randn(SHAPE, generator=expected)
    assert torch.equal(generator.get_state(), expected.get_state())


@pytest.mark.parametrize(("name", "config"), sorted({*CASES} - {("unipc", "thresholding")}))
def test_no_lane_s_step_waits_for_the_device(name: str, config: str) -> None:
    """But UniPC's own with dynamic thresholding, which is for pictures without a VAE: it copies and reads numbers."""
    found = (CONFIGS | FLOWS)[config]
    samplers = Samplers(table_of(found), found)
    noise, generator = noise_of(1)
    plan = StepPlan(name, 3, SHIFT if found.get("use_dynamic_shifting") else None)
    samplers.prepare(plan)

    with Copies() as copies:
        _, sampler = samplers.begin(plan, noise.to(NOWHERE, non_blocking=True), generator)
        for _ in range(sampler.num_steps):
            sampler.model_input()
            sampler.advance(torch.empty(SHAPE, device=NOWHERE))

    assert not copies.blocking


def test_lanes_of_one_step_plan_share_its_weights_on_the_device() -> None:
    samplers = Samplers(DIFFUSION, CONFIGS["as Stable Diffusion 1.5"])
    noise = torch.empty(SHAPE, device=NOWHERE)

    with Copies() as copies:
        for _ in range(3):
            samplers.begin(StepPlan("dpm++", 4), noise, torch.Generator())

    assert copies.num_async == 1
    assert not copies.blocking


@pytest.mark.parametrize("name", DIFFUSION.makers)
def test_lanes_of_one_scheduler_advance_in_turns_without_a_trace_in_each_other(name: str) -> None:
    config = CONFIGS["as Stable Diffusion 1.5"]
    samplers = Samplers(DIFFUSION, config)
    lanes = [
        (
            samplers.begin(StepPlan(name, num_steps), *noise_of(seed))[1],
            Plain(name, config, num_steps, *noise_of(seed)),
            seed,
        )
        for seed, num_steps in enumerate((9, 9, 9, 6))
    ]

    predictions = [predictions_of(seed) for _, _, seed in lanes]
    for step in range(max(sampler.num_steps for sampler, _, _ in lanes)):
        for (sampler, _, _), own in zip(lanes, predictions, strict=True):
            if step < sampler.num_steps:
                sampler.advance(next(own))

    for sampler, plain, seed in lanes:
        *_, (_, _, latents) = plain.steps(predictions_of(seed))
        assert is_near(sampler.latents, latents, largest=latents.abs().max())


def test_a_lane_s_latents_are_its_own_and_change_only_by_advancing() -> None:
    noise, generator = noise_of(1)
    _, sampler = Samplers(DIFFUSION, CONFIGS["as Stable Diffusion 1.5"]).begin(StepPlan("ddim", 4), noise, generator)
    before, prediction = sampler.latents.clone(), torch.ones(SHAPE)

    noise.zero_()
    assert torch.equal(sampler.latents, before)
    sampler.advance(prediction)
    after = sampler.latents.clone()
    prediction.zero_()
    sampler.model_input()

    assert torch.equal(sampler.latents, after)
    assert not torch.equal(after, before)


def test_a_trajectory_is_found_once_for_all_lanes_of_its_scheduler_and_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    # Counted, because the time it saves is no pass mark.
    traced: list[int] = []

    def derive_and_count(plan: StepPlan, scheduler: Any) -> Any:
        traced.append(plan.num_steps)
        return derive_trajectory(plan, scheduler)

    monkeypatch.setattr(sampling, "derive_trajectory", derive_and_count)
    samplers = Samplers(DIFFUSION, CONFIGS["clipping"])

    samplers.prepare(StepPlan("unipc", 8))
    for seed in range(3):
        samplers.begin(StepPlan("unipc", 8), *noise_of(seed))
    # That there is none is worth remembering as well.
    for seed in range(3):
        samplers.begin(StepPlan("ddim", 9), *noise_of(seed))
    samplers.begin(StepPlan("unipc", 7), *noise_of(0))
    samplers.begin(StepPlan(None, 6), *noise_of(0))
    samplers.begin(StepPlan("dpm++", 6), *noise_of(0))

    assert traced == [8, 9, 7, 6]


def test_an_unknown_scheduler_is_refused_by_name() -> None:
    samplers = Samplers(DIFFUSION, CONFIGS["as the demo model"])

    with pytest.raises(RequestFailed, match=r"plms.*known are dpm") as failure:
        samplers.prepare(StepPlan("plms", 8))

    assert failure.value.code == "INVALID_INPUT"
