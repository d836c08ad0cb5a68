"""The adapter bank beside a small model, against peft applied to each row alone."""

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from inference.lora.adapter import Adapter, LowRank
from inference.lora.adapter_memory import AdapterMemory
from inference.lora.bank import AdapterBank, PackedAdapter
from inference.lora.layers import layer_groups
from inference.lora.names.key_names import DOWN, UP
from inference.lora.products.rows import AppliedAdapter, RowAdapters

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
WIDTH, TEXT_WIDTH, TOKENS, SIDE = 16, 12, 5, 6
ATTENTION = ("to_q", "to_k", "to_v", "to_out")
CONVOLUTIONS = ("conv", "shortcut", "downsampler")
EVERY_LAYER = (*ATTENTION, *CONVOLUTIONS, "time_emb_proj")


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    # As on the engine's thread.
    with torch.inference_mode():
        yield


class Attention(nn.Module):
    """As diffusers' attention: the layers' names, and whether `text` is another input than `x`."""

    def __init__(self, text_width: int | None = None) -> None:
        super().__init__()
        self.is_cross_attention = text_width is not None
        self.to_q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.to_k = nn.Linear(text_width or WIDTH, WIDTH, bias=False)
        self.to_v = nn.Linear(text_width or WIDTH, WIDTH, bias=False)
        self.to_out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, text: torch.Tensor | None = None) -> torch.Tensor:
        source = x if text is None else text
        q, k, v = self.to_q(x), self.to_k(source), self.to_v(source)
        return x + self.to_out(torch.softmax(q @ k.mT, -1) @ v)  # type: ignore[no-any-return]


