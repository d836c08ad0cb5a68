"""Find and check weight files without torch. Only their headers are read, which takes milliseconds at any size."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from inference.errors import EngineStartFailed

GB = 1e9

SAFETENSORS = ".safetensors"
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
# As diffusers and transformers name a component's weights.
STEMS = ("diffusion_pytorch_model", "model")
VARIANT = re.compile(rf"(?:{'|'.join(STEMS)})\.([A-Za-z0-9_]+)(?:-\d+-of-\d+)?\.safetensors")
PREFERRED_VARIANT = "fp16"

HEADER_LENGTH_BYTES = 8
# safetensors' own limit. The names of SDXL's tensors take about 300 kB.
MAX_HEADER_BYTES = 100_000_000
GIT_LFS = b"version "

Shapes = Mapping[str, tuple[int, ...]]


class Header(NamedTuple):
    """A file's header: the shapes of its floating-point tensors, the names of all, and the text that its writer put."""

    shapes: Shapes
    names: frozenset[str]
    metadata: Mapping[str, Any]


class Weights(NamedTuple):
    """The files of each component, and the variant to load where a component exists only as that."""

    files: dict[str, list[Path]]
    variant: str | None


def find_weights(folder: Path, components: Sequence[str]) -> Weights:
    """Find the weight files of a diffusers folder; EngineStartFailed names the one that is missing or is a pickle."""
    files = {name: _files(folder / name, None) for name in components}
    lacking = [name for name, found in files.items() if not found]
    if not lacking:
        return Weights(files, None)

    variants = {name: _variants(folder / name) for name in lacking}
    common = set.intersection(*variants.values())
    if not common:
        worst = folder / min(lacking, key=lambda name: len(variants[name]))
        if not worst.is_dir():
            raise EngineStartFailed(f"{worst} is missing: copy or download the whole checkpoint")
        pickles = sorted(path for path in worst.iterdir() if path.suffix in PICKLE_SUFFIXES)
        if pickles:
            remedy = "convert the checkpoint to safetensors"
            raise EngineStartFailed(f"{pickles[0]} is a pickle, which is never opened: {remedy}")
        whole = f"{worst / STEMS[0]}{SAFETENSORS} (or {STEMS[1]}{SAFETENSORS})"
        raise EngineStartFailed(f"{whole} is missing: copy or download it")
    variant = min(common, key=lambda name: (name != PREFERRED_VARIANT, name))
    # For a component that has both, diffusers takes the variant too.
    return Weights({name: _files(folder / name, variant) or files[name] for name in components}, variant)


def read_shapes(path: Path) -> Shapes:
    """Read the shapes of the file's floating-point tensors by name; EngineStartFailed where the file is not whole."""
    return read_header(path).shapes


def read_header(path: Path) -> Header:
    """Read the file's header; EngineStartFailed where the file is not whole."""
    with path.open("rb") as file:
        start = file.read(HEADER_LENGTH_BYTES)
        num_bytes = int.from_bytes(start, "little")
        text = b"" if start == GIT_LFS or num_bytes > MAX_HEADER_BYTES else file.read(num_bytes)
        size = file.seek(0, 2)
    if start == GIT_LFS:
        raise EngineStartFailed(f"{path} is a git-lfs pointer and not the weights: run `git lfs pull` where it is")
    try:
        tensors: dict[str, Any] = json.loads(text)
        metadata = tensors.pop("__metadata__", None)
        needed = HEADER_LENGTH_BYTES + num_bytes + max(one["data_offsets"][1] for one in tensors.values())
        shapes = {name: tuple(one["shape"]) for name, one in tensors.items() if one["dtype"].startswith(("F", "BF"))}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise EngineStartFailed(f"{path} is cut off or no safetensors file: copy or download it again") from error
    if size < needed:
        raise EngineStartFailed(f"{path} is cut off at {size} of {needed} bytes: copy or download it again")
    return Header(shapes, frozenset(tensors), metadata if isinstance(metadata, dict) else {})


def count_parameters(shapes: Shapes) -> int:
    """Return the number of parameters of all tensors."""
    return sum(math.prod(shape) for shape in shapes.values())


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file; EngineStartFailed where there is none."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise EngineStartFailed(f"{path} cannot be read as JSON ({error}): copy or download it again") from error
    if not isinstance(found, dict):
        raise EngineStartFailed(f"{path} holds no JSON object: copy or download it again")
    return found


def _files(folder: Path, variant: str | None) -> list[Path]:
    """Find the component's files of that variant; empty where it has none."""
    middle = f".{variant}" if variant else ""
    for stem in STEMS:
        whole = folder / f"{stem}{middle}{SAFETENSORS}"
        if whole.is_file():
            return [whole]
        index = folder / f"{stem}{SAFETENSORS}.index{middle}.json"
        if index.is_file():
            shards = sorted({folder / str(name) for name in read_json(index).get("weight_map", {}).values()})
            for shard in shards:
                if not shard.is_file():
                    raise EngineStartFailed(f"{shard} is missing, though {index.name} lists it: copy or download it")
            return shards
    return []


def _variants(folder: Path) -> set[str]:
    names = (path.name for path in folder.iterdir()) if folder.is_dir() else ()
    found = {match[1] for match in map(VARIANT.fullmatch, names) if match}
    return {variant for variant in found if _files(folder, variant)}
