"""The files of a PEFT adapter folder, and how PEFT's weights are recognized."""

from pathlib import Path

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_PICKLE = "adapter_model.bin"

# How a sentence about weights without their config goes on.
WANTS_CONFIG = f"has its weights named by PEFT, whose strength is in {PEFT_CONFIG}: store that file beside it"

_PREFIX = b'"base_model.model.'
_HEADER_LENGTH_BYTES = 8
# The engine reads no longer header.
_MAX_HEADER_BYTES = 4_000_000


def is_named_by_peft(weights: Path) -> bool:
    """Return whether a safetensors file names its tensors as PEFT does. The header is searched, not parsed."""
    with weights.open("rb") as file:
        length = int.from_bytes(file.read(_HEADER_LENGTH_BYTES), "little")
        return _PREFIX in file.read(min(length, _MAX_HEADER_BYTES))
