"""The adapter bank's four kernels at SDXL's shapes: twenty rows of adapters on a layer that is 1280 wide."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn.functional import conv2d

from benchmarks.gpu.clocks import time_calls
from benchmarks.gpu.stage import Context

ROWS, TOKENS, WIDTH = 20, 1024, 1280
# Members of a group that reads one input (q, k, v), and the ranks of a page.
MEMBERS, PAGE_RANK = 3, 8
CHANNELS, SIDE = 320, 128
# A page of SDXL with every linear layer, in elements of 16 bits.
PAGE_WIDTH = 20_950_000
NUM_PAGES = 33
# What the estimates were made with.
TB_PER_SECOND = 4.2


def measure(context: Context) -> None:
    """Measure each kernel for adapters of rank 8 and of rank 64, which are one page and eight."""
    for rank in (8, 64):
        pages = rank // PAGE_RANK
        for name, make in (("index_select", _index_select), ("bmm", _bmm), ("baddbmm_", _baddbmm)):
            context.measure(f"bank {name} rank {rank}", partial(_time, context, make, pages))
    context.measure("bank grouped convolution rank 8", partial(_time, context, _grouped_conv, 1))


Work = tuple[Callable[[], Any], int]


def _time(context: Context, make: Callable[[Context, int], Work], pages: int) -> dict[str, Any]:
    work, num_bytes = make(context, pages)
    with torch.inference_mode():
        times = time_calls(context, work, repeats=20, seconds=0.2)
    return {"ms": times.steady_ms, "bytes": num_bytes, "ms_by_bytes": num_bytes / TB_PER_SECOND / 1e9}


def _index_select(context: Context, pages: int) -> Work:
    """Measure gathering the A of a group's members out of the matrix of pages."""
    page_width = PAGE_WIDTH if context.is_cuda else 4 * MEMBERS * PAGE_RANK * WIDTH
    matrix = torch.zeros(NUM_PAGES, page_width, dtype=torch.bfloat16, device=context.device)
    part = matrix.narrow(1, PAGE_RANK, MEMBERS * PAGE_RANK * WIDTH)
    index = torch.arange(ROWS * pages, device=context.device) % NUM_PAGES
    return lambda: part.index_select(0, index), 2 * index.numel() * part.shape[1] * 2


def _bmm(context: Context, pages: int) -> Work:
    """Measure x Aᵀ of all members."""
    x = _drawn(context, _rows(context), _tokens(context), WIDTH)
    a = _drawn(context, _rows(context), pages * MEMBERS * PAGE_RANK, WIDTH)
    num_out = x.shape[0] * x.shape[1] * a.shape[1]
    return lambda: torch.bmm(x, a.mT), 2 * (x.numel() + a.numel() + num_out)


def _baddbmm(context: Context, pages: int) -> Work:
    """Measure adding the change to a layer's output, which is read and written."""
    output = _drawn(context, _rows(context), _tokens(context), WIDTH)
    down = _drawn(context, _rows(context), _tokens(context), pages * PAGE_RANK)
    b = _drawn(context, _rows(context), pages * PAGE_RANK, WIDTH)
    return lambda: output.baddbmm_(down, b), 2 * (2 * output.numel() + down.numel() + b.numel())


def _grouped_conv(context: Context, pages: int) -> Work:
    """Measure a convolution with kernels of each row's own, 3x3: the rows are the convolution's groups."""
    rows, side = _rows(context), SIDE if context.is_cuda else 8
    x = _drawn(context, 1, rows * CHANNELS, side, side)
    kernels = _drawn(context, rows * pages * PAGE_RANK, CHANNELS, 3, 3)
    num_out = rows * pages * PAGE_RANK * side * side
    return lambda: conv2d(x, kernels, padding=1, groups=rows), 2 * (x.numel() + kernels.numel() + num_out)


def _rows(context: Context) -> int:
    return ROWS if context.is_cuda else 2


def _tokens(context: Context) -> int:
    return TOKENS if context.is_cuda else 16


def _drawn(context: Context, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=context.device).to(torch.bfloat16)
