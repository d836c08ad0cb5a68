"""The ControlNets of the settings: checked at start, each loaded on first use."""

from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import safetensors
import torch

from inference.checkpoints.hub import one_line
from inference.checkpoints.weight_files import GB
from inference.controlnet.files import ControlNetFiles, most_bytes
from inference.errors import EngineFault, EngineStartFailed

# Returns how a ControlNet's config does not match the model; None where it does.
FindMismatch = Callable[[Any], str | None]


class ControlNets:
    """Owner of the ControlNets' files. `load` may run on any thread; the caller owns what it returns."""

    def __init__(
        self, files: Mapping[str, ControlNetFiles], *, max_bytes: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Raise EngineStartFailed where one of them alone takes more than `max_bytes`."""
        self.max_bytes = max_bytes
        self._files = files
        self._device = device
        self._dtype = dtype
        self._copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        for name, found in files.items():
            if self.num_bytes(name) > max_bytes:
                size = f"takes {self.num_bytes(name) / GB:.2f} GB, CONTROLNET_MEMORY_GB is {max_bytes / GB:.2f}"
                raise EngineStartFailed(f"{found.subject} {size}: raise that, or leave it out")

    @property
    def names(self) -> tuple[str, ...]:
        """The names that jobs may use."""
        return tuple(self._files)

    @property
    def most_bytes(self) -> int:
        """The most bytes of those loaded at once."""
        return most_bytes(self._files, self._dtype.itemsize, self.max_bytes)

    def num_bytes(self, name: str) -> int:
        """Return its bytes on the device."""
        return self._files[name].num_bytes(self._dtype.itemsize)

    def check(self, class_name: str | None, find_mismatch: FindMismatch) -> None:
        """Raise EngineStartFailed where one is of another class, does not match the model, or has not the weights that
        its config describes."""
        for found in self._files.values():
            if found.class_name != class_name:
                taken = "none" if class_name is None else f"a {class_name}"
                raise EngineStartFailed(f"{found.subject} holds a {found.class_name}; this model takes {taken}")
            net = _without_weights(found)
            reason = find_mismatch(net.config)
            if reason is not None:
                raise EngineStartFailed(f"{found.subject} was made for another model than MODEL_ID: {reason}")
            wanted = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
            wrong = sorted(name for name in wanted.keys() | found.shapes if wanted.get(name) != found.shapes.get(name))
            if wrong:
                reason = f"its config and its weights do not belong together ({len(wrong)} differ, like {wrong[0]})"
                raise EngineStartFailed(f"{found.subject}: {reason}: copy or download it again")

    def load(self, name: str) -> Any:
        """Load the ControlNet on the device.

        `EngineFault` where its files, whole at start, cannot be read any more, and `torch.OutOfMemoryError` where there
        is no memory for it now.
        """
        found = self._files[name]
        net = _without_weights(found)
        try:
            # Beside the steps that are running, on a GPU; there is no such stream on a CPU.
            with torch.cuda.stream(self._copy_stream):
                net.load_state_dict(self._read(found), assign=True)
                net.to(memory_format=torch.contiguous_format if self._copy_stream is None else torch.channels_last)
        except torch.OutOfMemoryError:
            raise
        except (OSError, RuntimeError, safetensors.SafetensorError) as error:
            raise EngineFault(f"{found.subject} could not be loaded: {one_line(error)}") from error
        if self._copy_stream is not None:
            self._copy_stream.synchronize()
            # Or the parameters' memory might be given away while a step on the default stream still reads it.
            for parameter in net.parameters():
                parameter.data.record_stream(torch.cuda.default_stream(self._device))
        return net.eval().requires_grad_(False)

    def _read(self, found: ControlNetFiles) -> dict[str, torch.Tensor]:
        """Read the tensors, each copied to the device before the next: no second copy of the whole."""
        tensors: dict[str, torch.Tensor] = {}
        for path in found.weights:
            with safetensors.safe_open(path, "pt") as file:
                tensors |= {name: file.get_tensor(name).to(self._device, self._dtype) for name in file.keys()}  # noqa: SIM118
        return tensors


def _without_weights(found: ControlNetFiles) -> Any:
    """Make the model of its config, on the meta device.

    Not by `from_pretrained`, which sets the process's default dtype while the engine's thread runs.
    """
    try:
        with torch.device("meta"):
            return getattr(diffusers, found.class_name).from_config(dict(found.config))
    except Exception as error:
        # A config may say anything; the library takes it at its word, and then fails in every way there is.
        raise EngineStartFailed(f"{found.subject}: its config describes no model ({one_line(error)})") from error
