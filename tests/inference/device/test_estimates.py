"""Estimates of a GPU's figures: of parts that are known, and of the smallest model."""

import pytest

from benchmarks.gpu.models.bench_model import MODELS
from benchmarks.gpu.models.flops import FLOPS_PER_ROW
from tests.support.cuda.cuda_stand_ins import why_not
from tests.support.cuda.estimates import ASSUMPTIONS, Estimate, Step, estimate, figures_of
from tests.support.cuda.rivals import JobCost, jobs_of
from tests.support.cuda.roofline import PEAK_FLOPS, Assumption, Part
from tests.support.long import long

BEST, WORST = ASSUMPTIONS


def part(milliseconds: float, num_launches: int = 0) -> Part:
    """Build a part that small kernels make twice as long."""
    return Part(milliseconds / 1000, milliseconds / 500, num_launches)


def known(rival: Part) -> Estimate:
    """Build an estimate of ten steps: of 100 ms by the engine for ten lanes, of `rival` for one job of A, P and B."""
    cost = JobCost(rival, part(0))
    return Estimate(
        name="known",
        steps=10,
        plain=Step(part(80), part(80)),
        adapted=Step(part(100), part(50)),
        lone=Step(part(10, 3000), part(10)),
        encoding=part(0),
        decoding=part(0),
        denoiser_flops=round(0.04 * PEAK_FLOPS),
        page_bytes=10**6,
        preloaded=[cost] * 10,
        hotswapped=cost,
        load_seconds=1.0,
    )


def test_a_step_takes_as_long_as_the_slower_of_gpu_and_host() -> None:
    assert part(10, 1000).seconds(Assumption(5e-6, is_in_waves=False)) == pytest.approx(0.010)
    assert part(10, 1000).seconds(Assumption(5e-6, is_in_waves=True)) == pytest.approx(0.020)
    assert part(10, 3000).seconds(Assumption(5e-6, is_in_waves=False)) == pytest.approx(0.015)


def test_figures_are_of_ten_jobs_in_one_batch_against_ten_one_after_another() -> None:
    figures = figures_of(known(part(20, 10_000)))[BEST]

    # 10 steps of 100 ms; ten jobs of 10 steps, each 50 ms of launches that B does not wait for; a second of loading.
    assert figures["images_per_second"] == pytest.approx({"eager": 10, "compiled": 20, "A": 10 / 6, "P": 2, "B": 5})
    assert figures["ratios"]["eager"] == pytest.approx({"A": 6, "P": 5, "B": 2})
    step = figures["steps"]["eager"]
    assert (step["tax"], step["plain_share"], step["lone_over_gpu_time"]) == pytest.approx((1.25, 0.5, 1.5))


def test_jobs_are_those_of_the_benchmark() -> None:
    jobs = jobs_of(MODELS["sd15"])

    assert [[kind.rank for kind in job] for job in jobs] == [[4], [8], [16], [128], [8], [16], [4], [16], [], [4, 16]]


@long
@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_estimates_of_stable_diffusion_have_its_flops_and_order_its_rivals() -> None:
    found = estimate("sd15", 512)
    figures = figures_of(found)

    assert found.denoiser_flops == pytest.approx(20 * FLOPS_PER_ROW["sd15"], rel=0.01)
    for assumption in ASSUMPTIONS:
        speeds = figures[assumption]["images_per_second"]
        assert speeds["A"] < speeds["P"] < speeds["B"]
        assert speeds["P"] < speeds["eager"] < speeds["compiled"]
        assert 1.0 < figures[assumption]["steps"]["eager"]["tax"] < 1.1
    for rival, ratio in figures[BEST]["ratios"]["eager"].items():
        assert ratio < figures[WORST]["ratios"]["eager"][rival]
    launches = [job.step.num_launches for job in found.preloaded]
    assert min(launches) == launches[8]  # without an adapter
    assert max(launches) == launches[9]  # with two
