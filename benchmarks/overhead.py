"""What the worker costs beyond the picture: the same jobs by a plain diffusers loop, the engine alone, and the worker.

`make bench`. All sides run in one go, a round of each in turn, on the demo model with one thread each; medians of the
rounds. Expected: the worker's fetching, signing and storing overlap with denoising, so that its throughput is that of
the engine; its supervisor spends some tens of milliseconds of CPU a job. `--by-thread` tells those apart, around an
engine that does next to nothing: see `benchmarks.supervisor`.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.supervisor import measure_by_thread, print_by_thread
from config.model import ModelSettings
from examples.demo.signatures import draw_signatures
from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS
from inference.engine.local_engine import LocalEngine
from inference.request import AdapterFile, GenerationRequest
from tests.support.paths import DEMO_MODEL
from tests.support.world import Worker, World, new_world
from watermark.decoding import decode_signature
from watermark.signature import ImageSignature, SignatureStyle, sign

STYLES = ("neon", "blueprint", "sepia")
STEPS = 20
GUIDANCE = 3.0


def main() -> None:
    """Run the rounds, print the table and, last, the line of JSON."""
    arguments = _arguments()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.by_thread:
            result = measure_by_thread(Path(folder), num_rounds=arguments.rounds, num_jobs=arguments.jobs)
        else:
            result = _measure(Path(folder), arguments.rounds, arguments.jobs)
    (print_by_thread if arguments.by_thread else _print_table)(result)
    line = json.dumps(result)
    if arguments.out is not None:
        arguments.out.write_text(line + "\n")
    print(line)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=9, help="jobs in a round")
    parser.add_argument("--by-thread", action="store_true", help="only the supervisor's CPU, thread by thread")
    parser.add_argument("--out", type=Path, help="file for the line of JSON")
    return parser.parse_args()


def _measure(folder: Path, num_rounds: int, num_jobs: int) -> dict[str, Any]:
    with (
        RabbitMQ(folder / "rabbitmq") as rabbitmq,
        SeaweedFS(folder / "seaweedfs") as store,
        new_world(rabbitmq, store, folder) as world,
    ):
        signature = next(iter(draw_signatures(folder).values()))
        for style in STYLES:
            world.upload_demo_adapter(style)
        world.upload("signatures/a.png", signature.read_bytes())
        worker = world.start_worker()
        worker.wait_until_ready()
        sides = {
            "diffusers": _diffusers_side(),
            "engine": _engine_side(),
            "worker": _worker_side(world),
        }
        for side in sides.values():
            side(len(STYLES))  # warm-up: caches, connections, first forwards

        processes = [psutil.Process(worker.process.pid), psutil.Process(worker.engine_pid())]
        idle_bytes = processes[0].memory_info().rss
        wall: dict[str, list[float]] = {name: [] for name in sides}
        cpu: dict[str, list[float]] = {"supervisor": [], "engine process": []}
        for _ in range(num_rounds):
            for name, side in sides.items():
                before = [_cpu_seconds(process) for process in processes]
                started_at = time.perf_counter()
                side(num_jobs)
                wall[name].append((time.perf_counter() - started_at) / num_jobs)
                if name == "worker":
                    for label, process, spent in zip(cpu, processes, before, strict=True):
                        cpu[label].append((_cpu_seconds(process) - spent) / num_jobs)
        return {
            "benchmark": "overhead",
            "device": f"{platform.machine()} CPU, 1 thread, {os.cpu_count()} cores",
            "rounds": num_rounds,
            "jobs_a_round": num_jobs,
            "steps": STEPS,
            "wall_seconds_a_job": {name: _spread(values) for name, values in wall.items()},
            "cpu_seconds_a_job": {name: _spread(values) for name, values in cpu.items()},
            "image_work_cpu_seconds_a_job": _image_work(signature),
            "worker_throughput_over_engine": _ratio(wall["engine"], wall["worker"]),
            "worker_throughput_over_diffusers": _ratio(wall["diffusers"], wall["worker"]),
            "supervisor_rss_mb": {"idle": idle_bytes / 1e6, "after": processes[0].memory_info().rss / 1e6},
            "mean_batch": _mean_batch(worker),
        }


def _diffusers_side() -> Callable[[int], None]:
    """Run plain diffusers: load the adapter, generate, unload, save."""
    pipe = StableDiffusionPipeline.from_pretrained(DEMO_MODEL / "checkpoint", dtype=torch.float32, safety_checker=None)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)

    def run(num_jobs: int) -> None:
        for number in range(num_jobs):
            style = STYLES[number % len(STYLES)]
            pipe.load_lora_weights(DEMO_MODEL / "adapters", weight_name=f"{style}.safetensors")
            image = pipe(
                f"{style}: a red fox",
                width=128,
                height=128,
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                generator=torch.Generator("cpu").manual_seed(number),
            ).images[0]
            pipe.unload_lora_weights()
            image.tobytes()

    return run


def _engine_side() -> Callable[[int], None]:
    engine = LocalEngine(ModelSettings(MODEL_ID=str(DEMO_MODEL / "checkpoint"), DEVICE="cpu"))

    def run(num_jobs: int) -> None:
        requests = [_request(number) for number in range(num_jobs)]
        futures = [engine.generate(request, lambda _: None, lambda: False) for request in requests]
        for future in futures:
            future.result()

    return run


def _request(number: int) -> GenerationRequest:
    style = STYLES[number % len(STYLES)]
    return GenerationRequest(
        request_id=str(number),
        prompt=f"{style}: a red fox",
        negative_prompt="",
        width=128,
        height=128,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        seeds=(number,),
        adapters=(AdapterFile(DEMO_MODEL / "adapters" / f"{style}.safetensors", None, 1.0),),
    )


def _worker_side(world: World) -> Callable[[int], None]:
    def publish(number: int) -> int:
        style = STYLES[number % len(STYLES)]
        return world.publish(
            prompt=f"{style}: a red fox",
            lora_path=f"models/{style}.safetensors",
            signature_path="signatures/a.png",
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            seed=number,
        )

    def run(num_jobs: int) -> None:
        with ThreadPoolExecutor(1) as publisher:
            for generation_id in list(publisher.map(publish, range(num_jobs))):
                assert world.wait_for_end(generation_id).kind == "complete"

    return run


def _image_work(signature: Path, repeats: int = 50) -> float:
    """Return the CPU seconds of signing and encoding one image, which is the job's own work and not overhead."""
    mark = ImageSignature(decode_signature(signature.read_bytes()))
    image = Image.effect_noise((128, 128), 40).convert("RGB")
    started_at = time.process_time()
    for _ in range(repeats):
        sign(image, mark, SignatureStyle()).encode_png()
    return (time.process_time() - started_at) / repeats


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _mean_batch(worker: Worker) -> float:
    return worker.metric("darkroom_denoise_lane_steps_total") / worker.metric("darkroom_denoise_steps_total")


def _ratio(base: list[float], other: list[float]) -> float:
    return statistics.median(base) / statistics.median(other)


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _print_table(result: dict[str, Any]) -> None:
    table = Table("seconds a job", "median", "min", "max", title="the same jobs, three ways")
    for label, rows in (("wall", result["wall_seconds_a_job"]), ("CPU of the worker", result["cpu_seconds_a_job"])):
        for name, spread in rows.items():
            table.add_row(f"{label}: {name}", *(f"{spread[key]:.4f}" for key in ("median", "min", "max")))
    Console().print(table)


if __name__ == "__main__":
    main()
