"""Attention: the order of kernels by hardware, and Z-Image's rows on their own tokens, held against diffusers."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImageControlNetModel
from torch.nn import functional
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode

from inference.device.attention import CUDNN_FIRST, AttentionOrder, Hardware
from inference.lane import Lane
from inference.models.attention.z_image import (
    RowLengths,
    RowTokens,
    attend_to_own_tokens,
    attend_to_own_tokens_in_controlnet,
)
from inference.request import AdapterFile
from tests.support.engine.engine_requests import request_of
from tests.support.engine.watched_engine import WatchedEngine, WatchedModel, submit_together
from tests.support.models.tiny_adapters import Z_IMAGE_EVERY_LAYER
from tests.support.models.tiny_controls import control_of, speckles, write_controlnet
from tests.support.models.tiny_models import build_tiny_z_image, load_pipe, write_adapter

pytestmark = pytest.mark.usefixtures("one_thread", "no_forward_failed")

CUDA = torch.device("cuda", 0)


# --- The order of kernels


def order_in_force() -> list[SDPBackend]:
    """Return the kernels that torch would try now, in order."""
    return torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True)  # type: ignore[no-any-return]


@pytest.fixture
def own_order() -> list[SDPBackend]:
    """Return torch's own order, before anything changed it."""
    return order_in_force()


def test_cudnn_is_tried_first_on_hopper_while_a_denoiser_runs_and_no_longer(own_order: list[SDPBackend]) -> None:
    order = AttentionOrder(CUDA, lambda _: Hardware(9, 91900))

    with order.applied():
        assert order_in_force() == CUDNN_FIRST
    assert order_in_force() == own_order


@pytest.mark.parametrize(
    "hardware", [Hardware(8, 91900), Hardware(10, 91900), Hardware(9, 91500), Hardware(9, 0)], ids=str
)
def test_other_gpus_and_older_cudnns_keep_torch_s_own_order(hardware: Hardware, own_order: list[SDPBackend]) -> None:
    with AttentionOrder(CUDA, lambda _: hardware).applied():
        assert order_in_force() == own_order


def test_cpu_capability_is_never_queried(own_order: list[SDPBackend]) -> None:
    def probe(_device: torch.device) -> Hardware:
        raise AssertionError("there is no GPU to ask")

    with AttentionOrder(torch.device("cpu"), probe).applied():
        assert order_in_force() == own_order


# --- Z-Image's rows


