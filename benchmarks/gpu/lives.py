"""The engine's own process on a tiny checkpoint: it ends with its device, and the next one goes on."""

from pathlib import Path
from typing import Self

from benchmarks.gpu.asserting_child import FUSE
from benchmarks.gpu.stage import Figures
from config.settings import ModelSettings
from inference.child_process import Child
from inference.process import EngineProcess, wait_until_ready
from inference.request import GenerationRequest, GenerationResult
from tests.tiny_models import build_tiny_sd

# The processes import torch and diffusers beside the rest of the stage.
MODULE = "benchmarks.gpu.asserting_child"
READY_SECONDS = RESULT_SECONDS = 120.0


class Lives:
    """Owner of the engine's process, and of what is asked of it.

    Starting one takes long: `begin` does not wait, and the second is started with the first, to import meanwhile.
    """

    def __init__(self, folder: Path, device: str) -> None:
        self._folder = folder
        self._children: list[Child] = []
        self._spare: Child | None = None
        settings = ModelSettings.model_validate({"MODEL_ID": str(folder), "DEVICE": device})
        self._engine = EngineProcess(settings, log_level="WARNING", on_restart=lambda: None, spawn=self._spawn)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.close()
        if self._spare is not None:
            self._spare.end(is_idle=False)

    def begin(self) -> Figures:
        """Write the checkpoint and start the process."""
        build_tiny_sd(self._folder)
        self._engine.start()
        return {}

    def end(self) -> Figures:
        """Fail the first process's device at the first step of a request; that one is to be drawn by the next."""
        wait_until_ready(self._engine, READY_SECONDS)
        (self._folder / FUSE).touch()
        first, again = (self._draw(name).pictures[0] for name in ("fuse", "again"))
        exit_code = self._children[0].process.returncode
        return {"exit_code": exit_code, "num_processes": len(self._children), "is_drawn": first.rgb == again.rgb}

    def _draw(self, request_id: str) -> GenerationResult:
        request = GenerationRequest(request_id, "a fox", "", 64, 64, 3, 5.0, (1,))
        return self._engine.generate(request, lambda _: None, lambda: False).result(RESULT_SECONDS)

    def _spawn(self, settings: ModelSettings) -> Child:
        if self._spare is None:
            child, self._spare = (Child.spawn(settings, module=MODULE) for _ in range(2))
        else:
            child, self._spare = self._spare, None
        self._children.append(child)
        return child
