"""CUDA graphs of the denoiser's forward, one for each shape of batch, replayed on tensors that stay where they are.

Python runs a forward when it is captured; a replay launches its kernels alone, with the pointers and numbers of the
capture. All that differs from step to step is copied into static tensors before it, and rows are added up to the number
that the graph was captured for.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple, Protocol

import torch

from config.logs import log_event
from inference.checkpoints.hub import one_line

logger = logging.getLogger(__name__)

# Forwards of a shape before the one that is captured: capturing takes the host as long as one more step.
EAGER_RUNS = 3
# The activations of all graphs share their memory. What each has for itself is its inputs, its output and its nodes.
MAX_GRAPHS = 16
# Shapes whose forwards are counted. Those of sizes that jobs seldom ask for are forgotten.
MAX_COUNTED = 64
# Added rows are computed like any other: up to these numbers no pair of rows is added, and beyond them few.
FEW_ROWS, SOME_ROWS = 4, 24


class ForwardInputs(NamedTuple):
    """A forward's inputs: `by_row` [rows, ...] each, and the table of its adapters as the bank has made it for the
    graph's number of rows; None where no row has an adapter."""

    by_row: Mapping[str, torch.Tensor]
    table: torch.Tensor | None = None

    @property
    def num_rows(self) -> int:
        return len(next(iter(self.by_row.values())))


# Predictions [rows, ...]. It reads these tensors and the model's weights, and nothing that another step changes.
Forward = Callable[[ForwardInputs], torch.Tensor]


