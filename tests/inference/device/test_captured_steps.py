"""Captured steps on a fake CUDA device at full size: what the graph holds, and what the host launches beside it."""

from collections.abc import Callable, Iterator

import pytest
import torch

from inference.device.forward_graphs import EAGER_RUNS
from tests.support.cuda.cuda_stand_ins import why_not
from tests.support.cuda.fake_cuda import FakeCuda
from tests.support.cuda.tally import Tally
from tests.support.long import long_but
from tests.support.models.full_models import FAMILIES, FullModel

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

NUM_LANES = 4
# Beside the graph's own launch: what a step launches outside the denoiser, the copies of its inputs and of its result.
# Z-Image's captions are padded one by one.
MOST_LAUNCHES = {"sd15": 24, "sdxl": 32, "z-image": 36}


class TalliedCapture:
    """Captures nothing: it tallies the forward that it is to capture, and how often that is replayed."""

    num_bytes = 0

    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        self.tally = Tally()
        self.num_replays = 0

    def warm_up(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        return work()

    def capture(self, work: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        with self._cuda.counting() as self.tally:
            output = work()

        def replay() -> torch.Tensor:
            self.num_replays += 1
            return output

        return replay

    def release(self) -> None:
        """Have nothing to give back."""


@pytest.fixture
def model(name: str) -> Iterator[FullModel]:
    cuda = FakeCuda()
    with cuda.installed():
        yield FullModel(cuda, name)


# FLUX.1's and FLUX.2's forwards are not captured.
@pytest.mark.parametrize("name", long_but([name for name in FAMILIES if name not in {"flux", "klein"}], "sd15"))
def test_a_captured_step_uploads_nothing_waits_for_nothing_and_is_one_launch_beside_the_copies(
    model: FullModel, name: str
) -> None:
    capture = TalliedCapture(model.cuda)
    model.family.capture_forwards(capture)
    # Captions of one length, as Z-Image's graphs take them.
    lanes = model.lanes(NUM_LANES, model.mixed(NUM_LANES), prompt="a red thing")

    _, eager, *_ = [model.step(lanes) for _ in range(EAGER_RUNS + 1)]
    step = model.step(lanes)

    assert capture.tally.events == []
    # Without what pads captions.
    assert capture.tally.num_kernels("denoiser") >= 0.95 * eager.num_kernels("denoiser")
    assert capture.num_replays == 1
    assert step.num_kernels("denoiser") == 0
    assert step.num_kernels("outside") <= MOST_LAUNCHES[name]
    assert step.stalls == []
