"""Count the FLOPs of one denoiser forward of one row, on modules without memory.

`python -m benchmarks.gpu.models.flops` prints them.
"""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.models.bench_model import MODELS, BenchModel

# What the command above prints, at the sizes of the stages; Z-Image with a caption of 96 tokens.
FLOPS_PER_ROW = {"sd15": 8.033e11, "sdxl": 6.761e12, "z-image": 5.609e13}
CAPTION_TOKENS = 96


def count(model: BenchModel) -> float:
    """Count the FLOPs of one row: two for a multiplication and an addition."""
    denoiser = getattr(model.build_without_memory(), model.denoiser).to("meta")
    side = model.pixels // 8
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        if model.denoiser == "transformer":
            denoiser([torch.empty(16, 1, side, side)], torch.empty(1), [torch.empty(CAPTION_TOKENS, 2560)])
        else:
            added = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
            width = denoiser.config.cross_attention_dim
            known: dict[str, Any] = {"added_cond_kwargs": added} if denoiser.config.addition_embed_type else {}
            denoiser(torch.empty(1, 4, side, side), torch.empty(1), torch.empty(1, 77, width), **known)
    return float(counter.get_total_flops())


def main() -> None:
    """Print the constants."""
    for name, model in MODELS.items():
        print(f"{name}: {count(model):.4g}")


if __name__ == "__main__":
    main()
