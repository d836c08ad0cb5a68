"""Weight files on the disk, read without torch: which a component has, whether they are whole, what they hold.

Only the headers are read, so that a checkpoint of any size is judged in milliseconds, before a byte of its weights.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from inference.errors import EngineStartFailed

GB = 1e9

SAFETENSORS = ".safetensors"
PICKLES = frozenset({".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"})
# As diffusers and transformers name a component's weights.
STEMS = ("diffusion_pytorch_model", "model")
VARIANT = re.compile(rf"(?:{'|'.join(STEMS)})\.([A-Za-z0-9_]+)(?:-\d+-of-\d+)?\.safetensors")
PREFERRED_VARIANT = "fp16"

HEADER_LENGTH_BYTES = 8
# safetensors' own limit. The names of SDXL's tensors take about 300 kB.
MAX_HEADER_BYTES = 100_000_000
GIT_LFS = b"version "

Shapes = Mapping[str, tuple[int, ...]]


class Weights(NamedTuple):
    """The files of each component, and the variant to ask for where some component comes only as that."""

    files: dict[str, list[Path]]
    variant: str | None


def find_weights(folder: Path, components: Sequence[str]) -> Weights:
    """The weight files of a diffusers folder; EngineStartFailed names the one that is missing or is a pickle."""
    files = {name: _files(folder / name, None) for name in components}
    lacking = [name for name, found in files.items() if not found]
    if not lacking:
        return Weights(files, None)

    variants = {name: _variants(folder / name) for name in lacking}
    common = set.intersection(*variants.values())
    if not common:
        worst = min(lacking, key=lambda name: len(variants[name]))
        raise EngineStartFailed(_why_none(folder / worst))
    variant = min(common, key=lambda name: (name != PREFERRED_VARIANT, name))
    # Where a component comes both ways, diffusers takes the variant too.
    return Weights({name: _files(folder / name, variant) or files[name] for name in components}, variant)


def read_shapes(path: Path) -> Shapes:
    """The shapes of the file's floating-point tensors by name; EngineStartFailed where the file is not whole."""
    with path.open("rb") as file:
        start = file.read(HEADER_LENGTH_BYTES)
        num_bytes = int.from_bytes(start, "little")
        text = b"" if start == GIT_LFS or num_bytes > MAX_HEADER_BYTES else file.read(num_bytes)
        size = file.seek(0, 2)
    if start == GIT_LFS:
        raise EngineStartFailed(f"{path} is a git-lfs pointer and not the weights: run `git lfs pull` where it is")
    try:
        tensors: dict[str, Any] = json.loads(text)
        tensors.pop("__metadata__", None)
        needed = HEADER_LENGTH_BYTES + num_bytes + max(one["data_offsets"][1] for one in tensors.values())
        shapes = {name: tuple(one["shape"]) for name, one in tensors.items() if one["dtype"].startswith(("F", "BF"))}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise EngineStartFailed(f"{path} is cut off or no safetensors file: copy or download it again") from error
    if size < needed:
        raise EngineStartFailed(f"{path} is cut off at {size} of {needed} bytes: copy or download it again")
    return shapes


def count_parameters(shapes: Shapes) -> int:
    """How many numbers the tensors hold together."""
    return sum(math.prod(shape) for shape in shapes.values())


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; EngineStartFailed where there is none."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise EngineStartFailed(f"{path} cannot be read as JSON ({error}): copy or download it again") from error
    if not isinstance(found, dict):
        raise EngineStartFailed(f"{path} holds no JSON object: copy or download it again")
    return found


def _files(folder: Path, variant: str | None) -> list[Path]:
    """The component's files as that variant; none where it has none."""
    middle = f".{variant}" if variant else ""
    for stem in STEMS:
        whole = folder / f"{stem}{middle}{SAFETENSORS}"
        if whole.is_file():
            return [whole]
        index = folder / f"{stem}{SAFETENSORS}.index{middle}.json"
        if index.is_file():
            return _shards(index)
    return []


def _shards(index: Path) -> list[Path]:
    shards = sorted({index.parent / str(name) for name in read_json(index).get("weight_map", {}).values()})
    for shard in shards:
        if not shard.is_file():
            raise EngineStartFailed(f"{shard} is missing, though {index.name} lists it: copy or download it")
    return shards


def _variants(folder: Path) -> set[str]:
    names = (path.name for path in folder.iterdir()) if folder.is_dir() else ()
    found = {match[1] for match in map(VARIANT.fullmatch, names) if match}
    return {variant for variant in found if _files(folder, variant)}


def _why_none(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} is missing: copy or download the whole checkpoint"
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        return f"{folder / pickles[0]} is a pickle, which is never opened: convert the checkpoint to safetensors"
    return f"{folder / STEMS[0]}{SAFETENSORS} (or {STEMS[1]}{SAFETENSORS}) is missing: copy or download it"