class Block(nn.Module):
    """One of every layer that adapters are trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.time_emb_proj = nn.Linear(TEXT_WIDTH, WIDTH)
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.shortcut = nn.Conv2d(WIDTH, WIDTH, 1)
        self.attn1 = Attention()
        self.attn2 = Attention(TEXT_WIDTH)
        self.downsampler = nn.Conv2d(WIDTH, 2 * WIDTH, 3, stride=2, padding=1)

    def forward(self, inputs: "Inputs") -> torch.Tensor:
        x = self.shortcut(inputs.image) + self.conv(inputs.image) + self.time_emb_proj(inputs.time)[:, :, None, None]
        tokens = self.attn2(self.attn1(x.flatten(2).mT), inputs.text)
        return self.downsampler(tokens.mT.reshape(x.shape))  # type: ignore[no-any-return]


@dataclass
class Inputs:
    """One row for each lane."""

    image: torch.Tensor
    text: torch.Tensor
    time: torch.Tensor

    def row(self, number: int) -> "Inputs":
        return Inputs(*(each[number : number + 1] for each in (self.image, self.text, self.time)))


def inputs_of(num_rows: int) -> Inputs:
    generator = torch.Generator().manual_seed(num_rows)
    shapes = ((WIDTH, SIDE, SIDE), (TOKENS, TEXT_WIDTH), (TEXT_WIDTH,))
    return Inputs(*(torch.randn(num_rows, *shape, generator=generator) for shape in shapes))


@dataclass
class Trained:
    """An adapter as peft holds it, and as the bank takes it."""

    config: peft.LoraConfig
    weights: dict[str, torch.Tensor]
    adapter: Adapter


def trained(
    targets: Sequence[str] = EVERY_LAYER, *, rank: int, seed: int, rank_pattern: Mapping[str, int] | None = None
) -> Trained:
    """Make a random adapter about as strong as the weights themselves, its alphas equal to its ranks."""
    ranks = dict(rank_pattern or {})
    config = peft.LoraConfig(
        r=rank, lora_alpha=rank, target_modules=list(targets), rank_pattern=ranks, alpha_pattern=ranks
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode(mode=False):
        state = peft.get_peft_model_state_dict(peft.get_peft_model(Block(), copy.deepcopy(config)))
    # Each output of A sums up as many inputs as there are, each of B as many as the rank.
    weights = {
        name: torch.randn(each.shape, generator=generator) * each[0].numel() ** -0.5 for name, each in state.items()
    }
    layers = {
        name.removesuffix(DOWN).replace("base_model.model.", "unet."): LowRank(a, weights[name.replace(DOWN, UP)])
        for name, a in weights.items()
        if name.endswith(DOWN)
    }
    return Trained(config, weights, Adapter(layers))


ScaledAdapters = Sequence[tuple[Trained, float]]


def by_peft(base: Block, scaled: ScaledAdapters, inputs: Inputs) -> torch.Tensor:
    """Compute with peft a row that has these adapters at these scales."""
    with torch.inference_mode(mode=False):
        model: Any = copy.deepcopy(base)
        for number, (one, _) in enumerate(scaled):
            name = f"adapter{number}"
            if number:
                model.add_adapter(name, copy.deepcopy(one.config))
            else:
                model = peft.get_peft_model(model, copy.deepcopy(one.config), adapter_name=name)
            peft.set_peft_model_state_dict(model, one.weights, adapter_name=name)
        if scaled:
            model.base_model.set_adapter([f"adapter{number}" for number in range(len(scaled))])
        for module in model.modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                for number, (_, scale) in enumerate(scaled):
                    module.set_scale(f"adapter{number}", scale)
    with torch.no_grad():
        drawn: torch.Tensor = model(inputs)
    return drawn


@dataclass
class BankedBlock:
    """A bank over one block, whose pages are given out in order."""

    dtype: torch.dtype = torch.float32
    block: Block = field(init=False)
    bank: AdapterBank = field(init=False)
    num_pages: int = 0

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.base = Block()
        self.block = copy.deepcopy(self.base).to(self.dtype)
        self.bank = AdapterBank({"unet": self.block}, device=CPU, dtype=self.dtype)

    def load(self, one: Trained) -> tuple[int, ...]:
        """Put it into the next free pages."""
        packed = self.bank.pack(one.adapter)
        place = tuple(range(self.num_pages + 1, self.num_pages + 1 + packed.num_pages))
        self.num_pages += packed.num_pages
        self.bank.write(place, packed)
        return place

    def draw(self, rows: Sequence[RowAdapters], inputs: Inputs) -> torch.Tensor:
        self.bank.route(rows)
        cast = (each.to(self.dtype) for each in (inputs.image, inputs.text, inputs.time))
        return self.block(Inputs(*cast)).float()  # type: ignore[no-any-return]


def assert_each_row_is_its_own(
    banked: BankedBlock, rows: Sequence[tuple[RowAdapters, ScaledAdapters]], *, error: float = 1e-4
) -> None:
    """Assert that in one forward every row gives what peft gives for it alone."""
    inputs = inputs_of(len(rows))
    drawn = banked.draw([row for row, _ in rows], inputs)
    for number, (_, scaled) in enumerate(rows):
        expected = by_peft(banked.base, scaled, inputs.row(number))
        assert (drawn[number] - expected[0]).abs().max() <= error * expected.abs().max(), f"row {number}"


# --- One adapter


@pytest.mark.parametrize("layer", ["to_q", "to_k", "to_v", "to_out", "time_emb_proj", *CONVOLUTIONS])
@pytest.mark.parametrize("rank", [1, 8, 11])
def test_an_adapter_of_one_kind_of_layer_does_what_peft_does(layer: str, rank: int) -> None:
    banked = BankedBlock()
    one = trained([layer], rank=rank, seed=1)
    place = banked.load(one)

    assert len(place) == -(-rank // 8)
    rows: list[tuple[RowAdapters, ScaledAdapters]] = [
        ((AppliedAdapter(place, 1.0),), [(one, 1.0)]),
        ((), []),
        ((AppliedAdapter(place, -0.6),), [(one, -0.6)]),
    ]
    assert_each_row_is_its_own(banked, rows)


def test_an_adapter_whose_layers_differ_in_rank_does_what_peft_does() -> None:
    banked = BankedBlock()
    one = trained(rank=4, seed=1, rank_pattern={"to_k": 17, "conv": 9, "time_emb_proj": 1})
    place = banked.load(one)

    assert len(place) == 3
    assert_each_row_is_its_own(banked, [((AppliedAdapter(place, 1.0),), [(one, 1.0)])])


# --- Rows of many


def test_each_row_has_its_own_adapters_at_its_own_scales() -> None:
    banked = BankedBlock()
    every, attention, convolutions = (
        trained(rank=20, seed=1),
        trained(ATTENTION, rank=4, seed=2),
        trained([*CONVOLUTIONS, "time_emb_proj"], rank=8, seed=3),
    )
    places = {id(one): banked.load(one) for one in (every, attention, convolutions)}

    def row_with(*scaled: tuple[Trained, float]) -> tuple[RowAdapters, ScaledAdapters]:
        return tuple(AppliedAdapter(places[id(one)], scale) for one, scale in scaled), scaled

    assert_each_row_is_its_own(
        banked,
        [
            row_with((every, 1.0)),
            row_with(),
            row_with((attention, 0.5)),
            row_with((attention, 1.0), (convolutions, 0.3)),
            row_with((every, -0.4)),
            row_with((convolutions, 2.0)),
            row_with((convolutions, 0.0)),
            row_with((every, 0.5), (attention, 0.5), (convolutions, 1.0)),
        ],
    )


def test_rows_may_change_their_order_and_number_from_one_forward_to_the_next() -> None:
    banked = BankedBlock()
    one, other = trained(rank=8, seed=1), trained(rank=8, seed=2)
    first = ((AppliedAdapter(banked.load(one), 1.0),), [(one, 1.0)])
    second = ((AppliedAdapter(banked.load(other), 1.0),), [(other, 1.0)])

    for rows in ([first, second], [second, first], [first], [second, first, ((), []), first], [second]):
        assert_each_row_is_its_own(banked, rows)


# --- Layers of one input


def test_layers_that_share_their_input_as_a_rule_are_right_where_they_do_not() -> None:
    banked = BankedBlock()
    one = trained(ATTENTION, rank=8, seed=1)
    banked.bank.route([(AppliedAdapter(banked.load(one), 1.0),)] * 2)
    attention, generator = banked.block.attn1, torch.Generator().manual_seed(1)
    inputs = [torch.randn(2, TOKENS, WIDTH, generator=generator) for _ in range(3)]
    equal_but_another = inputs[0].clone()

    def weight_of(name: str) -> torch.Tensor:
        low_rank = one.adapter.layers[f"unet.attn1.{name}"]
        linear = banked.base.attn1.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        return linear.weight + low_rank.b @ low_rank.a

    orders = (
        (("to_q", inputs[0]), ("to_k", inputs[1]), ("to_v", inputs[2])),
        (("to_q", inputs[0]), ("to_k", inputs[1]), ("to_v", inputs[0])),
        (("to_q", inputs[0]), ("to_k", inputs[1]), ("to_v", inputs[1])),
        (("to_v", inputs[1]), ("to_k", inputs[0]), ("to_q", inputs[0])),
        # Nobody fetched the last one's product: it must not be taken for the next forward's.
        (("to_q", inputs[0]), ("to_k", inputs[0]), ("to_q", inputs[2]), ("to_v", inputs[2])),
        (("to_q", inputs[0]), ("to_k", equal_but_another), ("to_v", inputs[0])),
    )
    for calls in orders:
        for name, x in calls:
            expected = x @ weight_of(name).mT
            assert torch.allclose(getattr(attention, name)(x), expected, atol=1e-4), [name for name, _ in calls]


def test_the_last_forward_s_products_are_not_used_when_the_same_tensor_comes_in_again_for_other_rows() -> None:
    banked = BankedBlock()
    one, other = trained(ATTENTION, rank=8, seed=1), trained(ATTENTION, rank=8, seed=2)
    rows = [((AppliedAdapter(banked.load(each), 1.0),),) for each in (one, other)]
    attention, x = banked.block.attn1, torch.randn(1, TOKENS, WIDTH)

    # A forward that breaks off after to_q, as one that runs out of memory does.
    banked.bank.route(rows[0])
    attention.to_q(x)
    banked.bank.route(rows[1])
    low_rank = other.adapter.layers["unet.attn1.to_k"]

    expected = x @ (banked.base.attn1.to_k.weight + low_rank.b @ low_rank.a).mT
    assert torch.allclose(attention.to_k(x), expected, atol=1e-4)


# --- Pages


def test_growing_in_pages_and_in_width_keeps_what_is_loaded() -> None:
    banked = BankedBlock()
    narrow, wide, high = (
        trained(["to_q"], rank=8, seed=1),
        trained(CONVOLUTIONS, rank=16, seed=2),
        trained(EVERY_LAYER, rank=60, seed=3),
    )
    rows: list[tuple[RowAdapters, ScaledAdapters]] = []
    sizes = [banked.bank.num_bytes]
    for one in (narrow, wide, high):
        rows.append(((AppliedAdapter(banked.load(one), 0.7),), [(one, 0.7)]))
        sizes.append(banked.bank.num_bytes)
        assert_each_row_is_its_own(banked, rows)

    assert sizes == sorted(set(sizes)), "every one of them made it grow"


class Allocations(TorchDispatchMode):
    """Adds up the bytes of the tensors that operators make, views and what they write in place left out."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        is_new = isinstance(made, torch.Tensor) and not any(one.alias_info for one in func._schema.returns)
        self.num_bytes += made.nbytes if is_new else 0
        return made


