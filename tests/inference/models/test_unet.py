"""The forward of the families with a UNet: its attention, and the order of its rows."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from inference.lane import ActiveRequest, Conditioning, Lane
from inference.lora.bank import AppliedAdapter, RowAdapters
from inference.models.attention.unet import GroupedAttnProcessor, group_projections
from inference.models.inputs import Prompt
from tests.support.engine.engine_requests import request_of
from tests.support.engine.watched_engine import WatchedEngine
from tests.support.models.tiny_models import build_tiny_sd, build_tiny_sdxl, load_pipe

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WatchedEngine]:
    made = WatchedEngine(build_tiny_sd(tmp_path_factory.mktemp("sd")))
    yield made
    made.close()


# --- Attention


def attentions_of(net: torch.nn.Module) -> list[Attention]:
    return [module for module in net.modules() if isinstance(module, Attention)]


def inputs_of(unet: Any) -> dict[str, Any]:
    """Return inputs of three rows, whose prompts have two chunks."""
    config = unet.config
    inputs = {
        "sample": torch.randn(3, config.in_channels, 16, 8),
        "timestep": torch.tensor([5.0, 10.0, 700.0]),
        "encoder_hidden_states": torch.randn(3, 154, config.cross_attention_dim),
    }
    if config.addition_embed_type is None:
        return inputs
    width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return inputs | {"added_cond_kwargs": {"text_embeds": torch.randn(3, width), "time_ids": torch.randn(3, 6)}}


@pytest.mark.parametrize("is_masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("build", [build_tiny_sd, build_tiny_sdxl])
def test_grouped_attention_is_bit_equal_to_diffusers(tmp_path: Path, build: Any, is_masked: bool) -> None:
    unet = load_pipe(build(tmp_path / "model")).unet
    inputs = inputs_of(unet)
    if is_masked:
        inputs["encoder_attention_mask"] = torch.arange(154) < torch.tensor([[154], [77], [154]])

    with torch.inference_mode():
        theirs = unet(**inputs).sample
        group_projections(unet)
        ours = unet(**inputs).sample

    assert {type(one.processor) for one in attentions_of(unet)} == {GroupedAttnProcessor}
    assert torch.equal(theirs, ours)


@pytest.mark.parametrize(
    "kind",
    [
        {"norm_num_groups": 4},
        {"residual_connection": True},
        {"rescale_output_factor": 2.0},
        {"cross_attention_norm": "layer_norm"},
        {"qk_norm": "layer_norm"},
    ],
    ids=str,
)
def test_attention_of_another_kind_keeps_diffusers_processor(kind: dict[str, Any]) -> None:
    attention = Attention(query_dim=16, heads=2, dim_head=8, processor=AttnProcessor2_0(), **kind)

    group_projections(attention)

    assert type(attention.processor) is AttnProcessor2_0


# --- Rows


class RecordingBank:
    """Records the adapters of each forward's rows."""

    def __init__(self) -> None:
        self.rows: list[RowAdapters] = []

    def route(self, rows: Sequence[RowAdapters]) -> None:
        self.rows = list(rows)


def lane_of(engine: WatchedEngine, seed: int, row: RowAdapters, *, guidance_scale: float) -> Lane:
    """Prepare a lane that has joined, without its adapters in the bank."""
    request = request_of(width=64, height=64, guidance_scale=guidance_scale, seeds=(seed,))
    active = ActiveRequest(request, engine.model.batch_traits(request), lambda _: None, lambda: False, ())
    prompts = [Prompt(f"a hill and {seed} trees"), Prompt("dark")]
    active.conditioning = Conditioning(*engine.model.encode(prompts, [(), ()]))
    active.row = row
    (lane,) = active.lanes
    lane.sampler = engine.model.begin(lane)[1]
    return lane


def test_rows_of_the_same_adapters_are_neighbours_and_predictions_are_in_the_order_of_the_lanes(
    engine: WatchedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = (AppliedAdapter((1,), 1.0),), (AppliedAdapter((2,), 0.5),)
    kinds: list[tuple[RowAdapters, float]] = [
        (other, 3.0),
        ((), 1.0),
        (one, 4.0),
        ((), 5.0),
        (other, 1.0),
        (one, 2.0),
        (other, 3.0),
    ]
    with torch.inference_mode():
        lanes = [lane_of(engine, seed, row, guidance_scale=scale) for seed, (row, scale) in enumerate(kinds)]
        bank = RecordingBank()
        monkeypatch.setattr(engine.model, "bank", bank)
        together = engine.model.denoise(lanes)
        rows = bank.rows
        alone = [engine.model.denoise([lane])[0] for lane in lanes]

    assert rows == [()] * 2 + [one] * 4 + [other] * 4 + [()] + [other]
    for prediction, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(prediction, expected, atol=1e-5, rtol=1e-5)
