"""Stage 5: results of a set of jobs where the device's memory runs out, and where the device itself fails.

The limits are this process's own, derived from what was measured just before: the set is drawn once without any. On a
CPU a counter sums what the model allocates, and raises what CUDA's allocator raises.
"""

import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from PIL import Image

from benchmarks.gpu.models.bench_model import BenchModel, model_of
from benchmarks.gpu.models.jobs import NUM_JOBS, make_jobs, request_of
from benchmarks.gpu.shortage.lives import Lives
from benchmarks.gpu.shortage.memory import Memory, memory_of
from benchmarks.gpu.shortage.short_engine import ShortEngine
from benchmarks.gpu.stage import Context, Figures
from benchmarks.sets import Job, image_of, psnr_db
from inference.errors import RequestFailed
from inference.request import AdapterFile, GenerationRequest, GenerationResult, StepReport

# As far as the same job in a smaller batch may differ: its sums are added up in another order, in 16 bits.
RIGHT_DB = 30.0
STEPS = 4
# What a set is left with, of what its forward of all lanes takes; decoding must still fit.
SHARE_FOR_HALVING = 0.45
MARGIN = 1.2
# Against the set's size: its single forward takes more than ten of the set's lanes.
TOO_LARGE = 4
CONV_RANK = 8
# The steps of a request beside which an adapter waits: it comes at the second of these, the memory at the third. Time
# enough to read it, and to ask for room several times.
STEPS_BESIDE, SHORT_FROM, SHORT_TO = 24, 1, 16
RESULT_SECONDS = 120.0


def run(context: Context) -> None:
    """Measure each shortage, then what is left of the memory, then the process that loses its device."""
    with tempfile.TemporaryDirectory() as folder, Lives(Path(folder) / "lives", context) as lives:
        context.measure("engine process begins", lives.begin)
        try:
            _measure_shortages(context, Path(folder) / "adapters")
        finally:
            context.measure("device assert", lives.end)


def _measure_shortages(context: Context, folder: Path) -> None:
    case = _begin(context, folder)
    if context.measure("reference", case.draw_reference):
        context.measure("half the lanes", case.halve)
        context.measure("one that never fits", case.draw_too_large)
        context.measure("decoding in tiles", case.decode_in_tiles)
        context.measure("an adapter without room", case.refuse_adapter)
        context.measure("an adapter that waits for room", case.wait_with_adapter)
        context.measure("memory afterwards", case.compare_memory, needs_cuda=True)
    case.engine.close()


