"""Put on a worker's PYTHONPATH: a prompt that says so kills the engine's process at the lane's first step, each time.

A stand-in for what cannot be had at will: a request on which torch or a driver segfaults.
"""

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

POISONED = "inference.models.families.unet"
WORD = "poison"


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the real loader load the module, and changes one method after."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != POISONED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def load_and_poison(module: ModuleType) -> None:
            load(module)
            _poison(module.UNetFamily)

        spec.loader.exec_module = load_and_poison  # type: ignore[method-assign]
        return spec


def _poison(model: Any) -> None:
    denoise = model.denoise

    def denoise_or_die(self: Any, lanes: Any) -> Any:
        if any(WORD in lane.owner.request.prompt and lane.num_steps_done == 2 for lane in lanes):
            os.abort()
        return denoise(self, lanes)

    model.denoise = denoise_or_die


sys.meta_path.insert(0, _Finder())
