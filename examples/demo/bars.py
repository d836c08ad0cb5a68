"""Live progress bars, fed by nothing but the webhooks a backend receives."""

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from examples.demo.jobs import DemoJob


class JobBars:
    """One bar a job. `on_call` runs on the backend's threads; rich's `Progress` is thread-safe."""

    def __init__(self, jobs: Sequence[DemoJob], console: Console) -> None:
        columns = (TextColumn("{task.description:36}"), BarColumn(), TextColumn("{task.fields[note]}"))
        self._progress = Progress(*columns, TimeElapsedColumn(), console=console)
        self._bars = {
            job.generation_id: self._progress.add_task(job.prompt, total=100, start=False, note="waiting")
            for job in jobs
        }

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def on_call(self, call: Any) -> None:
        """Show what a webhook says."""
        bar = self._bars[call.generation_id]
        match call.kind:
            case "progress":
                progress = call.body["progress"]
                self._progress.start_task(bar)
                note = f"step {progress['current_step']} of {progress['total_steps']}"
                self._progress.update(bar, completed=progress["progress_percent"], note=note)
            case "complete":
                self._finish(bar, "[green]complete[/]")
            case "failed":
                self._finish(bar, f"[red]{call.body['error_code']}[/]")

    def _finish(self, bar: Any, note: str) -> None:
        self._progress.update(bar, completed=100, note=note)
        self._progress.stop_task(bar)
