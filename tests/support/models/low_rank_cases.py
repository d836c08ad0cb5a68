"""Layers of every kind beside adapters of any ranks, and what a plain product makes of each row alone."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

from inference.lora.adapter import Adapter, LowRank
from inference.lora.bank import AdapterBank
from inference.lora.products.adapted_layers import project
from inference.lora.products.rows import AppliedAdapter, RowAdapters

CPU = torch.device("cpu")
# The layers of one input, by the part of the model they are in.
INPUTS = {
    "attn1": ("to_q", "to_k", "to_v"),
    "attn2": ("to_k", "to_v"),
    "proj": ("in",),
    "conv": ("in",),
    "shortcut": ("in",),
}
RANKS = (1, 2, 4, 8, 9, 16, 17, 24, 32, 33, 64, 65, 128, 256)


class Layers(nn.Module):
    """A layer of each kind that adapters change, of odd widths and of even ones."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        widths = {"to_q": fan_out, "to_k": fan_in, "to_v": fan_out + 3}
        for part, names in INPUTS.items():
            layers: dict[str, nn.Module] = {name: nn.Linear(fan_in, widths.get(name, fan_out)) for name in names}
            if part in {"conv", "shortcut"}:
                size = 3 if part == "conv" else 1
                layers = {"in": nn.Conv2d(fan_in, fan_out, size, padding=size // 2)}
            self.add_module(part, nn.ModuleDict(layers))
        self.attn2.is_cross_attention = True  # type: ignore[assignment]


@dataclass(frozen=True)
class Case:
    """Rows with adapters, by their numbers, and the input of one part. `seed`: of weights and values."""

    part: str
    fan_in: int
    fan_out: int
    ranks: tuple[int, ...]
    rows: tuple[tuple[tuple[int, float], ...], ...]
    token_counts: tuple[int, ...]
    layout: str
    dtype: torch.dtype
    seed: int

    @property
    def is_concatenated(self) -> bool:
        return self.part == "proj" and len(set(self.token_counts)) > 1


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...], max_rank: int = 256) -> Case:
    """Draw rows without adapters beside rows of one or several, of any ranks, and inputs of any layout."""
    ranks = draw(st.lists(st.sampled_from([rank for rank in RANKS if rank <= max_rank]), min_size=1, max_size=3))
    scale = st.sampled_from([1.0, 0.7, -1.5, 0.0])
    row = st.lists(st.tuples(st.integers(0, len(ranks) - 1), scale), max_size=2, unique_by=lambda one: one[0])
    rows = draw(st.lists(row.map(tuple), min_size=1, max_size=5))
    num_tokens = st.sampled_from([1, 4, 9, 64, 100])
    counts = draw(
        st.one_of(
            num_tokens.map(lambda one: [one] * len(rows)), st.lists(num_tokens, min_size=len(rows), max_size=len(rows))
        )
    )
    part = draw(st.sampled_from(list(INPUTS)))
    return Case(
        part=part,
        fan_in=draw(st.sampled_from([1, 16, 20, 72])),
        fan_out=draw(st.sampled_from([8, 24, 80])),
        ranks=tuple(ranks),
        rows=tuple(rows),
        token_counts=tuple(counts if part == "proj" else counts[:1] * len(rows)),
        layout=draw(st.sampled_from(["contiguous", "transposed", "sliced", "flat"])),
        dtype=draw(st.sampled_from(dtypes)),
        seed=draw(st.integers(0, 1000)),
    )


class Scene:
    """The layers of a case in a bank, with its adapters in pages, and its input."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._generator = torch.Generator().manual_seed(case.seed)
        self.plain = Layers(case.fan_in, case.fan_out).to(case.dtype)
        for parameter in self.plain.parameters():
            parameter.data = self._random(*parameter.shape)
        self.layers = copy.deepcopy(self.plain)
        self.bank = AdapterBank({"unet": self.layers}, device=CPU, dtype=case.dtype)
        self._adapters = [self._adapter(rank) for rank in case.ranks]
        places: list[tuple[int, ...]] = []
        for adapter in self._adapters:
            packed = self.bank.pack(adapter)
            first = 1 + sum(map(len, places))
            places.append(tuple(range(first, first + packed.num_pages))[::-1])
            self.bank.write(places[-1], packed)
        self.rows: list[RowAdapters] = [
            tuple(AppliedAdapter(places[number], scale) for number, scale in row) for row in case.rows
        ]
        self.token_counts = {"unet.proj.in": list(case.token_counts)} if case.is_concatenated else {}
        self.x = self._input()

    @property
    def names(self) -> tuple[str, ...]:
        return INPUTS[self._case.part]

    def draw(self) -> list[torch.Tensor]:
        """Return the outputs of the part's layers under the products that are set, as one or as single calls."""
        own = [self.layers.get_submodule(f"{self._case.part}.{name}") for name in self.names]
        if self._case.seed % 2:
            return list(project(own, self.x))
        return [layer(self.x) for layer in own]

    def expected(self) -> list[torch.Tensor]:
        """Return what each row's own adapters make of its input alone, in 64 bits."""
        return [self._expected(f"{self._case.part}.{name}") for name in self.names]

    def _expected(self, name: str) -> torch.Tensor:
        layer: Any = copy.deepcopy(self.plain.get_submodule(name)).double()
        if self._case.is_concatenated:
            inputs = list(torch.split(self.x, list(self._case.token_counts)))
        else:
            inputs = list(self.x.split(1))
        rows = []
        for own, row in zip(inputs, self._case.rows, strict=True):
            changed = copy.deepcopy(layer)
            for number, scale in row:
                low_rank = self._adapters[number].layers[f"unet.{name}"]
                change = low_rank.b.double().flatten(1) @ low_rank.a.double().flatten(1)
                changed.weight.data += scale * change.view(changed.weight.shape)
            rows.append(changed(own.double()))
        return torch.cat(rows)

    def _adapter(self, rank: int) -> Adapter:
        layers = {}
        for name, layer in self.plain.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                a = self._random(rank, *layer.weight.shape[1:])
                b = self._random(layer.weight.shape[0], rank, *[1] * (layer.weight.ndim - 2))
                layers[f"unet.{name}"] = LowRank(a, b / rank**0.5)
        return Adapter(layers)

    def _input(self) -> torch.Tensor:
        case, num_rows = self._case, len(self._case.rows)
        if case.part in {"conv", "shortcut"}:
            x = self._random(num_rows, case.fan_in, 3, case.token_counts[0])
            return x.to(memory_format=torch.channels_last) if case.layout == "transposed" else x
        if case.is_concatenated:
            return self._laid_out(sum(case.token_counts))
        if case.layout == "flat":
            return self._random(num_rows, case.fan_in)
        return self._laid_out(num_rows, case.token_counts[0])

    def _laid_out(self, *shape: int) -> torch.Tensor:
        match self._case.layout:
            case "transposed":
                return self._random(*shape[:-1], self._case.fan_in, shape[-1]).mT
            case "sliced":
                return self._random(*shape, 2 * self._case.fan_in)[..., ::2]
            case _:
                return self._random(*shape, self._case.fan_in)

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator).to(self._case.dtype)
