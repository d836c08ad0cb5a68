"""What previews cost the batch: steps of eight lanes that make eight previews against their neighbours that make none.

`make bench`. PREVIEW_EVERY is 2, so that every other step makes previews, and a busy machine slows both kinds alike. A
second engine without previews has its steps split the same way, which shows what is chance. The demo model, one
thread, CPU time of the engine's thread. Expected: no difference beyond chance, as a preview is a matrix of 4 x 3 on
16 x 16 latents; the figure for it alone says how little that is.
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from rich.console import Console
from rich.table import Table

from config.model import ModelSettings
from inference.engine.local_engine import LocalEngine
from inference.models.loader import load_family
from inference.request import EngineLoad, GenerationRequest, StepReport
from inference.sampling.samplers import predict_x0
from tests.support.paths import DEMO_MODEL

LANES = 8
STEPS = 20
EVERY = 2
REPEATS = 200


class Side:
    """An engine, and the CPU seconds of its turns in which all lanes took a step: of even steps and of odd ones."""

    def __init__(self, every: int) -> None:
        self._seconds: dict[bool, list[float]] = {True: [], False: []}
        self._step_index = 0
        self._was_at = 0.0
        self.num_previews = 0
        self._engine = LocalEngine(_settings(PREVIEW_EVERY=every), self._on_turn)

    def close(self) -> None:
        self._engine.close()

    def run(self, number: int) -> tuple[float, float]:
        """Generate eight images; return the median CPU seconds of even and of odd steps."""
        self._seconds = {True: [], False: []}
        self.num_previews = 0
        futures = [
            self._engine.generate(_request(LANES * number + lane), self._on_step, lambda: False)
            for lane in range(LANES)
        ]
        for future in futures:
            future.result()
        return statistics.median(self._seconds[True]), statistics.median(self._seconds[False])

    def _on_step(self, report: StepReport) -> None:
        self._step_index = report.step_index
        self.num_previews += report.preview is not None

    def _on_turn(self, engine_load: EngineLoad) -> None:
        now = time.thread_time()
        # The first turn encodes prompts too, the last decodes.
        if engine_load.num_lanes == LANES and self._was_at:
            self._seconds[self._step_index % EVERY == 0].append(now - self._was_at)
        self._was_at = now if engine_load.num_batched == LANES else 0.0


def main() -> None:
    """Run the rounds, print the table and, last, the line of JSON."""
    arguments = _arguments()
    torch.set_num_threads(1)
    result = _measure(arguments.rounds)
    _print_table(result)
    line = json.dumps(result)
    if arguments.out is not None:
        arguments.out.write_text(line + "\n")
    print(line)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="file for the line of JSON")
    return parser.parse_args()


def _measure(num_rounds: int) -> dict[str, Any]:
    sides = {"with previews": Side(EVERY), "without": Side(0)}
    even: dict[str, list[float]] = {name: [] for name in sides}
    odd: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(num_rounds + 1):
        for name, side in sides.items():
            seconds = side.run(number)
            if number > 0:  # the first is the warm-up
                even[name].append(seconds[0])
                odd[name].append(seconds[1])
    num_previews = {name: side.num_previews for name, side in sides.items()}
    for side in sides.values():
        side.close()
    fit_seconds, preview_seconds = _alone()
    return {
        "benchmark": "previews",
        "device": f"{platform.machine()} CPU, 1 thread, {os.cpu_count()} cores",
        "rounds": num_rounds,
        "lanes": LANES,
        "steps": STEPS,
        "even_step_cpu_seconds": {name: _spread(values) for name, values in even.items()},
        "odd_step_cpu_seconds": {name: _spread(values) for name, values in odd.items()},
        "even_over_odd": {name: _spread(_ratios(even[name], odd[name])) for name in sides},
        "previews_a_round": num_previews,
        "preview_cpu_seconds": preview_seconds,
        "eight_previews_over_step": LANES * preview_seconds / statistics.median(odd["without"]),
        "fit_cpu_seconds": fit_seconds,
    }


def _alone() -> tuple[float, float]:
    """Return the CPU seconds of fitting the projection at the start, and of one preview: x0, projection, its bytes."""
    family = load_family(_settings(), device=torch.device("cpu"), dtype=torch.float32)
    started_at = time.process_time()
    projection = family.find_projection()
    fit_seconds = time.process_time() - started_at

    scheduler = DDIMScheduler()
    latents = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        started_at = time.process_time()
        for _ in range(REPEATS):
            projection(predict_x0(latents, 500.0, latents, scheduler)).numpy().tobytes()
    return fit_seconds, (time.process_time() - started_at) / REPEATS


def _settings(**variables: Any) -> ModelSettings:
    return ModelSettings(
        MODEL_ID=str(DEMO_MODEL / "checkpoint"), DEVICE="cpu", MAX_CONCURRENT_GENERATIONS=LANES, **variables
    )


def _request(seed: int) -> GenerationRequest:
    return GenerationRequest(
        request_id=str(seed),
        prompt="a red fox",
        negative_prompt="",
        width=128,
        height=128,
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        seeds=(seed,),
    )


def _ratios(ones: list[float], others: list[float]) -> list[float]:
    return [one / other for one, other in zip(ones, others, strict=True)]


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _print_table(result: dict[str, Any]) -> None:
    table = Table("steps of 8 lanes", "median", "min", "max", title="what previews cost")
    for title in ("even_step_cpu_seconds", "odd_step_cpu_seconds", "even_over_odd"):
        for name, spread in result[title].items():
            label = f"{title.replace('_', ' ')}: {name}"
            table.add_row(label, *(f"{spread[key]:.4f}" for key in ("median", "min", "max")))
    Console().print(table)


if __name__ == "__main__":
    main()
