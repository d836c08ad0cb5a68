"""Stage 4: Z-Image, 1024x1024, 8 steps, captions of 32 to 160 tokens; the baselines draw three jobs."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_z_image import ZSingleStreamAttnProcessor
from torch.nn import functional

from benchmarks.gpu.clocks import time_calls
from benchmarks.gpu.speed.forwards import Forwards
from benchmarks.gpu.speed.speed import Speed, run_speed
from benchmarks.gpu.stage import Context, Figures

# Of unequal captions; ten would take a third of the time box.
NUM_LANES = 4


def run(context: Context) -> None:
    """Measure the model, and beside what every family has its mask and its norms."""
    run_speed(context, "z-image", _measure_own)


def _measure_own(speed: Speed) -> None:
    context = speed.context
    usual = Forwards(speed.model, speed.copied(), context.device, speed.jobs)

    def against(change: Callable[[Any], None]) -> Figures:
        changed = Forwards(speed.model, speed.copied(), context.device, speed.jobs)
        change(changed.denoiser)
        return compare(context, usual, changed)

    context.measure("attention behind a mask", lambda: against(_use_mask))
    context.measure("norms by F.rms_norm", lambda: against(_use_fused_norms))


def compare(context: Context, usual: Forwards, changed: Forwards) -> Figures:
    """Compare a plain step of four lanes with the changed one: time, and distance of the predictions."""
    before, after = (one.step(NUM_LANES, has_adapters=False) for one in (usual, changed))
    differences = [float((one - other).norm() / one.norm()) for one, other in zip(before, after, strict=True)]
    steps = [partial(one.step, NUM_LANES, has_adapters=False) for one in (usual, changed)]
    times = [time_calls(context, step, warm_ups=1) for step in steps]
    return {
        "usual_ms": times[0].steady_ms,
        "changed_ms": times[1].steady_ms,
        "ratio": times[1].steady_ms / times[0].steady_ms,
        "largest_difference": max(differences),
    }


def _use_mask(transformer: Any) -> None:
    """Use diffusers' own attention, which masks the ends of the shorter rows."""
    for blocks in (transformer.noise_refiner, transformer.context_refiner, transformer.layers):
        for block in blocks:
            block.attention.set_processor(ZSingleStreamAttnProcessor())


def _use_fused_norms(transformer: Any) -> None:
    """Use one kernel in place of six."""
    for module in transformer.modules():
        if isinstance(module, RMSNorm):
            module.forward = _fused(module)


def _fused(norm: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: functional.rms_norm(x, norm.dim, norm.weight, norm.eps)
