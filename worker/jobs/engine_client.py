"""Client of the engine for jobs: cancellation, draining and progress of one job's requests."""

from concurrent.futures import CancelledError
from dataclasses import dataclass, replace
from threading import Event
from typing import NamedTuple

from inference.errors import RequestCancelled
from inference.request import Engine, GenerationRequest, GenerationResult, StepReport
from watermark.geometry import Rect
from worker.errors import JobReleased
from worker.jobs.runs import DenoiseProgress, Phase, Run
from worker.progress.reporter import JobProgress


@dataclass(frozen=True, slots=True)
class ProgressSpan:
    """Progress offset of one engine request in a multi-request job: `steps_before` of `total_steps` precede its
    `num_steps`."""

    steps_before: int
    num_steps: int
    total_steps: int

    def rescale(self, report: StepReport) -> StepReport:
        """Return the request's report as one of the job. The engine may count other steps than were expected."""
        done = self.steps_before + report.step_index * self.num_steps // report.num_steps
        return replace(report, step_index=done, num_steps=self.total_steps)


class GeneratedImages(NamedTuple):
    """A job's images before postprocessing, and the rectangles that headlines keep off."""

    result: GenerationResult
    keep_off: tuple[Rect, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineClient:
    """Sends the requests of all jobs to the engine. `generate` blocks on the job's own thread."""

    engine: Engine
    is_draining: Event

    def generate(
        self, run: Run, request: GenerationRequest, track: JobProgress, span: ProgressSpan | None = None
    ) -> GenerationResult:
        """Return the engine's result and report every step to `track`, within `span` where the job has more requests.
        Raises the engine's errors, and `RequestCancelled` or `JobReleased` where the job is no longer to be run here.
        """
        self.raise_if_unwanted(run)

        def on_step(report: StepReport) -> None:
            run.enter_phase(Phase.DECODE if report.step_index == report.num_steps else Phase.DENOISE)
            report = span.rescale(report) if span else report
            track.on_step(report)
            run.progress = DenoiseProgress(report.step_index, report.num_steps, track.seconds_left(report))

        with run.inside_engine():
            try:
                run.future = self.engine.generate(request, on_step, lambda: run.is_cancelled)
                if self.is_draining.is_set() or run.is_cancelled:
                    run.future.cancel()
                result = run.future.result()
            except CancelledError:
                self.raise_if_unwanted(run)
                raise
            run.add_engine_stages(result.stages)
        return result

    def raise_if_unwanted(self, run: Run) -> None:
        """Raise `RequestCancelled` for a cancelled job, `JobReleased` where the worker is stopping."""
        if run.is_cancelled:
            raise RequestCancelled("cancelled before it was begun")
        if self.is_draining.is_set():
            raise JobReleased("the worker is stopping")
