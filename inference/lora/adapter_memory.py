"""How much of the device's memory the pages of adapters may take, and how many pages that is."""

import logging
import math
from dataclasses import dataclass

from config.logs import log_event
from inference.checkpoints.weight_files import GB
from inference.errors import EngineStartFailed
from inference.lora.layers import PAGE_RANK

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AdapterMemory:
    """The settings that decide it. `max_bytes`: the limit, None for none; `is_chosen`: is it ADAPTER_MEMORY_GB, or a
    share of what is free?"""

    num_slots: int = 16
    max_rank: int = 256
    max_bytes: int | None = None
    is_chosen: bool = False

    def num_pages(self, page_bytes: int) -> int:
        """Pages beside the zero page, where one takes `page_bytes` over every layer that an adapter may touch.

        A limit that does not hold one adapter of the highest rank is refused with `EngineStartFailed` where it was
        chosen; a share of what is free holds lower ranks then, and at least one page.
        """
        wanted = self.num_slots * self.max_rank // PAGE_RANK
        if self.max_bytes is None:
            return wanted
        fitting = self.max_bytes // page_bytes - 1
        least_bytes = (self.max_rank // PAGE_RANK + 1) * page_bytes
        if self.max_bytes >= least_bytes:
            return min(wanted, fitting)
        if self.is_chosen:
            raise EngineStartFailed(self._too_little(fitting * PAGE_RANK, least_bytes))
        advice = "higher ranks are refused: lower ADAPTER_MAX_RANK, free memory or use a larger GPU"
        figures = {"memory_gb": round(self.max_bytes / GB, 2), "needed_gb": round(least_bytes / GB, 2)}
        rank = max(1, fitting) * PAGE_RANK
        log_event(
            logger,
            "the memory for adapters does not hold the highest rank",
            logging.WARNING,
            max_rank=rank,
            **figures,
            advice=advice,
        )
        return max(1, fitting)

    def _too_little(self, rank: int, least_bytes: int) -> str:
        remedy = f"set ADAPTER_MEMORY_GB to {math.ceil(100 * least_bytes / GB) / 100:.2f} or more"
        if rank > 0:
            remedy += f", or ADAPTER_MAX_RANK to {rank} or less"
        return (
            f"ADAPTER_MEMORY_GB {(self.max_bytes or 0) / GB:g} does not hold one adapter of ADAPTER_MAX_RANK"
            f" {self.max_rank} in this model, which may take {least_bytes / GB:.2f} GB: {remedy}"
        )


UNLIMITED = AdapterMemory()
