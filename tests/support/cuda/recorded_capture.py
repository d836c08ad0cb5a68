"""A stand-in for CUDA graphs on any device: it records the operators of a forward and runs them again.

As by a graph, Python does not run again. Operators have the numbers of the capture, and the very tensors that they had
then: what a forward has read of anything but its static inputs is what it was.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from tests.support.cuda.operators import tensors_in

aten = torch.ops.aten
# The host would wait for their results, which no capture allows.
WAITS = frozenset({aten.item.default, aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default})


class RecordedCapture:
    """`Capture` by records. `kernel` is called in place of Triton's, by `launch`."""

    def __init__(self, kernel: Callable[..., None] | None = None) -> None:
        self._kernel = kernel
        self._recorder: _Recorder | None = None
        self.num_bytes = 0
        self.num_captures = 0
        self.num_replays = 0
        self.num_releases = 0

    def warm_up(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        return work()

    def capture(self, work: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        self.num_captures += 1
        self._recorder = recorder = _Recorder()
        try:
            with recorder:
                output = work()
        finally:
            self._recorder = None
        recorder.spoil()
        self.num_bytes += 1

        def replay() -> torch.Tensor:
            self.num_replays += 1
            recorder.replay()
            return output

        return replay

    def release(self) -> None:
        self.num_releases += 1
        self.num_bytes = 0

    def launch(self, grid: tuple[int, ...], *args: Any, **constants: int) -> None:
        """Launch the kernel; in a forward that is captured, at each replay too."""
        assert self._kernel is not None
        launched = _Launch(self._kernel, grid, args, constants)
        launched.run()
        if self._recorder is not None:
            self._recorder.steps.append(launched)


class _Launch:
    def __init__(
        self, kernel: Callable[..., None], grid: tuple[int, ...], args: Sequence[Any], constants: Mapping[str, int]
    ) -> None:
        self._call = kernel, grid, args, constants

    def run(self) -> None:
        kernel, grid, args, constants = self._call
        with _disable_current_modes():
            kernel(grid, *args, **constants)


class _Step:
    """An operator, with the tensors it read and those it wrote."""

    def __init__(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], made: Any) -> None:
        self._call = func, args, kwargs
        self.made = list(tensors_in((made,)))
        read = {one.untyped_storage().data_ptr() for one in tensors_in((*args, *kwargs.values()))}
        self.new = [one for one in self.made if one.untyped_storage().data_ptr() not in read]

    def run(self) -> None:
        func, args, kwargs = self._call
        for mine, again in zip(self.made, tensors_in((func(*args, **kwargs),)), strict=True):
            # A view, or what was written in place, is there already.
            if mine.data_ptr() != again.data_ptr():
                mine.copy_(again)


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[_Step | _Launch] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in WAITS:
            raise RuntimeError(f"the host waits for {func}")
        made = func(*args, **(kwargs or {}))
        self.steps.append(_Step(func, args, kwargs or {}, made))
        return made

    def spoil(self) -> None:
        """Leave nothing in the tensors that the forward made: capturing runs no kernel."""
        for step in self.steps:
            for one in step.new if isinstance(step, _Step) else ():
                if one.is_floating_point():
                    one.fill_(torch.nan)

    def replay(self) -> None:
        for step in self.steps:
            step.run()
