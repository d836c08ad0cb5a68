"""The kernel of adapters in torch's own operators: what `inference.lora.products.kernels.add_pages` computes."""

from typing import Any

import torch


def add_pages(grid: tuple[int, int, int], *args: Any, **constants: int) -> None:
    """Add to the outputs in place, by the arguments of the Triton kernel."""
    x, table, pages, scales, slab, *outputs = args[:8]
    a_start, b_starts, fan_in, tokens_per_row = args[8], args[9:12], args[12], args[17]
    tokens, ranks = x.view(-1, fan_in), constants["PAGE_RANK"]
    for first, own_tokens, first_page, num_pages in table.tolist():
        start = first * tokens_per_row
        own = slice(start, start + (tokens_per_row if own_tokens < 0 else own_tokens))
        for place in range(first_page, first_page + num_pages):
            page, scale = slab[int(pages[place])], float(scales[place])
            for member in range(grid[1]):
                a = page[a_start + member * ranks * fan_in :][: ranks * fan_in].view(ranks, fan_in)
                output = outputs[member]
                b = page[b_starts[member] :][: ranks * output.shape[1]].view(ranks, -1)
                output[own] += scale * (tokens[own].to(torch.float32) @ a.float().T @ b.float()).to(output.dtype)
