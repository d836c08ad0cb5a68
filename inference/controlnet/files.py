"""Find the files of the ControlNets in the settings, and check them before their weights are read."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inference.checkpoints.hub import HUB_ID, find_on_hub
from inference.checkpoints.weight_files import (
    PREFERRED_VARIANT,
    SAFETENSORS,
    STEMS,
    Shapes,
    count_parameters,
    find_weights,
    read_json,
    read_shapes,
)
from inference.errors import EngineStartFailed

CONFIG = "config.json"
# A ControlNet's folder is one component of a pipeline's.
ITSELF = "."


@dataclass(frozen=True, slots=True)
class ControlNetFiles:
    """A ControlNet on this machine. `subject`: first words of an error about it."""

    subject: str
    class_name: str
    config: Mapping[str, Any]
    weights: tuple[Path, ...]
    shapes: Shapes

    def num_bytes(self, bytes_each: int) -> int:
        """Return the bytes of its weights in memory, at `bytes_each` a parameter."""
        return count_parameters(self.shapes) * bytes_each


def find_controlnets(sources: Mapping[str, str]) -> dict[str, ControlNetFiles]:
    """Find the files of each ControlNet by its name; EngineStartFailed names the first entry without any."""
    return {name: _find(f"CONTROLNETS {name}={source}", source) for name, source in sources.items()}


def most_bytes(found: Mapping[str, ControlNetFiles], bytes_each: int, max_bytes: int) -> int:
    """Return the most bytes of those loaded at once, of which `max_bytes` is the limit."""
    return min(max_bytes, sum(one.num_bytes(bytes_each) for one in found.values()))


def _find(subject: str, source: str) -> ControlNetFiles:
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / CONFIG).is_file():
            raise EngineStartFailed(f"{subject} is a folder without {CONFIG}: name a diffusers folder of a ControlNet")
    elif HUB_ID.fullmatch(source):
        folder = _download(source)
    else:
        raise EngineStartFailed(f"{subject} is no folder here, and no hub id like owner/name")
    try:
        config = read_json(folder / CONFIG)
        weights = tuple(find_weights(folder, (ITSELF,)).files[ITSELF])
        shapes = {name: shape for path in weights for name, shape in read_shapes(path).items()}
    except EngineStartFailed as error:
        raise EngineStartFailed(f"{subject}: {error}") from error
    return ControlNetFiles(
        subject, str(config.get("_class_name", "model without a _class_name")), config, weights, shapes
    )


def _download(repo_id: str) -> Path:
    """Download config and weights of a repository. Returns its folder in the cache."""
    folder = find_on_hub(repo_id, CONFIG, "CONTROLNETS").parent
    try:
        find_on_hub(repo_id, f"{STEMS[0]}{SAFETENSORS}", "CONTROLNETS")
    except EngineStartFailed as error:
        # Some repositories have 16-bit files only, under that name.
        try:
            find_on_hub(repo_id, f"{STEMS[0]}.{PREFERRED_VARIANT}{SAFETENSORS}", "CONTROLNETS")
        except EngineStartFailed:
            raise error from None
    return folder
