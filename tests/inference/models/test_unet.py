"""The forward of the families with a UNet."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from inference.models.unet_attention import GroupedAttnProcessor, group_projections
from tests.support.models.tiny_models import build_tiny_sd, build_tiny_sdxl, load_pipe

pytestmark = pytest.mark.usefixtures("one_thread")


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
