"""Attention at the shapes that a step of ten lanes has: torch's kernels, and ways to leave Z-Image's mask out."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.clocks import time_calls
from benchmarks.gpu.stage import Context

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# What torch says where a kernel does not take such tensors.
NO_KERNEL = "No available kernel"
# Z-Image's image tokens, and its captions' tokens filled up to multiples of 32.
IMAGE_TOKENS = 4096
CAPTIONS = (32, 64, 64, 96, 96, 96, 96, 64, 64, 32)


class Shape(NamedTuple):
    """[rows, heads, tokens, width of a head]"""

    rows: int
    heads: int
    tokens: int
    width: int

    @property
    def flops(self) -> float:
        return 4.0 * self.rows * self.heads * self.tokens**2 * self.width


SHAPES = {"sd15": Shape(20, 8, 4096, 40), "sdxl 64": Shape(20, 10, 4096, 64), "sdxl 32": Shape(20, 20, 1024, 64)}
Z_IMAGE = Shape(10, 30, IMAGE_TOKENS + max(CAPTIONS), 128)


Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def measure(context: Context) -> None:
    """Measure every kernel on every shape in bf16."""
    shrunk = not context.is_cuda
    lengths = [(64 if shrunk else IMAGE_TOKENS) + caption for caption in CAPTIONS]
    z_image = Z_IMAGE._replace(heads=2, tokens=max(lengths)) if shrunk else Z_IMAGE
    shapes = {name: shape._replace(rows=2, tokens=64) if shrunk else shape for name, shape in SHAPES.items()}
    for name, shape in {**shapes, "z-image": z_image}.items():
        for kernel, backend in KERNELS.items():
            work = partial(_time, context, shape, _by_kernel(backend))
            context.measure(f"attention {name} {kernel}", work, needs_cuda=True)
    _measure_ragged(context, z_image, lengths)


def _measure_ragged(context: Context, shape: Shape, lengths: list[int]) -> None:
    """Measure rows of several lengths, padded to the longest."""
    mask = torch.zeros(shape.rows, 1, 1, shape.tokens, dtype=torch.bool, device=context.device)
    for row, length in enumerate(lengths):
        mask[row, ..., :length] = True
    for kernel in ("efficient", "cudnn"):
        work = partial(_time, context, shape, _by_kernel(KERNELS[kernel], mask))
        context.measure(f"attention z-image masked {kernel}", work, needs_cuda=True)
    by_choice = partial(scaled_dot_product_attention, attn_mask=mask)
    context.measure("attention z-image masked, torch's choice", partial(_time, context, shape, by_choice))
    for kernel in ("flash", "cudnn"):
        work = partial(_time, context, shape, _row_by_row(KERNELS[kernel], lengths))
        context.measure(f"attention z-image row by row {kernel}", work, needs_cuda=True)
    context.measure("attention z-image varlen", partial(_time_varlen, context, shape, lengths), needs_cuda=True)


def _time(context: Context, shape: Shape, attend: Attend) -> dict[str, Any]:
    # [rows, tokens, heads, width] in memory, as the projections leave it.
    drawn = [torch.randn(shape.rows, shape.tokens, shape.heads, shape.width, device=context.device) for _ in range(3)]
    query, key, value = (one.to(torch.bfloat16).transpose(1, 2) for one in drawn)
    try:
        times = time_calls(context, lambda: attend(query, key, value), seconds=0.3)
    except RuntimeError as error:
        if NO_KERNEL not in str(error):
            raise
        return {"shape": list(shape), "skipped": "no kernel of this kind takes it"}
    return {"shape": list(shape), "ms": times.steady_ms, "tflops": shape.flops / times.steady_ms / 1e9}


def _time_varlen(context: Context, shape: Shape, lengths: list[int]) -> dict[str, Any]:
    from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415 - torch has it from 2.10 on

    ends = torch.tensor([0, *lengths], device=context.device).cumsum(0).to(torch.int32)
    drawn = [torch.randn(sum(lengths), shape.heads, shape.width, device=context.device) for _ in range(3)]
    query, key, value = (one.to(torch.bfloat16) for one in drawn)
    longest = max(lengths)
    times = time_calls(context, lambda: varlen_attn(query, key, value, ends, ends, longest, longest), seconds=0.3)
    return {"shape": list(shape), "ms": times.steady_ms, "tflops": shape.flops / times.steady_ms / 1e9}


def _by_kernel(backend: SDPBackend, mask: torch.Tensor | None = None) -> Attend:
    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(query, key, value, attn_mask=mask)

    return attend


def _row_by_row(backend: SDPBackend, lengths: list[int]) -> Attend:
    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        attended = torch.zeros_like(query)
        with sdpa_kernel(backend):
            for row, length in enumerate(lengths):
                own_query, own_key, own_value = (one[row, :, :length][None] for one in (query, key, value))
                attended[row, :, :length] = scaled_dot_product_attention(own_query, own_key, own_value)[0]
        return attended

    return attend