def test_growing_takes_the_new_layers_memory_alone_and_moves_no_page() -> None:
    # Given a bank, of tensors that have a size and no memory, and an adapter in it
    bank = AdapterBank({"unet": Block()}, device=torch.device("meta"), dtype=torch.float32)
    narrow, wide = trained(["to_q"], rank=8, seed=1), trained(EVERY_LAYER, rank=16, seed=2)
    bank.write((1,), bank.pack(narrow.adapter))
    first = bank.num_bytes

    # When one comes that touches more layers
    packed = bank.pack(wide.adapter)
    with Allocations() as made:
        bank.write((2, 3), packed)

    # Then there was never an old and a new bank at once
    assert made.num_bytes == bank.num_bytes - first > first


def test_pages_stay_where_they_are_whatever_comes() -> None:
    banked = BankedBlock()

    def addresses() -> dict[Any, int]:
        return {slab: slab.pages.data_ptr() for slab in banked.bank._slabs if slab.pages is not None}

    before: dict[Any, int] = {}
    for number, targets in enumerate((["to_q"], ["to_q", "conv"], EVERY_LAYER, ATTENTION)):
        banked.load(trained(targets, rank=20, seed=number))
        assert before.items() <= addresses().items()
        before = addresses()

    assert sum(slab.width for slab in before) == sum(group.width for group in banked.bank._groups)


