"""How far 16 bits are from 32: a forward of ten lanes with ten adapters, against diffusers with PEFT, row by row.

The reference is diffusers' denoiser in 32 bits (TF32 off) with PEFT's layers, one job at a time; what diffusers itself
loses in 16 bits is measured beside the engine's loss. All of them read the same weights, embeddings and noise.
"""

import statistics
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import safetensors.torch
import torch

from benchmarks.gpu.models.bench_model import BenchModel, cast_pipeline, shared_copy
from benchmarks.gpu.models.jobs import NUM_JOBS, distinct_files
from benchmarks.gpu.speed.forwards import Forwards, cast
from benchmarks.gpu.stage import Context, Figures
from benchmarks.sets import Job, activate

# A small rank, the largest, all linear layers, none and two adapters. A forward of Z-Image in 32 bits takes a second.
CHECKED = {"sd15": (0, 3, 5, 8, 9), "sdxl": (0, 3, 5, 8, 9), "z-image": (5, 8, 9)}
TINY_CHECKED = (8, 9)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class PeftDenoiser:
    """A denoiser with every adapter of a set loaded by diffusers and PEFT, those of one job active."""

    def __init__(self, model: BenchModel, denoiser: Any, jobs: Sequence[Job]) -> None:
        self._denoiser = denoiser
        self._names = {path: f"adapter_{number}" for number, path in enumerate(distinct_files(jobs))}
        for path, name in self._names.items():
            state = safetensors.torch.load_file(path)
            own = {key: weight for key, weight in state.items() if key.startswith(f"{model.denoiser}.")}
            denoiser.load_lora_adapter(own, prefix=model.denoiser, adapter_name=name)

    def activate(self, job: Job) -> None:
        """Have the job's adapters, and no others, change the denoiser."""
        activate(self._denoiser, self._names, job)


class Accuracy:
    """Owner of the reference predictions, which both dtypes are held against."""

    def __init__(self, context: Context, model: BenchModel, pipeline: Any, jobs: Sequence[Job]) -> None:
        """`pipeline` is not an engine's yet; its dtype is the one that all weights have been rounded to."""
        self._context = context
        self._model = model
        self._pipeline = pipeline
        self._jobs = jobs
        self._references: list[torch.Tensor] = []
        self._checked = TINY_CHECKED if model.is_tiny else CHECKED[model.name]
        with torch.inference_mode():
            encoder = Forwards(model, shared_copy(pipeline), context.device, jobs)
        self._conditionings = encoder.conditionings

    def compute_references(self) -> Figures:
        """Fill the references in."""
        with _no_tf32():
            self._references = self._row_by_row(cast_pipeline(self._pipeline, torch.float32), torch.float32)
        norms = [float(one.norm()) for one in self._references]
        return {"jobs": list(self._checked), "norms": norms}

    def compare(self, name: str) -> Figures:
        """Compute ‖Δ‖/‖reference‖ of the engine's batch and of diffusers' own rows."""
        if not self._references:
            raise ValueError("there is no reference: computing it has failed")
        dtype = DTYPES[name]
        denoiser = getattr(self._pipeline, self._model.denoiser)
        pipeline = self._pipeline if denoiser.dtype == dtype else cast_pipeline(self._pipeline, dtype)
        conditionings = [cast(one, dtype) for one in self._conditionings]
        batch = Forwards(self._model, shared_copy(pipeline), self._context.device, self._jobs, conditionings)
        drawn = batch.step(NUM_JOBS, has_adapters=True)
        engine = [drawn[number] for number in self._checked]
        plain = self._row_by_row(shared_copy(pipeline), dtype)
        without = batch.step(NUM_JOBS, has_adapters=False)
        ours, theirs = self._errors(engine), self._errors(plain)
        return {
            "engine": ours,
            "diffusers": theirs,
            "engine_over_diffusers": statistics.median(ours) / max(statistics.median(theirs), 1e-12),
            # Beside it, what leaving all adapters out would come to.
            "adapters_change": self._errors([without[number] for number in self._checked]),
        }

    def _row_by_row(self, pipeline: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        """Predict row by row with diffusers and PEFT in `pipeline`, which nothing else uses afterwards."""
        conditionings = [cast(one, dtype) for one in self._conditionings]
        plain = [Job(job.prompt, job.seed, ()) for job in self._jobs]
        alone = Forwards(self._model, pipeline, self._context.device, plain, conditionings)
        peft = PeftDenoiser(self._model, alone.denoiser, [self._jobs[number] for number in self._checked])
        predictions = []
        for number in self._checked:
            peft.activate(self._jobs[number])
            predictions.append(alone.step_alone(number))
        return predictions

    def _errors(self, predictions: Sequence[torch.Tensor]) -> list[float]:
        pairs = zip(predictions, self._references, strict=True)
        return [float((one.float() - reference).norm() / reference.norm()) for one, reference in pairs]


@contextmanager
def _no_tf32() -> Any:
    matmul, convolution = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, convolution
