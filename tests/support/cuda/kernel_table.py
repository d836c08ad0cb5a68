"""Print the kernels of a denoise step at full size: `python -m tests.support.cuda.fake_cuda [FAMILY ...]`."""

import argparse
from typing import NamedTuple

from tests.support.cuda.fake_cuda import FakeCuda
from tests.support.models.full_models import FAMILIES, FullModel

NUM_LANES = (1, 4, 10)


class Step(NamedTuple):
    """Kernels of one step: of the plain denoiser, of what the adapters add to it, and of all else; and what the host
    waited for."""

    denoiser: int
    bank: int
    outside: int
    num_masked_attentions: int
    stalls: tuple[str, ...]


def count_step(model: FullModel, num_lanes: int) -> Step:
    """Count a plain step and one with the adapters of the mix."""
    plain = model.step(model.lanes(num_lanes))
    adapted = model.step(model.lanes(num_lanes, model.mixed(num_lanes)))
    return Step(
        plain.num_kernels("denoiser"),
        adapted.num_kernels("denoiser") - plain.num_kernels("denoiser"),
        max(plain.num_kernels("outside"), adapted.num_kernels("outside")),
        plain.num_masked_attentions,
        (*plain.stalls, *adapted.stalls),
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", default=list(FAMILIES), help=", ".join(FAMILIES))
    print(f"{'family':10} {'lanes':>5} {'denoiser':>9} {'bank adds':>10} {'outside':>8} {'plain':>7} {'adapted':>8}")
    for name in parser.parse_args().families:
        cuda = FakeCuda()
        with cuda.installed():
            model = FullModel(cuda, name)
            model.step(model.lanes(1))  # what is computed once and kept
            for num_lanes in NUM_LANES:
                step = count_step(model, num_lanes)
                plain = step.denoiser + step.outside
                counts = f"{step.denoiser:9} {step.bank:10} {step.outside:8} {plain:7} {plain + step.bank:8}"
                print(f"{name:10} {num_lanes:5} {counts}", *step.stalls, sep="\n  ", flush=True)