def test_an_adapter_of_attention_layers_is_packed_without_the_layers_of_one_that_came_before() -> None:
    banked = BankedBlock()
    alone = banked.bank.pack(trained(ATTENTION, rank=8, seed=1).adapter)
    other = BankedBlock()
    other.load(trained(rank=8, seed=2))

    beside = other.bank.pack(trained(ATTENTION, rank=8, seed=1).adapter)

    sizes = [sum(part.numel() for part in one.parts.values()) for one in (alone, beside)]
    assert sizes[0] == sizes[1] < sum(group.width for group in other.bank._groups)


def test_the_widest_adapters_keep_within_the_limit() -> None:
    block = Block()
    page_bytes = 4 * sum(group.width for group in layer_groups({"unet": block}))
    memory = AdapterMemory(num_slots=16, max_rank=32, max_bytes=10 * page_bytes)
    bank = AdapterBank({"unet": block}, device=CPU, dtype=torch.float32, memory=memory)
    assert (bank.num_pages, bank.num_bytes_to_come) == (9, 10 * page_bytes)

    for number, target in enumerate(EVERY_LAYER):
        bank.write((number + 1,), bank.pack(trained([target], rank=8, seed=number).adapter))
        assert bank.num_bytes + bank.num_bytes_to_come == 10 * page_bytes
    bank.write((9,), bank.pack(trained(rank=8, seed=9).adapter))

    assert (bank.num_bytes, bank.num_bytes_to_come) == (10 * page_bytes, 0)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_cpu_s_pages_take_memory_only_as_they_are_written() -> None:
    memory = AdapterMemory(num_slots=1000, max_rank=128)
    bank = AdapterBank({"unet": Block()}, device=CPU, dtype=torch.float32, memory=memory)
    packed = bank.pack(trained(rank=8, seed=1).adapter)
    before = resident_bytes()

    bank.write((1,), packed)

    assert bank.num_bytes > 200_000_000
    assert resident_bytes() - before < 0.2 * bank.num_bytes


