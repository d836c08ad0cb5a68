"""Estimate what `benchmarks.gpu` measures, where no GPU is: `python -m tests.support.cuda.estimates [MODEL:PIXELS]`.

The engine and its rivals run at full size over fake CUDA tensors, and each kernel takes what `roofline` says of its
shapes. Two assumptions are the ends of what is likely for a rival: a fast host and kernels that are as fast alone as in
a batch, and neither. The last line is JSON.
"""

import argparse
import json
from typing import Any, NamedTuple

from benchmarks.gpu.models.bench_model import MODELS, BenchModel
from benchmarks.gpu.models.jobs import NUM_JOBS
from inference.lora.layers import PAGE_RANK
from inference.models.inputs import sampler_of
from tests.support.cuda import roofline
from tests.support.cuda.fake_cuda import FakeCuda
from tests.support.cuda.rivals import JobCost, Rival, jobs_of
from tests.support.cuda.roofline import PEAK_FLOPS, Assumption, Part
from tests.support.cuda.tally import Tally
from tests.support.models.full_models import FullModel

CASES = ("sd15:512", "sdxl:1024", "z-image:1024", "z-image:512")
# PyTorch's own calls on a fast CPU, and a forward of many small modules in Python as it was timed on a slow one.
ASSUMPTIONS = {"best for rivals": Assumption(5e-6, False), "worst for rivals": Assumption(20e-6, True)}
# diffusers' load and unload of an adapter on 128 layers took 0.31 s on a CPU (docs/benchmarks.md).
LOAD_SECONDS_PER_LAYER = 0.31 / 128
# From pinned memory over PCIe 5.0 x16.
UPLOAD_BYTES_PER_SECOND = 50e9
BLOCKS = "blocks"
# The job of rank 16 on all linear layers.
LONE_JOB = 5
LONE_RANK = 16


class Step(NamedTuple):
    """A step as it is, and with `COMPILE=blocks`: elementwise kernels of the denoiser's blocks fused."""

    eager: Part
    compiled: Part


class Estimate(NamedTuple):
    """The parts of ten jobs by the engine and by its rivals, and of one job alone."""

    name: str
    steps: int
    plain: Step
    adapted: Step
    lone: Step
    encoding: Part
    decoding: Part
    denoiser_flops: int
    page_bytes: int
    preloaded: list[JobCost]
    hotswapped: JobCost
    load_seconds: float

    def engine_seconds(self, step: Part, assumption: Assumption) -> float:
        """Return the engine's seconds for ten jobs in one batch; no image is decoded beside a step."""
        around = (self.encoding, *[self.decoding] * NUM_JOBS)
        return self.steps * step.seconds(assumption) + sum(part.seconds(assumption) for part in around)

    def rival_seconds(self, assumption: Assumption) -> dict[str, float]:
        """Return the seconds of A, P and B for ten jobs. B's launches and its swaps take none."""
        preloaded = sum(self._job_seconds(job, assumption) for job in self.preloaded)
        hotswapped = NUM_JOBS * self._job_seconds(self.hotswapped, assumption._replace(launch_seconds=0.0))
        return {"A": preloaded + self.load_seconds, "P": preloaded, "B": hotswapped}

    def _job_seconds(self, job: JobCost, assumption: Assumption) -> float:
        return self.steps * job.step.seconds(assumption) + job.rest.seconds(assumption)


def estimate(name: str, pixels: int) -> Estimate:
    """Run the engine and its rivals over fake tensors."""
    cuda = FakeCuda()
    with cuda.installed():
        parts = _engine_parts(FullModel(cuda, name), MODELS[name], pixels)
        rival = Rival(cuda, name, pixels)
        return Estimate(
            name=f"{name} {pixels}",
            steps=MODELS[name].steps,
            preloaded=[rival.preloaded(job) for job in rival.jobs],
            hotswapped=rival.hotswapped(),
            load_seconds=sum(map(rival.num_layers, rival.jobs)) * LOAD_SECONDS_PER_LAYER,
            **parts,
        )


