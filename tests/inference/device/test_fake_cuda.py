"""The fake CUDA device sees what it is there to see, tells what kernels take, and leaves torch as it was."""

from collections.abc import Callable

import pytest
import torch

from inference.lora.products import paged_products
from tests.support.cuda.cuda_stand_ins import why_not
from tests.support.cuda.fake_cuda import FakeCuda
from tests.support.cuda.roofline import Work, eager, fused

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def on_device(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, device="cuda:0")


@pytest.mark.parametrize(
    "stall",
    [
        lambda: on_device(3).sum().item(),
        lambda: bool(on_device(3).isfinite().all()),
        lambda: on_device(3)[on_device(3) > 0],
        lambda: on_device(3).nonzero(),
        lambda: on_device(3).cpu(),
        lambda: torch.empty(3).copy_(on_device(3), non_blocking=True),
        lambda: torch.empty(3).to("cuda:0", non_blocking=True),
        lambda: torch.empty(3).pin_memory().to("cuda:0"),
        lambda: torch.tensor([1.0, 2.0], device="cuda:0"),
        lambda: on_device(3).new_tensor([1.0]),
        lambda: on_device(3)[[0, 2]],
        lambda: on_device(3)[torch.tensor([0, 2])],
        lambda: torch.cuda.synchronize(),  # noqa: PLW0108 - outside, torch has its own
    ],
)
def test_host_waits_are_recorded(stall: Callable[[], object]) -> None:
    cuda = FakeCuda()
    with cuda.installed(), cuda.counting() as tally:
        stall()

    assert len(tally.stalls) == 1


def test_copies_from_and_to_pinned_memory_do_not_wait() -> None:
    cuda = FakeCuda()
    with cuda.installed(), cuda.counting() as tally:
        torch.tensor([1.0, 2.0], pin_memory=True).to("cuda:0", non_blocking=True)
        host = torch.empty(2, 3, pin_memory=True)
        host[1].copy_(on_device(3), non_blocking=True)

    assert [event.what for event in tally.events] == ["upload", "download"]
    assert tally.stalls == []


def test_a_kernel_is_counted_once_and_a_view_not_at_all() -> None:
    cuda = FakeCuda()
    with cuda.installed():
        rows, weight = on_device(2, 3, 4), on_device(5, 4)
        for _ in range(2):  # the second time from memory
            with cuda.counting() as tally:
                torch.nn.functional.linear(rows, weight).transpose(1, 2).flatten(1)
                torch.nn.functional.dropout(rows[0].unsqueeze(0), 0.5, training=False)

            assert tally.kernels["outside"] == {"mm": 1, "clone": 1}


def test_tensors_on_two_devices_do_not_meet() -> None:
    with FakeCuda().installed(), pytest.raises(RuntimeError, match="same device"):
        on_device(3) + torch.ones(3)


def test_cpu_tensors_are_real() -> None:
    with FakeCuda().installed():
        assert torch.arange(4).sum().item() == 6


def test_torch_is_as_it_was_once_the_device_is_gone() -> None:
    before = (torch.tensor, torch.cuda.Stream, torch.nn.Module._apply, torch.Tensor.record_stream)
    with FakeCuda().installed():
        on_device(1)

    assert (torch.tensor, torch.cuda.Stream, torch.nn.Module._apply, torch.Tensor.record_stream) == before
    assert "record_stream" not in vars(torch.Tensor)
    if not torch.cuda.is_available():
        with pytest.raises((AssertionError, RuntimeError)):
            on_device(1)


def test_a_device_context_holds_for_torch_s_own_functions_afterwards() -> None:
    torch.utils._device._device_constructors.cache_clear()
    with FakeCuda().installed(), torch.device("meta"):
        torch.ones(1)

    with torch.device("meta"):
        assert torch.tensor([1.0]).is_meta


# --- What a kernel takes


def works_of(call: Callable[[], object]) -> list[Work]:
    """Run `call` twice, the second time from the cache of effects; return the work that both were counted with."""
    cuda = FakeCuda()
    with cuda.installed():
        counted = []
        for _ in range(2):
            with cuda.counting() as tally:
                call()
            counted.append(eager(tally.launches["outside"]))

    assert counted[0] == counted[1]
    return counted[0]