class CrowdedBank(AdapterBank):
    """Beside the steps that run there is no room for a copy of an adapter."""

    def _copied(self, staged: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_an_adapter_without_room_for_a_copy_is_written_from_the_host(caplog: pytest.LogCaptureFixture) -> None:
    banked = BankedBlock()
    banked.bank.__class__ = CrowdedBank
    one = trained(rank=12, seed=1)

    row: tuple[RowAdapters, ScaledAdapters] = ((AppliedAdapter(banked.load(one), 1.0),), [(one, 1.0)])

    assert "no memory for a copy of an adapter" in caplog.text
    assert_each_row_is_its_own(banked, [row, ((), [])])


def test_an_adapter_that_was_packed_before_the_pages_became_wider_is_right_beside_the_others() -> None:
    banked = BankedBlock()
    early, late = trained(ATTENTION, rank=8, seed=1), trained(CONVOLUTIONS, rank=8, seed=2)

    packed_early = banked.bank.pack(early.adapter)
    packed_late = banked.bank.pack(late.adapter)
    banked.bank.write((1,), packed_late)
    banked.bank.write((2,), packed_early)

    rows: list[tuple[RowAdapters, ScaledAdapters]] = [
        ((AppliedAdapter((1,), 1.0),), [(late, 1.0)]),
        ((AppliedAdapter((2,), 1.0),), [(early, 1.0)]),
    ]
    assert_each_row_is_its_own(banked, rows)


@pytest.mark.parametrize("is_packed_early", [False, True])
def test_pages_that_a_smaller_adapter_takes_over_hold_nothing_of_the_larger_one(is_packed_early: bool) -> None:
    banked = BankedBlock()
    large, small = trained(rank=24, seed=1), trained(["to_q", "conv"], rank=3, seed=2)
    packed_early = banked.bank.pack(small.adapter)
    place = banked.load(large)
    assert len(place) == 3

    banked.bank.write(place[1:2], packed_early if is_packed_early else banked.bank.pack(small.adapter))

    row: RowAdapters = (AppliedAdapter(place[1:2], 1.0),)
    assert_each_row_is_its_own(banked, [(row, [(small, 1.0)]), ((), [])])
    # Beside an adapter of every layer, those that the small one leaves alone are computed for its row as well.
    every = trained(rank=8, seed=3)
    beside: tuple[RowAdapters, ScaledAdapters] = ((AppliedAdapter(banked.load(every), 1.0),), [(every, 1.0)])
    assert_each_row_is_its_own(banked, [(row, [(small, 1.0)]), beside])


def test_reused_pages_have_the_layers_of_their_new_adapter() -> None:
    banked = BankedBlock()
    before, after = trained(["to_q"], rank=8, seed=1), trained(CONVOLUTIONS, rank=8, seed=2)
    # So that what the rows wear in a convolution is asked before they wear anything there.
    banked.load(trained(rank=8, seed=3))
    place = banked.load(before)
    row: RowAdapters = (AppliedAdapter(place, 1.0),)
    assert_each_row_is_its_own(banked, [(row, [(before, 1.0)])])

    banked.bank.write(place, banked.bank.pack(after.adapter))

    assert_each_row_is_its_own(banked, [(row, [(after, 1.0)])])


def test_pages_out_of_order_are_one_adapter_s_all_the_same() -> None:
    banked = BankedBlock()
    one = trained(rank=24, seed=1)
    packed: PackedAdapter = banked.bank.pack(one.adapter)

    banked.bank.write((5, 2, 9), packed)

    assert_each_row_is_its_own(banked, [((AppliedAdapter((5, 2, 9), 1.0),), [(one, 1.0)])])


def test_bank_reports_the_models_that_an_adapter_changes() -> None:
    torch.manual_seed(0)
    bank = AdapterBank({"unet": Block(), "text_encoder": Attention()}, device=CPU, dtype=torch.float32)
    low_rank = LowRank(torch.ones(1, WIDTH), torch.ones(WIDTH, 1))
    bank.write((1,), bank.pack(Adapter({"unet.attn1.to_q": low_rank})))
    bank.write((2,), bank.pack(Adapter({"unet.attn1.to_q": low_rank, "text_encoder.to_q": low_rank})))

    assert [bank.touches(AppliedAdapter((page,), 1.0), "unet") for page in (1, 2)] == [True, True]
    assert [bank.touches(AppliedAdapter((page,), 1.0), "text_encoder") for page in (1, 2)] == [False, True]


# --- The model itself


def test_the_base_weights_are_never_written() -> None:
    banked = BankedBlock()
    before = {name: each.clone() for name, each in banked.block.state_dict().items()}

    for seed in range(3):
        banked.draw([(AppliedAdapter(banked.load(trained(rank=8, seed=seed)), 1.5),)] * 2, inputs_of(2))

    after = banked.block.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], each) for name, each in before.items())


