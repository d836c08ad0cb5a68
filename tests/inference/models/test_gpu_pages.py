"""The pages from nothing to a picture: their figures of memory are the worker's own, of the models' full configs."""

import re

import pytest
import torch

from inference.checkpoints.memory_plan import Placement, most_adapter_bytes, plan
from inference.checkpoints.weight_files import GB
from inference.errors import EngineStartFailed
from tests.support.models.full_pipelines import build_pipeline
from tests.support.paths import ROOT

BYTES_EACH = 2
# What a card is sold as, less what its driver takes.
GIB, DRIVER_BYTES = 1024**3, 500_000_000
ROW = re.compile(r"^\| (\d+) GB(?: \(.*?\))? \| (.*?) \| (.*?) \|$", re.MULTILINE)
PLACED = {"does not start": None, "parts take turns": Placement.OFFLOADED, "stays": Placement.RESIDENT}


@pytest.mark.parametrize("name", ["sd15", "sdxl", "z-image"])
def test_memory_on_a_page_is_what_the_worker_plans(name: str) -> None:
    page = (ROOT / "docs" / f"gpu-{name}.md").read_text()
    parts = build_pipeline(name).components
    needed = {
        part: BYTES_EACH * sum(weight.numel() for weight in model.parameters())
        for part, model in parts.items()
        if isinstance(model, torch.nn.Module)
    }

    assert f"**{sum(needed.values()) / GB:.2f} GB**" in page
    rows = ROW.findall(page)
    assert len(rows) >= 5
    for size, happens, adapters in rows:
        free = int(size) * GIB - DRIVER_BYTES
        try:
            placement = plan(needed, free)
        except EngineStartFailed:
            placement = None
        assert placement is next(place for words, place in PLACED.items() if happens.startswith(words)), size
        if placement:
            assert adapters == f"{most_adapter_bytes(None, needed, free, placement) / GB:.1f} GB", size
