"""Read an untrusted safetensors file: its header, checked, and its tensors. Nothing is unpickled or imported."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from inference.checkpoints.weight_files import PICKLE_SUFFIXES
from inference.lora.errors import LAYER_NAME, AdapterInvalid, AdapterUnsafe, shown

# A rank-256 SDXL adapter with convolutions is about 900 MB; anything larger is a checkpoint, not an adapter.
MAX_FILE_BYTES = 1_000_000_000
# safetensors itself accepts 100 MB of JSON, which takes seconds and gigabytes to parse. 4000 tensors need about 600 kB,
# and training scripts write the tags of all their pictures beside them.
MAX_HEADER_BYTES = 4_000_000
# An SDXL adapter over every layer of the UNet and both text encoders, with alphas, has about 3200.
MAX_TENSORS = 4000
# What adapters are trained in, and what tools save them in: 8-bit floats are exact in 32 bits, 64-bit ones are rounded
# to what the model computes in. Integers would need a scale that safetensors has no place for.
WEIGHT_DTYPES = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
# diffusers' own kohya export writes its alphas as 64-bit integers, other tools in the smallest that holds them.
ALPHA_DTYPES = WEIGHT_DTYPES | {"I64", "I32", "I16", "I8", "U8"}

HEADER_LENGTH_BYTES = 8
BEGINNING_BYTES = 256  # enough to detect the format
METADATA = "__metadata__"
# A zip (torch.save today), a pickle of protocol 2 or later (torch.save once), a pickle of protocol 0 calling something.
PICKLE_OR_ZIP = re.compile(rb"PK\x03\x04|\x80[\x02-\x05]|\(?c[\w.]+\n")


@dataclass(frozen=True)
class WeightFile:
    """A safetensors file whose header was parsed; only its size is checked yet.

    entries: the header's entry for each tensor by name, which may be any text.
    """

    entries: Mapping[str, Any]
    metadata: Mapping[str, str]
    content: bytes

    def load(self, stems: Iterable[str]) -> dict[str, torch.Tensor]:
        """Load the tensors on the CPU. `stems` are the layers' names within those of the tensors.

        Raises AdapterInvalid for damaged files, layer names that are not dotted names, and other dtypes.
        """
        if len(self.entries) > MAX_TENSORS:
            raise AdapterInvalid(f"the adapter file holds {len(self.entries)} tensors, more than {MAX_TENSORS}")
        for stem in stems:
            if not LAYER_NAME.fullmatch(stem):
                raise AdapterInvalid(f"the adapter file holds a layer with an odd name: {shown(stem)}")
        for name, entry in self.entries.items():
            if not isinstance(entry, dict):
                raise AdapterInvalid(f"the adapter file's header has no proper entry for {shown(name)}")
            dtypes = ALPHA_DTYPES if name.endswith(".alpha") else WEIGHT_DTYPES
            dtype = entry.get("dtype")
            if not isinstance(dtype, str) or dtype not in dtypes:
                known = ", ".join(sorted(dtypes))
                raise AdapterInvalid(f"the adapter's {shown(name)} is of type {dtype!a:.20}, not one of {known}")
        try:
            return safetensors.torch.load(self.content)
        except safetensors.SafetensorError as error:
            # Its message quotes the file, up to the whole header.
            raise AdapterInvalid(f"the adapter file is damaged: {str(error)!a:.200}") from error


def open_weights(path: Path) -> WeightFile:
    """Read a safetensors file whole; the file may be deleted afterwards.

    Raises AdapterUnsafe for a pickle or zip, AdapterInvalid where it is too large or has no proper header.
    """
    if path.stat().st_size > MAX_FILE_BYTES:
        raise AdapterInvalid(f"the adapter file is larger than {MAX_FILE_BYTES} bytes")

    with path.open("rb") as file:
        _header_length(file.read(BEGINNING_BYTES), path.suffix)  # before half a gigabyte is read for nothing
        file.seek(0)
        # All of it once, so that the bytes that are checked are the bytes that are used.
        content = file.read()
    length = _header_length(content, path.suffix)
    header = parse_object(content[HEADER_LENGTH_BYTES : HEADER_LENGTH_BYTES + length], "the adapter file's header")
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise AdapterInvalid("the adapter file's metadata are not text")
    return WeightFile(header, metadata, content)


def _header_length(content: bytes, suffix: str) -> int:
    """Return the header's length, within the limit, from the first bytes of a safetensors file."""
    length = int.from_bytes(content[:HEADER_LENGTH_BYTES], "little")
    is_safetensors = length <= MAX_HEADER_BYTES and content[HEADER_LENGTH_BYTES : HEADER_LENGTH_BYTES + 1] == b"{"
    if not is_safetensors and (suffix in PICKLE_SUFFIXES or PICKLE_OR_ZIP.match(content)):
        raise AdapterUnsafe("the adapter file is a pickle or an archive: only safetensors files are opened")
    if not is_safetensors:
        raise AdapterInvalid("the adapter file does not begin with a safetensors header of an acceptable size")
    return length


def parse_object(text: bytes | str, what: str) -> dict[str, Any]:
    """Parse a JSON object without repeated names, NaN or deep nesting; else AdapterInvalid, which names `what`."""
    try:
        parsed = json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise AdapterInvalid(f"{what} is not proper JSON") from error
    if not isinstance(parsed, dict):
        raise AdapterInvalid(f"{what} is not a JSON object")
    return parsed


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # safetensors accepts a repeated name and keeps the last: two readers could see two different adapters.
    if len(parsed := dict(pairs)) < len(pairs):
        raise ValueError("repeated name")
    return parsed


def _no_constant(name: str) -> float:
    raise ValueError(name)
