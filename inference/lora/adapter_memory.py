"""Limit of the device memory for adapters, as a number of pages."""

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
    """The settings behind the limit.

    `max_bytes`: None for no limit; `is_chosen`: from ADAPTER_MEMORY_GB, not a share of the free memory.
    """

    num_slots: int = 16
    max_rank: int = 256
    max_bytes: int | None = None
    is_chosen: bool = False

    def num_pages(self, page_bytes: int) -> int:
        """Return the number of pages beside the zero page, at `page_bytes` over all layers an adapter may touch.

        EngineStartFailed where a chosen limit does not hold one adapter of the highest rank; a share of the free memory
        then holds lower ranks, and at least one page.
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
