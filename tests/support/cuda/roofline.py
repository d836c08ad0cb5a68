"""What a kernel takes on an H200 by its shapes: the larger of its bytes over the memory's rate and its FLOPs over the
arithmetic's.

Every rate is an assumption: none was measured here. They are those of large kernels, which small ones do not reach: an
image alone is estimated too fast by them. Hence a second time, "in waves": tiles of the output are computed by all
processors at once, and those of the last wave that have none are idle; no kernel takes less than a start and an end.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch

from inference.lora.layers import PAGE_RANK
from tests.support.cuda.operators import tensors_in

# An H200's data sheet says 4.8 TB/s and 989 TFLOP/s in 16 bits; these are what large copies and products reach of it.
BYTES_PER_SECOND = 4.2e12
PEAK_FLOPS = 790e12
PRODUCT_SHARE = 0.80
CONVOLUTION_SHARE = 0.60
# Few columns leave most of a tile unused.
LOW_RANK_SHARE = 0.35
# Of FlashAttention 2 on an H100, by the size of a head; of torch's other kernels where it does not run.
ATTENTION_FLOPS = {40: 190e12, 64: 330e12, 80: 260e12, 128: 400e12, 160: 260e12}
OTHER_ATTENTION_FLOPS = 180e12
NUM_PROCESSORS = 132
# Sides of a tile by how fast it is computed, which the library chooses from by the shape.
TILES = {(128, 128): 1.0, (64, 128): 0.8, (64, 64): 0.6}
# A long sum may be split among processors, each of which takes as much of it as pays.
LEAST_SUMMED = 512
LEAST_SECONDS = 2e-6
# A compiler keeps what elementwise kernels pass on to one another in registers, and writes 16 bits.
FUSED_ITEM_BYTES = 2

aten = torch.ops.aten
PRODUCTS = {aten.mm.default: 0, aten.bmm.default: 0, aten.addmm.default: 1, aten.baddbmm.default: 1}
# They read as much as they write, of a tensor that may be much larger.
GATHERS = frozenset({aten.embedding.default, aten.index.Tensor, aten.index_select.default, aten.gather.default})
OVERWRITING = frozenset({aten.copy_.default, aten.fill_.Scalar, aten.zero_.default})


class Work(NamedTuple):
    """Work of a kernel. `flops_per_second`: how fast its kind computes; 0 where only its bytes count. `fill`: the share
    of that in waves.

    `num_read` and `num_written` are elements.
    """

    num_bytes: int
    flops: int = 0
    flops_per_second: float = 0.0
    fill: float = 1.0
    num_read: int = 0
    num_written: int = 0

    @property
    def full_seconds(self) -> float:
        """Seconds at the rates of large kernels."""
        by_flops = self.flops / self.flops_per_second if self.flops else 0.0
        return max(self.num_bytes / BYTES_PER_SECOND, by_flops)

    @property
    def wave_seconds(self) -> float:
        """Seconds in waves of tiles."""
        by_flops = self.flops / self.flops_per_second / self.fill if self.flops else 0.0
        return max(self.num_bytes / BYTES_PER_SECOND, by_flops, LEAST_SECONDS)


class Launch(NamedTuple):
    """A kernel by name, with its work; a convolution's bias is added by another one."""

    kernel: str
    works: tuple[Work, ...]


class Assumption(NamedTuple):
    """What is not known of a GPU's machine: the host's seconds a launch, and whether small kernels run in waves or at
    the rates of large ones."""

    launch_seconds: float
    is_in_waves: bool


class Part(NamedTuple):
    """GPU seconds and launches of a part of a job."""

    full_seconds: float
    wave_seconds: float
    num_launches: int

    @classmethod
    def of(cls, works: Sequence[Work]) -> "Part":
        full, waves = sum(work.full_seconds for work in works), sum(work.wave_seconds for work in works)
        return cls(full, waves, len(works))

    def less(self, other: "Part", times: int = 1) -> "Part":
        """Return what is left without `other`."""
        return Part(
            self.full_seconds - times * other.full_seconds,
            self.wave_seconds - times * other.wave_seconds,
            self.num_launches - times * other.num_launches,
        )

    def gpu_seconds(self, assumption: Assumption) -> float:
        return self.wave_seconds if assumption.is_in_waves else self.full_seconds

    def seconds(self, assumption: Assumption) -> float:
        """Return the time of the slower of GPU and host."""
        return max(self.gpu_seconds(assumption), self.num_launches * assumption.launch_seconds)


