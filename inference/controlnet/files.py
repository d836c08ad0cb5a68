"""ControlNets by the operator's names for them: their files, found and judged before a byte of weights is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inference.checkpoints.checkpoint import HUB_ID
from inference.checkpoints.hub import find_on_hub
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
    """A ControlNet on this machine. `subject` is how an error begins that is about it."""

    subject: str
    class_name: str
    config: Mapping[str, Any]
    weights: tuple[Path, ...]
    shapes: Shapes

    def num_bytes(self, bytes_each: int) -> int:
        """What its weights take in memory, with `bytes_each` for a parameter."""
        return count_parameters(self.shapes) * bytes_each


def find_controlnets(sources: Mapping[str, str]) -> dict[str, ControlNetFiles]:
    """The files of each ControlNet by its name; EngineStartFailed names the first entry that is none."""
    return {name: _find(f"CONTROLNETS {name}={source}", source) for name, source in sources.items()}


def most_bytes(found: Mapping[str, ControlNetFiles], bytes_each: int, max_bytes: int) -> int:
    """What those that are loaded at once can come to, of which `max_bytes` are the limit."""
    return min(max_bytes, sum(one.num_bytes(bytes_each) for one in found.values()))


def _find(subject: str, source: str) -> ControlNetFiles:
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / CONFIG).is_file():
            raise EngineStartFailed(f"{subject} is a folder without {CONFIG}: name a diffusers folder of a ControlNet")
    elif HUB_ID.fullmatch(source):
        folder = _fetched(source)
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


def _fetched(repo_id: str) -> Path:
    """The repository's folder in the cache, with its config and one file of weights."""
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
