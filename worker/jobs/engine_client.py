"""Asking the engine for a job's pictures: cancelled, drained and reported on as the job is."""

from concurrent.futures import CancelledError
from dataclasses import dataclass, replace
from threading import Event
from typing import NamedTuple

from inference.errors import RequestCancelled
from inference.request import Engine, GenerationRequest, GenerationResult, StepReport
from watermark.geometry import Rect
from worker.errors import JobReleased
from worker.jobs.runs import Reached, Run
from worker.progress.reporter import Track


@dataclass(frozen=True, slots=True)
class ProgressSpan:
    """One request's part of the way of a job that makes several: its `num_steps` come behind `before` of `total`."""

    before: int
    num_steps: int
    total: int

    def within(self, report: StepReport) -> StepReport:
        """The request's own report as one of the job. It may count its steps otherwise than was expected."""
        done = self.before + report.step_index * self.num_steps // report.num_steps
        return replace(report, step_index=done, num_steps=self.total)


class GeneratedImages(NamedTuple):
    """A job's pictures before they are finished, and the parts of them that headlines are to keep off."""

    result: GenerationResult
    keep_off: tuple[Rect, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineClient:
    """The way to the engine, for all jobs. `draw` blocks on the job's own thread."""

    engine: Engine
    is_draining: Event

    def draw(
        self, run: Run, request: GenerationRequest, track: Track, leg: ProgressSpan | None = None
    ) -> GenerationResult:
        """The pictures, `track` hearing of every step, as of a `leg` where the request is not all of the job. Raises
        what the engine ends with, and what ends a job that is not to be drawn: it was cancelled, or the worker stops.
        """
        self.raise_if_unwanted(run)

        def on_step(report: StepReport) -> None:
            run.enter("decode" if report.step_index == report.num_steps else "denoise")
            report = leg.within(report) if leg else report
            track.on_step(report)
            run.reached = Reached(report.step_index, report.num_steps, track.seconds_left(report))

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
        """Raise what a job that is not yet being drawn ends with, if it is not to be drawn at all."""
        if run.is_cancelled:
            raise RequestCancelled("cancelled before it was begun")
        if self.is_draining.is_set():
            raise JobReleased("the worker is stopping")