def launch_of(func: Any, args: Sequence[Any], kwargs: dict[str, Any], made: Any) -> Launch:
    """Return the launch of an operator of torch that is one kernel."""
    name = func.overloadpacket.__name__
    inputs, outputs = list(tensors_in((*args, *kwargs.values()))), list(tensors_in((made,)))
    num_bytes = sum(map(_stored_bytes, (*inputs, *outputs)))
    if func in PRODUCTS:
        one, other = args[PRODUCTS[func] : PRODUCTS[func] + 2]
        fill = _fill(one.numel() // one.shape[-1], other.shape[-1], one.shape[-1])
        return Launch(name, (Work(num_bytes, 2 * one.numel() * other.shape[-1], PRODUCT_SHARE * PEAK_FLOPS, fill),))
    if func is aten.convolution.default:
        fill = _fill(made.numel() // made.shape[1], made.shape[1], args[1][0].numel())
        work = Work(num_bytes, 2 * made.numel() * args[1][0].numel(), CONVOLUTION_SHARE * PEAK_FLOPS, fill)
        bias = Work(2 * made.nbytes, num_read=made.numel(), num_written=made.numel())
        return Launch(name, (work, bias) if args[2] is not None else (work,))
    if func in OVERWRITING:
        inputs = inputs[1:]
    elif func in GATHERS:
        inputs = outputs
    elif func is aten.native_group_norm.default:
        inputs = [*inputs, inputs[0]]  # for its moments, and again
    num_bytes = sum(map(_stored_bytes, (*inputs, *outputs)))
    num_written = sum(one.numel() for one in outputs)
    return Launch(name, (Work(num_bytes, num_read=sum(map(_num_stored, inputs)), num_written=num_written),))


def attention(query: torch.Tensor, key: torch.Tensor, *, is_masked: bool) -> Launch:
    """Return the launch of an attention over [rows, heads, tokens, size of a head]."""
    flops = 4 * query.numel() * key.shape[-2]
    rate = OTHER_ATTENTION_FLOPS if is_masked else ATTENTION_FLOPS.get(query.shape[-1], OTHER_ATTENTION_FLOPS)
    # A processor computes all columns of its tokens, and no sum is split.
    fill = _fill(query.numel() // query.shape[-1], 1, 1)
    work = Work(2 * (query.nbytes + key.nbytes), flops, rate, fill)
    return Launch("masked_attention" if is_masked else "attention", (work,))


def adapters(grid: tuple[int, int, int], args: Sequence[Any], block_tokens: int) -> Launch:
    """Return the launch of the kernel `add_pages` by its arguments.

    Each layer of a group reads x once: its programs run after those of the layer before, and x is larger than the
    cache. Outputs are read and written once. The pages are those of all groups of the forward: too many rather than
    too few.
    """
    x, table, pages = args[:3]
    num_layers, blocks_per_row, tokens_per_row = grid[1], args[18], args[17]
    outputs = args[5 : 5 + num_layers]
    longest = tokens_per_row if tokens_per_row > 1 else blocks_per_row * block_tokens
    num_tokens = min(table.shape[0] * longest, x.numel() // x.shape[-1])
    widths = [x.shape[-1] + one.shape[-1] for one in outputs]
    of_tokens = num_tokens * sum(width + one.shape[-1] for width, one in zip(widths, outputs, strict=True))
    of_pages = pages.numel() * PAGE_RANK * sum(widths)
    num_ranks = pages.numel() * PAGE_RANK / table.shape[0]
    flops = round(2 * num_tokens * num_ranks * sum(widths))
    work = Work((of_tokens + of_pages) * x.itemsize, flops, LOW_RANK_SHARE * PEAK_FLOPS)
    return Launch("add_pages", (work,))


def eager(launches: Iterable[Launch]) -> list[Work]:
    """List the kernels as they are launched."""
    return [work for launch in launches for work in launch.works]


def fused(launches: Iterable[Launch]) -> list[Work]:
    """List the kernels where a compiler makes one of the elementwise ones between two others.

    It reads as much as the widest of them and writes as much as the last, in 16 bits: the least that is possible.
    """
    kernels = []
    for is_elementwise, group in groupby(eager(launches), lambda work: not work.flops):
        run = list(group)
        kernels += [_fused(run)] if is_elementwise else run
    return kernels


def flops(launches: Iterable[Launch]) -> int:
    """Count the FLOPs of all kernels."""
    return sum(work.flops for work in eager(launches))


def _fill(num_rows: int, num_columns: int, num_summed: int) -> float:
    """Return the share of the rate that a product of this size reaches, by the best tile and number of splits."""
    splits = [2**i for i in range(4) if i == 0 or num_summed >> i >= LEAST_SUMMED]
    return max(
        speed * _share_of_waves(-(-num_rows // height) * -(-num_columns // width) * split)
        for (height, width), speed in TILES.items()
        for split in splits
    )


def _share_of_waves(num_tiles: int) -> float:
    return num_tiles / (-(-num_tiles // NUM_PROCESSORS) * NUM_PROCESSORS)


def _fused(run: Sequence[Work]) -> Work:
    num_moved = max(work.num_read for work in run) + run[-1].num_written
    return Work(FUSED_ITEM_BYTES * num_moved)


def _stored_bytes(tensor: torch.Tensor) -> int:
    return _num_stored(tensor) * tensor.itemsize


def _num_stored(tensor: torch.Tensor) -> int:
    """Count the elements, those that are repeated by a stride of 0 once."""
    return math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
