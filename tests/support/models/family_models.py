"""Tiny checkpoints and their engines, for tests that hold several families against plain diffusers."""

from collections.abc import Callable, Mapping
from pathlib import Path

from tests.support.engine.watched_engine import WatchedEngine


class FamilyModels:
    """Checkpoints by name, each made on first use, and an engine for each that a test requests.

    A test that needs more settings than MODEL_ID names them in `settings_for`.
    """

    builders: Mapping[str, Callable[[Path], Path]]

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._engines: dict[str, WatchedEngine] = {}

    def checkpoint(self, name: str) -> Path:
        path = self._folder / name
        return path if path.is_dir() else self.builders[name](path)

    def engine(self, name: str) -> WatchedEngine:
        if name not in self._engines:
            self._engines[name] = WatchedEngine(self.checkpoint(name), **self.settings_for(name))
        return self._engines[name]

    def settings_for(self, name: str) -> dict[str, str]:
        """Return the engine's settings for the checkpoint `name`, by their variables."""
        return {}

    def close(self) -> None:
        for engine in self._engines.values():
            engine.close()
