"""The engine's real child, whose device fails an assertion: once, as long as the file of `FAULT_FILE` is there."""

import os
from pathlib import Path
from typing import Any

from config.settings import ModelSettings
from inference.child import main
from inference.request import OnOccupancy

FAULT_FILE = "DARKROOM_TEST_FAULT_FILE"


def load_asserting_engine(settings: ModelSettings, on_occupancy: OnOccupancy) -> Any:
    """The engine over a model that reads beyond a tensor's end on the device."""
    import torch  # brought by the child alone

    from inference.engine import LocalEngine
    from inference.families.family import Family
    from inference.lane import Lane

    class AssertingModel(Family):
        def denoise(self, lanes: list[Lane]) -> list[torch.Tensor]:
            fault = Path(os.environ[FAULT_FILE])
            if fault.exists() and lanes[0].drawing.request.request_id != "warm-up":
                fault.unlink()
                torch.zeros(4, device=self.device)[torch.tensor([9], device=self.device)]
            return super().denoise(lanes)  # type: ignore[safe-super]

    class AssertingEngine(LocalEngine):
        def _load(self, settings: ModelSettings, device: torch.device, dtype: torch.dtype) -> Family:
            model = super()._load(settings, device, dtype)
            model.__class__ = type("Asserting", (AssertingModel, type(model)), {})
            return model

    return AssertingEngine(settings, on_occupancy)


if __name__ == "__main__":
    main(load_asserting_engine)