def test_rows_without_adapters_give_the_very_bytes_of_a_model_without_a_bank() -> None:
    banked = BankedBlock()
    inputs = inputs_of(3)
    untouched = banked.base(inputs)
    before = banked.draw([()] * 3, inputs)

    place = banked.load(trained(rank=8, seed=1))
    styled = banked.draw([(AppliedAdapter(place, 1.0),)] * 3, inputs)
    after = banked.draw([()] * 3, inputs)
    mixed = banked.draw([(), (AppliedAdapter(place, 1.0),), ()], inputs)

    assert torch.equal(before, untouched)
    assert torch.equal(after, untouched)
    assert not torch.allclose(styled, untouched, atol=0.1)
    assert torch.equal(mixed[[0, 2]], untouched[[0, 2]])


def test_half_precision_follows_as_closely_as_it_can() -> None:
    banked = BankedBlock(torch.bfloat16)
    one, other = trained(rank=12, seed=1), trained(ATTENTION, rank=8, seed=2)
    rows: list[tuple[RowAdapters, ScaledAdapters]] = [
        ((AppliedAdapter(banked.load(one), 0.5),), [(one, 0.5)]),
        ((), []),
        ((AppliedAdapter(banked.load(other), 1.0),), [(other, 1.0)]),
    ]

    assert banked.draw([row for row, _ in rows], inputs_of(3)).isfinite().all()
    assert_each_row_is_its_own(banked, rows, error=0.05)
