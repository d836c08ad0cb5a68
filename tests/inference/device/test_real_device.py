"""What only a real GPU can do to the engine: run out of memory, and break."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from config.model import ModelSettings
from inference.errors import RequestFailed
from inference.lane import Lane
from inference.process.child import EXIT_BROKEN
from inference.process.child_handle import ChildHandle
from inference.process.engine_process import EngineProcess, wait_until_ready
from inference.request import GenerationRequest
from tests.support.engine.asserting_child import FUSE
from tests.support.engine.engine_requests import request_of
from tests.support.engine.watched_engine import PATIENCE_SECONDS, WatchedEngine, WatchedModel, submit_together
from tests.support.images.parity import MIN_PSNR_DB, TEST_DEVICE, draw, images_of, psnr, settings_of
from tests.support.models.tiny_models import build_tiny_sd

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not TEST_DEVICE.startswith("cuda"), reason="DARKROOM_TEST_DEVICE names no CUDA device"),
]

SIDE = 512
MOST_LANES = 64


class MeasuredModel(WatchedModel):
    """`num_bytes`: what the last forward took at its peak, beyond what was allocated before."""

    num_bytes = 0

    def denoise(self, lanes: Sequence[Lane]) -> list[torch.Tensor]:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        predictions = super().denoise(lanes)
        self.num_bytes = torch.cuda.max_memory_allocated() - before
        return predictions


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_sd(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def engine(tiny: Path) -> Iterator[WatchedEngine]:
    made = WatchedEngine(tiny, MeasuredModel, MAX_CONCURRENT_GENERATIONS=MOST_LANES)
    yield made
    made.close()


@contextmanager
def memory_of(num_bytes: int) -> Iterator[None]:
    """Limit the memory of this process, what is allocated already included."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(num_bytes / torch.cuda.get_device_properties(0).total_memory)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def large(seed: int) -> GenerationRequest:
    return request_of(request_id=str(seed), width=SIDE, height=SIDE, seeds=(seed,), num_inference_steps=4)


def bytes_of_large(engine: WatchedEngine) -> tuple[int, int]:
    """Measure the peak of one large image, in a forward and while it is decoded."""
    before = torch.cuda.memory_allocated()
    draw(engine, large(0))
    assert isinstance(engine.model, MeasuredModel)
    return engine.model.num_bytes, torch.cuda.max_memory_allocated() - before


def test_a_batch_that_finds_no_memory_is_halved_and_every_image_is_right(engine: WatchedEngine) -> None:
    of_forward, of_decoder = bytes_of_large(engine)
    room = 2 * max(of_forward, of_decoder)
    requests = [large(seed) for seed in range(min(MOST_LANES, 2 * room // of_forward + 2))]
    alone = [draw(engine, request)[0] for request in requests[:3]]
    engine.model.batches.clear()

    with memory_of(torch.cuda.memory_allocated() + room):
        together = [call.image for call in submit_together(engine, requests)]

    sizes = [len(batch) for batch in engine.model.batches]
    assert max(sizes) * of_forward > room, "there was room for all"
    assert len(together) == len(requests)
    assert min(psnr(one, other) for one, other in zip(together, alone, strict=False)) >= MIN_PSNR_DB


def test_an_image_that_fits_no_memory_fails_alone_and_the_next_is_drawn(engine: WatchedEngine) -> None:
    of_forward, _ = bytes_of_large(engine)

    with memory_of(torch.cuda.memory_allocated() + of_forward // 4):
        with pytest.raises(RequestFailed) as failure:
            draw(engine, large(0))
        (small,) = draw(engine, request_of(width=64, height=64))

    assert failure.value.code == "GPU_OOM"
    assert small.size == (64, 64)


def test_an_assertion_on_the_device_ends_the_child_and_the_next_one_draws(tiny: Path) -> None:
    children: list[ChildHandle] = []

    def spawn(settings: ModelSettings) -> ChildHandle:
        children.append(ChildHandle.spawn(settings, module="tests.support.engine.asserting_child"))
        return children[-1]

    engine = EngineProcess(settings_of(tiny), log_level="INFO", on_restart=lambda: None, spawn=spawn)
    engine.start()
    wait_until_ready(engine, PATIENCE_SECONDS)
    (tiny / FUSE).touch()

    future = engine.generate(request_of(width=64, height=64), lambda _: None, lambda: False)
    (image,) = images_of(future.result(PATIENCE_SECONDS))
    engine.close()

    assert image.size == (64, 64)
    assert [child.process.returncode for child in children][:1] == [EXIT_BROKEN]
    assert len(children) == 2