@dataclass
class Case:
    """The engine on one model, and the set of jobs. `reference`: their images where memory is not short."""

    model: BenchModel
    memory: Memory
    engine: ShortEngine
    jobs: Sequence[Job]
    conv_adapter: Path
    reference: list[Image.Image] = field(default_factory=list)
    num_bytes_before: int = 0

    def draw_reference(self) -> Figures:
        """Draw the set without a limit, and note what it takes: twice, so that all find their adapters loaded; and one
        job alone."""
        self._draw_all()
        self._draw(self._request(0))
        self.reference = [image_of(result) for result in self._draw_all()]
        self.num_bytes_before = self._num_bytes_without_bank()
        return {
            "peaks": {" ".join(map(str, what)): taken for what, taken in self.memory.peaks.items()},
            **self._forwards(),
        }

    def halve(self) -> Figures:
        """Draw the set with room for less than half of its lanes."""
        room = self._room_for_half()
        with self.memory.limited(room):
            drawn = [image_of(result) for result in self._draw_all()]
        ratios = [psnr_db(one, other) for one, other in zip(drawn, self.reference, strict=True)]
        num_right = sum(ratio >= RIGHT_DB for ratio in ratios)
        return {"room": room, "num_right": num_right, "min_psnr_db": min(ratios), **self._forwards()}

    def draw_too_large(self) -> Figures:
        """Submit an image that does not fit even alone, and one of the set behind it."""
        room = self._room_for_half()
        side = TOO_LARGE * self.model.pixels
        with self.memory.limited(room):
            too_large = self.engine.ask(self._request(0, width=side, height=side))
            refusal = refusal_of(too_large.exception(RESULT_SECONDS))
            following = image_of(self._draw(self._request(0)))
        return {"room": room, "pixels": side, **refusal, "psnr_db_of_the_next": psnr_db(following, self.reference[0])}

    def decode_in_tiles(self) -> Figures:
        """Draw an image of twice the size with room for its forward and its tiles, not for decoding it whole."""
        side = 2 * self.model.pixels
        request = self._request(0, width=side, height=side)
        whole = image_of(self._draw(request))
        room = (self._peak_of_decoding(side) + self._peak_of_tiles(side)) / 2
        self.engine.forget()
        with self.memory.limited(room):
            tiled = image_of(self._draw(request))
        tried = list(self.engine.family.tiles)
        return {"room": room, "tried_in_tiles": tried, "psnr_db": psnr_db(whole, tiled)}

    def refuse_adapter(self) -> Figures:
        """Submit, alone, an adapter whose layers are new to the bank, with room for a forward and no more."""
        with self.memory.limited(self._room_for_one()):
            ended = self.engine.ask(self._request_with_conv_adapter())
            refusal = refusal_of(ended.exception(RESULT_SECONDS))
            following = image_of(self._draw(self._request(1)))
        return {**refusal, "psnr_db_of_the_next": psnr_db(following, self.reference[1])}

    def wait_with_adapter(self) -> Figures:
        """Submit it while another request runs, and give the memory back before that one ends."""
        bank = self.engine.family.bank
        bytes_before = bank.num_bytes
        request = self._request(0, num_inference_steps=STEPS_BESIDE)
        alone = image_of(self._draw(request))
        with self.memory.limited(self._room_for_one()):
            beside = _Beside(self.engine, self._request_with_conv_adapter(), self.memory.lift_limit)
            other = image_of(self.engine.ask(request, beside.on_step).result(RESULT_SECONDS))
            image_of(beside.newcomer.result(RESULT_SECONDS))
        return {
            "memory_was_back_after_steps": SHORT_TO,
            "began_after_steps_of_the_other": beside.began_after_steps,
            "psnr_db_of_the_other": psnr_db(other, alone),
            "bank_grew_by_bytes": bank.num_bytes - bytes_before,
        }

    def compare_memory(self) -> Figures:
        """Compare memory in use now with that after the first set, the bank's pages apart."""
        now = self._num_bytes_without_bank()
        return {"num_bytes": now, "num_bytes_before": self.num_bytes_before, "ratio": now / self.num_bytes_before}

    def _draw_all(self) -> list[GenerationResult]:
        """Draw all jobs at once: the first holds the engine's thread where it begins until the others are asked for."""
        self.engine.forget()
        are_asked = threading.Event()

        def hold(report: StepReport) -> None:
            if report.step_index == 0:
                are_asked.wait(RESULT_SECONDS)

        futures = [self.engine.ask(self._request(0), hold)]
        futures += [self.engine.ask(self._request(number)) for number in range(1, NUM_JOBS)]
        are_asked.set()
        return [future.result(RESULT_SECONDS) for future in futures]

    def _draw(self, request: GenerationRequest) -> GenerationResult:
        return self.engine.ask(request).result(RESULT_SECONDS)

    def _request(self, number: int, **changes: Any) -> GenerationRequest:
        return replace(request_of(self.jobs[number], self.model, steps=STEPS), **changes)

    def _request_with_conv_adapter(self) -> GenerationRequest:
        return self._request(2, request_id="conv", adapters=(AdapterFile(self.conv_adapter, None, 1.0),))

    def _room_for_half(self) -> float:
        return max(SHARE_FOR_HALVING * max(self._peaks_of_forwards()), self._room_for_decoding())

    def _room_for_one(self) -> float:
        return max(MARGIN * min(self._peaks_of_forwards()), self._room_for_decoding())

    def _room_for_decoding(self) -> float:
        return MARGIN * self._peak_of_decoding(self.model.pixels)

    def _peaks_of_forwards(self) -> list[int]:
        """Return the peaks of the forwards at the set's size."""
        peaks = self.memory.peaks.items()
        return [taken for what, taken in peaks if what[0] == "forward" and what[-1] == self.model.pixels]

    def _peak_of_decoding(self, pixels: int) -> int:
        return self.memory.peaks["decoding", False, pixels // 8]

    def _peak_of_tiles(self, pixels: int) -> int:
        """Decode noise in tiles, while the engine is idle, and return the peak."""
        family = self.engine.family
        with torch.inference_mode():
            family.decode(torch.randn(4, pixels // 8, pixels // 8, device=family.device), in_tiles=True)
        return self.memory.peaks["decoding", True, pixels // 8]

    def _forwards(self) -> Figures:
        """Count the forwards tried by their number of lanes."""
        return {"forwards_by_lanes": dict(sorted(Counter(self.engine.family.batches).items(), reverse=True))}

    def _num_bytes_without_bank(self) -> int:
        return (self.memory.num_allocated or 0) - self.engine.family.bank.num_bytes


class _Beside:
    """Submits `request` at a step of another one, and gives the memory back at a later step."""

    def __init__(self, engine: ShortEngine, request: GenerationRequest, lift_limit: Callable[[], None]) -> None:
        self._engine = engine
        self._request = request
        self._lift_limit = lift_limit
        self._steps_of_other = 0
        self.began_after_steps: int | None = None
        self.newcomer: Future[GenerationResult]

    def on_step(self, report: StepReport) -> None:
        """Handle a step of the other request."""
        self._steps_of_other = report.step_index
        if report.step_index == SHORT_FROM:
            self.newcomer = self._engine.ask(self._request, self._on_newcomer_s_step)
        elif report.step_index == SHORT_TO:
            self._lift_limit()

    def _on_newcomer_s_step(self, report: StepReport) -> None:
        if report.step_index == 0:
            self.began_after_steps = self._steps_of_other


def _begin(context: Context, folder: Path) -> Case:
    """Load the model, write the adapters, and draw nothing yet."""
    model = model_of("sd15", is_tiny=context.is_tiny)
    pipeline = model.build(context.device, torch.bfloat16 if context.is_cuda else torch.float32)
    jobs = make_jobs(model, pipeline, folder)
    conv_adapter = write_conv_adapter(folder / "conv.safetensors", pipeline.unet)
    memory = memory_of(context.device)
    engine = ShortEngine(model, pipeline, context.device, memory)
    return Case(model, memory, engine, jobs, conv_adapter)


def write_conv_adapter(path: Path, unet: torch.nn.Module) -> Path:
    """Write an adapter of the 3x3 convolutions, which none of the set's changes, so that the bank's pages become
    wider.
    """
    generator = torch.Generator().manual_seed(0)
    state: dict[str, torch.Tensor] = {}
    for name, module in unet.named_modules():
        if isinstance(module, torch.nn.Conv2d) and name.endswith((".conv1", ".conv2")):
            down = torch.randn(CONV_RANK, module.in_channels, 3, 3, generator=generator)
            up = torch.randn(module.out_channels, CONV_RANK, 1, 1, generator=generator)
            state[f"unet.{name}.lora_A.weight"] = down * (9 * module.in_channels) ** -0.5
            state[f"unet.{name}.lora_B.weight"] = up * CONV_RANK**-0.5
    safetensors.torch.save_file(state, path)
    return path


def refusal_of(error: BaseException | None) -> Figures:
    """Return the refusal's code and message. Raises where the request was drawn, or ended with another error."""
    assert error is not None, "it was drawn although there was no room"
    if not isinstance(error, RequestFailed):
        raise error
    return {"code": error.code, "message": error.message}