class Capture(Protocol):
    """What captures and replays: `CudaCapture`, or a recorder in tests. One thread uses it."""

    @property
    def num_bytes(self) -> int:
        """Bytes that the graphs keep of the device and the allocator counts as free."""
        ...

    def warm_up(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run `work` as it is captured later, and return its result."""
        ...

    def capture(self, work: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """Capture `work`; return what replays it, and then returns the one tensor that its result is in."""
        ...

    def release(self) -> None:
        """Give the memory of all graphs back to the device. None of them is replayed any more."""
        ...


class ForwardGraphs:
    """Owner of the graphs, and of the tensors that they read. The engine's thread calls it."""

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._num_eager: dict[Hashable, int] = {}
        self._too_large: set[Hashable] = set()
        self._has_failed = False

    @property
    def num_bytes(self) -> int:
        """Bytes of the device that the graphs keep although the allocator counts them as free."""
        return self._capture.num_bytes

    def run(self, forward: Forward, inputs: ForwardInputs) -> torch.Tensor | None:
        """Return the predictions of the inputs' rows, a copy; None where the forward has to run eagerly.

        Forwards of one shape are given by functions that launch the same kernels.
        """
        key = _key_of(inputs)
        graph = self._graphs.get(key)
        if graph is not None:
            self._graphs.move_to_end(key)
            return graph.replay_on(inputs)
        return self._run_and_capture(key, forward, inputs) if self._is_due(key) else None

    def drop(self) -> bool:
        """Drop all graphs and free their memory, for work that found none; False where there were none."""
        if not self._graphs:
            return False
        log_event(logger, "CUDA graphs dropped for their memory", logging.WARNING, graphs=len(self._graphs))
        self._forget_all()
        return True

    def _is_due(self, key: Hashable) -> bool:
        """Count a forward without a graph; return whether it is to be captured."""
        if self._has_failed or key in self._too_large:
            return False
        # Taken out first: the key that was counted last is the last one.
        self._num_eager[key] = self._num_eager.pop(key, 0) + 1
        if len(self._num_eager) > MAX_COUNTED:
            del self._num_eager[next(iter(self._num_eager))]
        return self._num_eager[key] > EAGER_RUNS

    def _run_and_capture(self, key: Hashable, forward: Forward, inputs: ForwardInputs) -> torch.Tensor | None:
        """Run the forward and capture it. None where it failed: it is the eager forward that jobs are judged by."""
        predictions = None
        try:
            static = _static_like(inputs)
            _fill(static, inputs)
            predictions = self._capture.warm_up(lambda: forward(static))[: inputs.num_rows]
            replay = self._capture.capture(lambda: forward(static))
        except Exception as error:  # noqa: BLE001 - logged: without a graph everything is drawn as well
            is_too_large, reason = _ran_out_of_memory(error), f"{type(error).__name__}: {one_line(error)}"
        else:
            self._keep(key, _Graph(static, replay))
            return predictions
        # Only here, outside the except block, is the error gone and with it the tensors that its traceback held.
        self._give_up(key, reason, is_too_large=is_too_large)
        return predictions

    def _keep(self, key: Hashable, graph: "_Graph") -> None:
        del self._num_eager[key]
        self._graphs[key] = graph
        if len(self._graphs) > MAX_GRAPHS:
            self._graphs.popitem(last=False)
        log_event(logger, "forward captured", rows=graph.num_rows, graphs=len(self._graphs), num_bytes=self.num_bytes)

    def _give_up(self, key: Hashable, reason: str, *, is_too_large: bool) -> None:
        """Run forwards eagerly from now on: those of this shape where it is too large for the memory, else all."""
        if is_too_large:
            self._too_large.add(key)
            log_event(logger, "no memory to capture a forward: it runs eagerly", logging.WARNING, error=reason)
        else:
            self._has_failed = True
            log_event(logger, "capture failed: forwards run without CUDA graphs", logging.WARNING, error=reason)
        self._forget_all()

    def _forget_all(self) -> None:
        self._graphs.clear()
        self._num_eager.clear()
        self._capture.release()


class _Graph(NamedTuple):
    """A captured forward and the inputs that it reads."""

    static: ForwardInputs
    replay: Callable[[], torch.Tensor]

    @property
    def num_rows(self) -> int:
        return self.static.num_rows

    def replay_on(self, inputs: ForwardInputs) -> torch.Tensor:
        _fill(self.static, inputs)
        # A copy: some schedulers keep predictions, and the next replay writes over the graph's own.
        return self.replay()[: inputs.num_rows].clone()


class CudaCapture:
    """`Capture` by CUDA. Owner of the stream of captures, and of the pool of memory that their activations share."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self.num_bytes = 0

    def warm_up(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run on the stream of captures: libraries set themselves up at a stream's first use, which no graph allows."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = work()
        current.wait_stream(self._stream)
        return result

    def capture(self, work: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """See `Capture`. Waits for the device first, as `torch.cuda.graph` does."""
        graph = torch.cuda.CUDAGraph()
        # The outer context sets the stream back where `torch.cuda.graph` fails to end its capture, and does not.
        # Thread-local: other threads load adapters and pin memory meanwhile.
        with (
            torch.cuda.stream(self._stream),
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            output = work()
        self.num_bytes = self._idle_bytes()

        def replay() -> torch.Tensor:
            graph.replay()
            return output

        return replay

    def release(self) -> None:
        """See `Capture`. The graphs and their tensors are not referred to any more."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        # Of a pool whose last graph is gone torch makes no new one.
        self._pool = torch.cuda.graph_pool_handle()
        self.num_bytes = 0

    def _idle_bytes(self) -> int:
        """Return the bytes of the pool that are allocated to no tensor: activations, between two replays."""
        segments = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
        own = [one for one in segments if tuple(one["segment_pool_id"]) == tuple(self._pool)]
        return sum(one["total_size"] - one["allocated_size"] for one in own)


def padded_rows(num_rows: int) -> int:
    """Return the number of rows of the graph that runs `num_rows`: that many, or a few more."""
    if num_rows <= FEW_ROWS:
        return num_rows
    multiple = 2 if num_rows <= SOME_ROWS else 8
    return num_rows + -num_rows % multiple


def _key_of(inputs: ForwardInputs) -> Hashable:
    """Return what two forwards share that one graph runs. The table's length tells which layers have adapters."""
    by_row = tuple((name, one.shape[1:], one.dtype, _form_of(one)) for name, one in inputs.by_row.items())
    return padded_rows(inputs.num_rows), by_row, None if inputs.table is None else len(inputs.table)


def _static_like(inputs: ForwardInputs) -> ForwardInputs:
    num_rows = padded_rows(inputs.num_rows)
    by_row = {name: _zeros(num_rows, one) for name, one in inputs.by_row.items()}
    return ForwardInputs(by_row, None if inputs.table is None else torch.empty_like(inputs.table))


def _fill(static: ForwardInputs, inputs: ForwardInputs) -> None:
    """Copy the inputs over the static ones. Added rows keep what they had: zeros, or the rows of an earlier step."""
    for name, one in inputs.by_row.items():
        static.by_row[name][: len(one)].copy_(one)
    if static.table is not None and inputs.table is not None:
        static.table.copy_(inputs.table)


def _zeros(num_rows: int, part: torch.Tensor) -> torch.Tensor:
    """Allocate zeros like `part`, for `num_rows`."""
    form = _form_of(part)
    return torch.empty((num_rows, *part.shape[1:]), device=part.device, dtype=part.dtype, memory_format=form).zero_()


def _form_of(tensor: torch.Tensor) -> torch.memory_format:
    is_channels_last = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_channels_last else torch.contiguous_format


def _ran_out_of_memory(error: BaseException | None) -> bool:
    # Ending the capture fails too, and its error comes in place of the first one.
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__context__
    return False
