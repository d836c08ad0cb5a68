"""A denoiser's forward, the adapter bank's kernels included, as one CUDA graph."""

from typing import Any, NamedTuple

import torch

from benchmarks.gpu.clocks import time_calls
from benchmarks.gpu.speed.forwards import Forwards
from benchmarks.gpu.stage import Context, Figures
from inference.device.forward_graphs import EAGER_RUNS, CudaCapture

WARM_UPS = 3


class Call(NamedTuple):
    """What a denoiser was called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def measure_graph(context: Context, forwards: Forwards, num_lanes: int) -> Figures:
    """Capture the forward of a step of these lanes with adapters, and replay it beside the eager one.

    Its inputs are the step's own tensors, which stay where they are; the bank has its routes on the device already.
    """
    call = _call_of(forwards, num_lanes)
    denoiser = forwards.denoiser

    def forward() -> torch.Tensor:
        with torch.inference_mode(), forwards.family._attention.applied():
            predicted: torch.Tensor = denoiser(*call.args, **call.kwargs)[0]
        return predicted

    eager = forward().clone()
    eager_times = time_calls(context, forward)
    graph, output = _captured(forward)
    graph.replay()
    context.synchronize()
    difference = float((output.float() - eager.float()).abs().max())
    times = time_calls(context, graph.replay)
    return {
        "eager_ms": eager_times.steady_ms,
        "eager_host_ms": eager_times.host_ms,
        "graph_ms": times.steady_ms,
        "graph_host_ms": times.host_ms,
        "largest_difference": difference,
        "is_equal": bool(torch.equal(output, eager)),
    }


def measure_captured_steps(context: Context, forwards: Forwards, num_lanes: int) -> Figures:
    """Time a step of these lanes with adapters as it is, and with its forward captured by the engine's own graphs."""
    family = forwards.family

    def step() -> list[torch.Tensor]:
        return forwards.step(num_lanes, has_adapters=True)

    eager, eager_times = step(), time_calls(context, step)
    family.capture_forwards(CudaCapture(context.device))
    try:
        for _ in range(EAGER_RUNS + 1):
            step()
        replayed, times = step(), time_calls(context, step)
        is_captured, num_bytes = not family.ran_eagerly, family.num_bytes_of_graphs
    finally:
        family.drop_graphs()
        family._graphs = None
    differences = [float((one - other).abs().max()) for one, other in zip(eager, replayed, strict=True)]
    return {
        "is_captured": is_captured,
        "eager_ms": eager_times.steady_ms,
        "eager_host_ms": eager_times.host_ms,
        "graph_ms": times.steady_ms,
        "graph_host_ms": times.host_ms,
        "pool_bytes": num_bytes,
        "largest_difference": max(differences),
        "is_equal": max(differences) == 0.0,
    }


def _call_of(forwards: Forwards, num_lanes: int) -> Call:
    """Capture the arguments of the denoiser in a step; the bank keeps the step's routes."""
    calls: list[Call] = []
    handle = forwards.denoiser.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(Call(args, kwargs)), with_kwargs=True
    )
    try:
        forwards.step(num_lanes, has_adapters=True)
    finally:
        handle.remove()
    return calls[-1]


def _captured(forward: Any) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    # Libraries set themselves up on a stream's first use, which a capture would not allow.
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            forward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = forward()
    return graph, output