def figures_of(found: Estimate) -> dict[str, Any]:
    """Return the figures for the line of JSON, by assumption."""
    return {
        "case": found.name,
        "upload_ms": -(-LONE_RANK // PAGE_RANK) * found.page_bytes / UPLOAD_BYTES_PER_SECOND * 1000,
        **{name: _figures_under(found, assumption) for name, assumption in ASSUMPTIONS.items()},
    }


def main() -> None:
    """Print the tables and the line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=CASES, help=" ".join(CASES))
    results = []
    for case in parser.parse_args().cases:
        name, pixels = case.split(":")
        results.append(figures_of(estimate(name, int(pixels))))
        _print_tables(results[-1])
    print(json.dumps({"estimates": "H200, by shapes", "jobs": NUM_JOBS, "results": results}))


def _engine_parts(full: FullModel, model: BenchModel, pixels: int) -> dict[str, Any]:
    for block in full.denoiser.modules():
        if type(block).__name__ in full.denoiser._repeated_blocks:
            full.cuda.watch(block, BLOCKS)
    jobs = jobs_of(model)
    rows = [tuple(applied for kind in job for applied in full.adapted(kind.rank, kind.endings)) for job in jobs]
    fields: dict[str, Any] = {"width": pixels, "height": pixels}
    full.step(full.lanes(1, prompt="what is computed once and kept", negative_prompt="blurry", **fields))
    with full.cuda.counting() as encoding:
        lanes = full.lanes(NUM_JOBS, **fields)
    plain = full.step(lanes)
    with full.cuda.counting() as decoding:
        full.family.decode(sampler_of(lanes[0]).latents)
    return {
        "plain": _step_of(plain),
        "adapted": _step_of(full.step(full.lanes(NUM_JOBS, rows, **fields))),
        "lone": _step_of(full.step(full.lanes(1, rows[LONE_JOB : LONE_JOB + 1], **fields))),
        "encoding": _step_of(encoding).eager,
        "decoding": _step_of(decoding).eager,
        "denoiser_flops": roofline.flops(_all_launches(plain)),
        "page_bytes": full.family.bank.num_bytes // (full.family.bank.num_pages + 1),
    }


def _step_of(tally: Tally) -> Step:
    blocks = roofline.fused(tally.launches[BLOCKS])
    others = [launch for part, launches in tally.launches.items() if part != BLOCKS for launch in launches]
    eager, compiled = roofline.eager(_all_launches(tally)), [*roofline.eager(others), *blocks]
    return Step(Part.of(eager), Part.of(compiled))


def _all_launches(tally: Tally) -> list[roofline.Launch]:
    return [launch for launches in tally.launches.values() for launch in launches]


def _figures_under(found: Estimate, assumption: Assumption) -> dict[str, Any]:
    sides = {kind: found.engine_seconds(getattr(found.adapted, kind), assumption) for kind in Step._fields}
    rivals = found.rival_seconds(assumption)
    return {
        "steps": {kind: _step_figures(found, kind, assumption) for kind in Step._fields},
        "decode_ms": found.decoding.gpu_seconds(assumption) * 1000,
        "images_per_second": {side: NUM_JOBS / seconds for side, seconds in (sides | rivals).items()},
        "ratios": {
            side: {rival: theirs / seconds for rival, theirs in rivals.items()} for side, seconds in sides.items()
        },
    }


def _step_figures(found: Estimate, kind: str, assumption: Assumption) -> dict[str, float]:
    plain, adapted, lone = (getattr(step, kind) for step in (found.plain, found.adapted, found.lone))
    at_peak = found.denoiser_flops / PEAK_FLOPS
    plain_seconds, seconds = plain.gpu_seconds(assumption), adapted.gpu_seconds(assumption)
    return {
        "plain_ms": plain_seconds * 1000,
        "adapted_ms": seconds * 1000,
        "tax": seconds / plain_seconds,
        "plain_share": at_peak / plain_seconds,
        "adapted_share": at_peak / seconds,
        "launches": adapted.num_launches,
        "lone_ms": lone.gpu_seconds(assumption) * 1000,
        "lone_launches": lone.num_launches,
        "lone_over_gpu_time": lone.seconds(assumption) / lone.gpu_seconds(assumption),
    }


def _print_tables(figures: dict[str, Any]) -> None:
    print(f"\n{figures['case']}; upload of an adapter {figures['upload_ms']:.2f} ms")
    for name in ASSUMPTIONS:
        own = figures[name]
        print(f"  {name}; decoding an image {own['decode_ms']:.1f} ms")
        for kind, step in own["steps"].items():
            print(f"    {kind:9}", ", ".join(f"{key} {value:.4g}" for key, value in step.items()))
        print(
            "    images a second:", ", ".join(f"{side} {value:.3g}" for side, value in own["images_per_second"].items())
        )
        for kind, ratios in own["ratios"].items():
            print(f"    {kind} over", ", ".join(f"{rival} {ratio:.2f}" for rival, ratio in ratios.items()))


if __name__ == "__main__":
    main()
