"""The engine's process with a fuse: where a file exists beside the checkpoint, its next forward fails the device.

`python -m tests.support.engine.asserting_child FD PARENT_PID`, started by `EngineProcess`. The fuse burns once.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from config.model import ModelSettings
from inference.engine.local_engine import LocalEngine
from inference.lane import Lane
from inference.models.base import Family
from inference.process.child import main
from inference.request import OnLoadReport

FUSE = "fuse"


class _FusedFamily(Family):
    """Laid over a loaded family."""

    fuse: Path
    engine: "_FusedEngine"

    def denoise(self, lanes: Sequence[Lane]) -> list[torch.Tensor]:
        if self.fuse.exists():
            self.fuse.unlink()
            self.engine.fail_device()
        return super().denoise(lanes)


class _FusedEngine(LocalEngine):
    def fail_device(self) -> None:
        """Read beyond the end of a tensor in a kernel: every call into CUDA fails from then on."""
        device = self.default.family.device
        if device.type == "cuda":
            torch.zeros(4, device=device)[torch.full((4,), 99, device=device)].sum().item()
        # The stand-in: a "meta" tensor has a shape and no values.
        self.default.loop._device._device = torch.device("meta")
        raise RuntimeError("the device failed (a stand-in for a device assert)")

    def _load(self, settings: ModelSettings, device: torch.device, dtype: torch.dtype) -> Family:
        family = super()._load(settings, device, dtype)
        family.__class__ = type(_FusedFamily.__name__, (_FusedFamily, type(family)), {})
        assert isinstance(family, _FusedFamily)
        family.fuse, family.engine = Path(settings.model_id) / FUSE, self
        return family


def load_engine(settings: ModelSettings, on_load_report: OnLoadReport) -> LocalEngine:
    """Load the engine with the fuse."""
    return _FusedEngine(settings, on_load_report)


if __name__ == "__main__":
    main(load_engine)
