"""Attention's heads: split, rotated by positions, and attended over."""

import torch
from torch.nn import functional


def by_heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Return [rows, tokens, width] as [rows, tokens, heads, width]."""
    return x.view(*x.shape[:-1], num_heads, -1)


def rotated(x: torch.Tensor, freqs_cis: torch.Tensor) -> torch.Tensor:
    """Apply rotary positions: neighbours in [rows, tokens, heads, width] are rotated as complex numbers, in 32 bits."""
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    if torch.compiler.is_compiling():
        # Written out: there is no generated code for complex numbers.
        cosine, sine = torch.view_as_real(freqs_cis)[:, :, None].unbind(-1)
        real, imaginary = pairs.unbind(-1)
        turned = torch.stack((real * cosine - imaginary * sine, real * sine + imaginary * cosine), -1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * freqs_cis[:, :, None])
    return turned.flatten(3).type_as(x)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Call torch's attention with [rows, tokens, heads, width] each, which torch orders otherwise."""
    query, key, value = (one.transpose(1, 2) for one in (query, key, value))
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)