def on_device_in_16_bits(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16, device="cuda:0")


def test_work_of_a_matrix_product_is_two_flops_a_multiplication_and_each_matrix_once() -> None:
    (work,) = works_of(
        lambda: torch.nn.functional.linear(on_device_in_16_bits(3, 64, 128), on_device_in_16_bits(32, 128))
    )

    assert work.flops == 2 * 3 * 64 * 128 * 32
    assert work.num_bytes == 2 * (3 * 64 * 128 + 32 * 128 + 3 * 64 * 32)
    assert work.full_seconds == pytest.approx(max(work.num_bytes / 4.2e12, work.flops / (0.8 * 790e12)))


def test_work_of_a_convolution_has_its_bias_apart() -> None:
    convolution, bias = works_of(
        lambda: torch.nn.functional.conv2d(
            on_device_in_16_bits(2, 8, 16, 16),
            on_device_in_16_bits(4, 8, 3, 3),
            on_device_in_16_bits(4),
            padding=1,
        )
    )

    assert convolution.flops == 2 * (2 * 4 * 16 * 16) * (8 * 3 * 3)
    assert bias == Work(2 * 2 * (2 * 4 * 16 * 16), num_read=2 * 4 * 16 * 16, num_written=2 * 4 * 16 * 16)


@pytest.mark.parametrize("mask", [None, (2, 1, 64, 77)])
def test_work_of_an_attention_is_its_two_products(mask: tuple[int, ...] | None) -> None:
    def attend() -> None:
        query, text = on_device_in_16_bits(2, 8, 64, 40), on_device_in_16_bits(2, 8, 77, 40)
        own = None if mask is None else on_device_in_16_bits(*mask)
        torch.nn.functional.scaled_dot_product_attention(query, text, text, attn_mask=own)

    (work,) = works_of(attend)

    assert work.flops == 2 * 2 * (2 * 8 * 64 * 77 * 40)
    assert work.num_bytes == 2 * 2 * (2 * 8 * (64 + 77) * 40)
    assert work.flops_per_second == (190e12 if mask is None else 180e12)


def test_work_of_the_kernel_of_adapters_is_of_the_rows_that_have_some() -> None:
    def add() -> None:
        x, table, pages = on_device_in_16_bits(4, 100, 32), on_device(2, 4), on_device(3)
        outputs = [on_device_in_16_bits(400, width) for width in (48, 16, 16)]
        starts_and_widths, tokens_per_row, blocks_per_row, num_splits = [0] * 9, 100, 2, 1
        numbers = (*starts_and_widths, tokens_per_row, blocks_per_row, num_splits)
        slab = on_device_in_16_bits(9, 999)
        paged_products.launch((4, 2, 1), x, table, pages, pages, slab, *outputs, *numbers, BLOCK_TOKENS=64)

    work = works_of(add)[-1]

    assert work.flops == 2 * 200 * (3 * 8 / 2) * (32 + 48 + 32 + 16)
    assert work.num_bytes == 2 * (200 * (32 + 2 * 48 + 32 + 2 * 16) + 3 * 8 * (32 + 48 + 32 + 16))


def test_elementwise_kernels_are_one_where_they_are_fused() -> None:
    def block() -> None:
        x, weight = on_device_in_16_bits(256, 64), on_device_in_16_bits(64, 64)
        torch.nn.functional.silu((x @ weight) * 2 + x) @ weight

    cuda = FakeCuda()
    with cuda.installed(), cuda.counting() as tally:
        block()
    product, between, last = fused(tally.launches["outside"])

    assert product == last
    assert between.num_bytes == 2 * (2 + 1) * 256 * 64


@pytest.mark.parametrize(("rows", "fill"), [(132 * 128, 1.0), (128, 0.8 * 2 / 132)])
def test_a_product_of_few_tiles_leaves_processors_idle(rows: int, fill: float) -> None:
    (work,) = works_of(lambda: on_device_in_16_bits(rows, 64) @ on_device_in_16_bits(64, 64))

    assert work.fill == pytest.approx(fill)
