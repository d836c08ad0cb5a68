"""Captured forwards of every family: batches that change between replays, and those that run eagerly."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import pytest
import torch
from diffusers import DiffusionPipeline

from inference.device.forward_graphs import EAGER_RUNS
from inference.errors import EngineStartFailed
from inference.lane import Lane
from inference.lora.products import paged_products
from inference.request import AdapterFile, GenerationRequest
from tests.support.cuda.recorded_capture import RecordedCapture
from tests.support.cuda.reference_kernel import add_pages
from tests.support.engine.engine_requests import request_of
from tests.support.engine.watched_engine import WatchedEngine, WatchedModel, submit_together
from tests.support.images.parity import draw, psnr
from tests.support.long import long_but
from tests.support.models.tiny_adapters import ATTENTION, write_adapter
from tests.support.models.tiny_models import build_tiny_sd, build_tiny_sdxl, build_tiny_z_image

pytestmark = [pytest.mark.usefixtures("one_thread", "no_forward_failed")]

BUILDERS: dict[str, Callable[[Path], Path]] = {
    "sd": build_tiny_sd,
    "sdxl": build_tiny_sdxl,
    "z_image": build_tiny_z_image,
}
# More rows in one product add up in another order.
SAME_DB = 60.0
NUM_BATCHES = 12
LONG = "a red fox sits on a green hill, under a wide sky, and looks at the sea. " * 2


class NotingModel(WatchedModel):
    """Notes the heights of the images in each forward of any engine of it, and whether it ran eagerly."""

    forwards: ClassVar[list[tuple[set[int], bool]]] = []

    def denoise(self, lanes: Sequence[Lane]) -> list[torch.Tensor]:
        predictions = super().denoise(lanes)
        self.forwards.append(({lane.owner.request.height for lane in lanes}, self.ran_eagerly))
        return predictions


class Pair:
    """Two engines of one checkpoint, the first with captured forwards; and adapters for it."""

    def __init__(self, name: str, checkpoint: Path) -> None:
        self.name, self.checkpoint = name, checkpoint
        self.capture = RecordedCapture(add_pages)
        self.adapters = adapters_of(checkpoint)
        self.captured = WatchedEngine(checkpoint, NotingModel)
        # As on a GPU: the products of adapters are the kernel's.
        self.captured.model.bank._has_kernel = True
        self.captured.model.capture_forwards(self.capture)
        self.eager = WatchedEngine(checkpoint)

    def close(self) -> None:
        self.captured.close()
        self.eager.close()

    def assert_equal(self, requests: Sequence[GenerationRequest]) -> None:
        """Assert that drawn together by replays, each gives the image that it gives alone without."""
        calls = submit_together(self.captured, requests)
        ratios = [psnr(call.image, draw(self.eager, call.request)[0]) for call in calls]
        assert min(ratios) >= SAME_DB, ratios


def adapters_of(checkpoint: Path) -> list[AdapterFile]:
    """Write adapters of three ranks, two of them for more layers than those of attention."""
    pipe = DiffusionPipeline.from_pretrained(checkpoint)
    more = ("ff.net.2",) if hasattr(pipe, "unet") else ("feed_forward.w1", "cap_embedder.1", "all_x_embedder.2-1")
    files = []
    for rank, others in ((4, ()), (16, more), (40, more)):
        path = checkpoint.parent / f"rank{rank}.safetensors"
        write_adapter(path, pipe, layout="diffusers_new", rank=rank, seed=rank, targets=(*ATTENTION, *others))
        files.append(AdapterFile(path, None, 0.7))
    return files


@pytest.fixture(scope="module", params=long_but(list(BUILDERS), "sd", "z_image"))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Iterator[Pair]:
    made = Pair(request.param, BUILDERS[request.param](tmp_path_factory.mktemp(request.param) / "checkpoint"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paged_products, "launch", made.capture.launch)
        yield made
    made.close()


def job(seed: int, **fields: Any) -> GenerationRequest:
    return request_of(**{"width": 64, "height": 64, "num_inference_steps": 6, "seeds": (seed,)} | fields)


def mixed_batches(adapters: Sequence[AdapterFile]) -> Iterator[list[GenerationRequest]]:
    """Yield batches of jobs that differ in adapters, scales, sizes, guidance and steps, so that lanes leave early."""
    random = Random(18)
    for number in range(NUM_BATCHES):
        size = random.choice((64, 64, 80))
        yield [
            job(
                random.randrange(1000),
                width=size,
                prompt=random.choice(("a red fox", "a hill")),
                guidance_scale=random.choice((0.0, 5.0)),
                num_inference_steps=random.choice((4, 6, 9)),
                adapters=tuple(
                    replace(one, scale=random.choice((0.4, 1.0, -0.5)))
                    for one in random.sample(list(adapters), number % 3)
                ),
            )
            for _ in range(random.randrange(1, 6))
        ]


def test_replays_give_the_images_of_eager_forwards_whatever_changes_between_them(pair: Pair) -> None:
    for requests in mixed_batches(pair.adapters):
        pair.assert_equal(requests)

    assert pair.capture.num_replays > pair.capture.num_captures


def assert_eager(pair: Pair, requests: Sequence[GenerationRequest]) -> None:
    """Assert that every forward with one of the requests runs eagerly. No other test draws their height."""
    pair.assert_equal(requests)

    height = requests[0].height
    ran_eagerly = [is_eager for heights, is_eager in NotingModel.forwards if height in heights]
    assert ran_eagerly == [True] * len(ran_eagerly)
    assert len(ran_eagerly) > EAGER_RUNS + 1


def test_prompts_of_different_lengths_run_eagerly(pair: Pair) -> None:
    requests = [job(1, height=96), job(2, height=96, prompt=LONG * 2)]

    assert_eager(pair, requests)


def test_an_adapter_of_convolutions_that_read_neighbours_runs_eagerly(pair: Pair, tmp_path: Path) -> None:
    if pair.name == "z_image":
        pytest.skip("it has none")
    path = tmp_path / "conv.safetensors"
    pipe = DiffusionPipeline.from_pretrained(pair.checkpoint)
    write_adapter(path, pipe, layout="diffusers_new", rank=4, targets=(*ATTENTION, "conv1"))

    assert_eager(pair, [job(1, height=112, adapters=(AdapterFile(path, None, 1.0),))])


# --- The start


def test_graphs_need_a_gpu(pair: Pair) -> None:
    with pytest.raises(EngineStartFailed, match=r"^COMPILE=graphs needs a GPU, .*: set COMPILE=blocks$"):
        WatchedEngine(pair.checkpoint, COMPILE="graphs", DEVICE="cpu")


def test_an_offloaded_model_is_not_captured(pair: Pair) -> None:
    denoiser = pair.eager.model._denoiser
    denoiser._hf_hook = object()

    with pytest.raises(EngineStartFailed, match=r"^COMPILE=graphs needs the whole model on the GPU"):
        pair.eager.model.capture_forwards(RecordedCapture())

    del denoiser._hf_hook


# --- Out of memory


class CrowdedModel(NotingModel):
    """Finds no memory for several lanes while there are graphs."""

    def denoise(self, lanes: Sequence[Lane]) -> list[torch.Tensor]:
        if len(lanes) > 1 and self.num_bytes_of_graphs:
            self.batches.append(list(lanes))
            raise torch.OutOfMemoryError("the graphs have it")
        return super().denoise(lanes)


def test_a_step_without_memory_drops_the_graphs_and_keeps_its_lanes(tmp_path: Path) -> None:
    capture = RecordedCapture()
    engine = WatchedEngine(build_tiny_sd(tmp_path / "checkpoint"), CrowdedModel)
    engine.model.capture_forwards(capture)
    draw(engine, job(1))
    assert capture.num_captures == 1
    engine.model.batches.clear()

    calls = submit_together(engine, [job(2), job(3)])

    assert [call.image.size for call in calls] == [(64, 64)] * 2
    assert capture.num_releases >= 1
    # The batch that found no memory, and the same once more.
    tries = [len(batch) for batch in engine.model.batches if len(batch) > 1]
    assert tries[0] == tries[1]
    engine.close()