class AttentionCalls(TorchFunctionMode):
    """Notes every attention computed inside: the query's shape, and whether a mask came with it."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []
        self.num_masked = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            query = args[0] if args else kwargs["query"]
            self.shapes.append(tuple(query.shape))
            self.num_masked += (kwargs or {}).get("attn_mask") is not None
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_z_image(tmp_path_factory.mktemp("tiny") / "z-image")


def transformer_of(checkpoint: Path) -> Any:
    return load_pipe(checkpoint).transformer.eval()


# Latent heights and widths, captions' tokens, and what diffusers makes of both.
SIZES = [(8, 8), (8, 24), (16, 16)]
CAPTIONS = [5, 40, 70]
ROWS = [RowTokens(32, 32), RowTokens(64, 64), RowTokens(64, 96)]


class Batch:
    """Rows of other sizes and captions, as the transformer takes them."""

    def __init__(self, sizes: Sequence[tuple[int, int]], captions: Sequence[int]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.latents = [torch.randn(16, 1, *size, generator=generator) for size in sizes]
        self.times = torch.linspace(0.1, 0.9, len(sizes))
        self.captions = [torch.randn(length, 32, generator=generator) for length in captions]
        self.shown = [torch.randn(33, 1, *size, generator=generator) for size in sizes]

    def predicted(self, transformer: Any) -> list[torch.Tensor]:
        with torch.inference_mode():
            return transformer(self.latents, self.times, self.captions, return_dict=False)[0]  # type: ignore[no-any-return]

    def hints(self, net: Any) -> dict[int, torch.Tensor]:
        with torch.inference_mode():
            return net(self.latents, self.times, self.captions, self.shown)  # type: ignore[no-any-return]


def furthest(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    return max(float((one - other).abs().max()) for one, other in zip(ours, theirs, strict=True))


def test_rows_of_all_lengths_come_to_the_same_as_behind_diffusers_mask(checkpoint: Path) -> None:
    plain, split, lengths = transformer_of(checkpoint), transformer_of(checkpoint), RowLengths()
    attend_to_own_tokens(split, lengths)
    batch = Batch(SIZES, CAPTIONS)
    with AttentionCalls() as masked:
        theirs = batch.predicted(plain)

    with lengths.cleared_on_exit(), AttentionCalls() as calls:
        lengths.set(ROWS)
        ours = batch.predicted(split)

    assert furthest(ours, theirs) == 0.0
    assert masked.num_masked == len(masked.shapes) > 0
    assert calls.num_masked == 0
    assert {shape[0] for shape in calls.shapes} == {1}
    assert {shape[2] for shape in calls.shapes} == {32, 64, 96, 128, 160}


def test_rows_of_one_length_share_a_call(checkpoint: Path) -> None:
    plain, split, lengths = transformer_of(checkpoint), transformer_of(checkpoint), RowLengths()
    attend_to_own_tokens(split, lengths)
    batch = Batch([(16, 16), (8, 32)], [40, 60])

    with lengths.cleared_on_exit(), AttentionCalls() as calls:
        lengths.set([RowTokens(64, 64)] * 2)
        ours = batch.predicted(split)

    assert furthest(ours, batch.predicted(plain)) == 0.0
    assert calls.num_masked == 0
    assert {shape[0] for shape in calls.shapes} == {2}


@pytest.mark.parametrize(
    "rows",
    [[], ROWS[:2], [RowTokens(96, 128)] * 3],
    ids=["none", "fewer rows", "other lengths"],
)
def test_lengths_of_another_batch_are_never_used(checkpoint: Path, rows: list[RowTokens]) -> None:
    plain, split, lengths = transformer_of(checkpoint), transformer_of(checkpoint), RowLengths()
    attend_to_own_tokens(split, lengths)
    batch = Batch(SIZES, CAPTIONS)

    with lengths.cleared_on_exit(), AttentionCalls() as calls:
        lengths.set(rows)
        ours = batch.predicted(split)

    assert calls.num_masked == len(calls.shapes)
    assert furthest(ours, batch.predicted(plain)) == 0.0


def test_lengths_do_not_outlive_a_forward_that_fails() -> None:
    lengths = RowLengths()

    def fail() -> None:
        with lengths.cleared_on_exit():
            lengths.set(ROWS)
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()

    assert lengths._lengths == {}


@pytest.mark.parametrize("refiner", ["control_noise_refiner", "control_layers", None])
def test_a_controlnet_s_rows_come_to_the_same_as_behind_diffusers_mask(
    checkpoint: Path, tmp_path: Path, refiner: str | None
) -> None:
    places = [0, 1] if refiner == "control_layers" else [0]
    config = {"add_control_noise_refiner": refiner, "control_refiner_layers_places": places}
    write_controlnet(tmp_path / "net", load_pipe(checkpoint), **config)
    lengths = RowLengths()

    def made(*split: Callable[[Any, RowLengths], None]) -> Any:
        transformer = transformer_of(checkpoint)
        net = ZImageControlNetModel.from_pretrained(tmp_path / "net").eval()
        for one, model in zip(split, (transformer, net), strict=False):
            one(model, lengths)
        return ZImageControlNetModel.from_transformer(net, transformer)

    batch = Batch(SIZES, CAPTIONS)
    theirs = batch.hints(made())
    with lengths.cleared_on_exit(), AttentionCalls() as calls:
        lengths.set(ROWS)
        ours = batch.hints(made(attend_to_own_tokens, attend_to_own_tokens_in_controlnet))

    own = [row.image + row.caption for row in ROWS]
    for layer, hints in theirs.items():
        kept = [[hint[:length] for hint, length in zip(one, own, strict=True)] for one in (ours[layer], hints)]
        assert furthest(*kept) == 0.0
    assert calls.num_masked == 0


class MaskWatchingModel(WatchedModel):
    """Notes the attention of every forward. `calls`: all of them together."""

    calls: AttentionCalls

    def denoise(self, lanes: Sequence[Lane]) -> list[torch.Tensor]:
        with self.calls:
            return super().denoise(lanes)


@pytest.fixture
def engine(checkpoint: Path, tmp_path: Path) -> Iterator[WatchedEngine]:
    MaskWatchingModel.calls = AttentionCalls()
    control = write_controlnet(tmp_path / "pose", load_pipe(checkpoint))
    made = WatchedEngine(checkpoint, MaskWatchingModel, CONTROLNETS=f"pose={control}")
    yield made
    made.close()


def test_no_attention_of_a_mixed_z_image_batch_has_a_mask(
    engine: WatchedEngine, checkpoint: Path, tmp_path: Path
) -> None:
    path = tmp_path / "style.safetensors"
    write_adapter(path, load_pipe(checkpoint), layout="diffusers_new", targets=Z_IMAGE_EVERY_LAYER)
    fields: dict[str, Any] = {"height": 64, "num_inference_steps": 2}
    calls = submit_together(
        engine,
        [
            request_of(width=64, guidance_scale=2.0, control=control_of("pose", speckles(1)), **fields),
            request_of(width=80, guidance_scale=0.0, prompt="a fox " * 9, **fields),
            request_of(width=64, guidance_scale=2.0, adapters=(AdapterFile(path, None, 1.0),), **fields),
        ],
    )

    assert [call.error for call in calls] == [None] * 3
    assert max(map(len, engine.model.batches)) >= 3
    assert MaskWatchingModel.calls.num_masked == 0
