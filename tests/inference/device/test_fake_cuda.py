"""The fake CUDA device sees what it is there to see, and leaves torch as it was."""

from collections.abc import Callable

import pytest
import torch

from tests.support.cuda.cuda_stand_ins import why_not
from tests.support.cuda.fake_cuda import FakeCuda

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
