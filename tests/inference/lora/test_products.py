"""The products of adapters against a plain product for each row alone, on the CPU and by the kernel of a GPU."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings

from inference.errors import EngineStartFailed
from inference.lora.products.paged_products import TILES
from inference.lora.products.rows import AppliedAdapter, Run, find_runs
from tests.support.cuda.interpreted_kernel import NUM_CASES
from tests.support.long import IS_LONG, long_but
from tests.support.models.low_rank_cases import CPU, Case, Scene, cases
from tests.support.paths import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")

# Of the largest value, and of what cancels out in small ones; A's product is rounded before it is multiplied by B.
ERRORS = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
HANG_SECONDS = 900
FIRST, SECOND = AppliedAdapter((1,), 1.0), AppliedAdapter((2, 3), 0.5)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    # As on the engine's thread.
    with torch.inference_mode():
        yield


def test_runs_are_neighbouring_rows_of_the_same_adapters() -> None:
    rows = [(), (), (FIRST,), (FIRST,), (FIRST, SECOND), (FIRST,), ()]

    found = find_runs(rows)

    assert found == (Run(2, ()), Run(2, (FIRST,)), Run(1, (FIRST, SECOND)), Run(1, (FIRST,)), Run(1, ()))


@settings(max_examples=400 if IS_LONG else 100, deadline=None)
@given(cases(tuple(ERRORS)))
def test_rows_of_any_ranks_and_layouts_have_their_own_adapters_products(case: Case) -> None:
    scene = Scene(case)
    scene.bank.route(scene.rows, scene.token_counts)

    for output, expected in zip(scene.draw(), scene.expected(), strict=True):
        assert output.shape == expected.shape
        assert (output.double() - expected).abs().max() <= ERRORS[case.dtype] * expected.abs().max().clamp(min=1)


def scene_of(part: str, num_rows: int = 2) -> Scene:
    """Make a scene of rows that all have one adapter of rank 8."""
    return Scene(Case(part, 16, 8, (8,), (((0, 1.0),),) * num_rows, (4,) * num_rows, "contiguous", torch.float32, 1))


@pytest.mark.parametrize("part", ["attn1", "conv", "shortcut"])
def test_a_forward_of_other_rows_than_were_routed_is_refused(part: str) -> None:
    scene = scene_of(part)
    scene.bank.route(scene.rows[:1])

    with pytest.raises(ValueError, match=r"^a layer was given 2 rows under adapters that were routed for 1$"):
        scene.draw()


def test_weights_are_gathered_once_whatever_is_routed_between_until_their_pages_are_written() -> None:
    scene = scene_of("attn1")
    for rows in (scene.rows, [()] * 2, scene.rows):
        scene.bank.route(rows)
        scene.draw()
        gathered = {key: id(one) for key, one in scene.bank._gathered._weights.items()}
        assert len(gathered) == 1

    scene.bank.route(scene.rows)
    scene.draw()

    assert {key: id(one) for key, one in scene.bank._gathered._weights.items()} == gathered
    scene.bank._gathered.forget([1])
    assert not scene.bank._gathered._weights


# --- The kernel


def run_module(module: str, **environ: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", module],
        cwd=ROOT,
        env=os.environ | environ,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_kernel_gives_the_products_of_each_row_in_triton_s_interpreter() -> None:
    assert run_module("tests.support.cuda.interpreted_kernel", TRITON_INTERPRET="1") == f"{NUM_CASES} cases\n"


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
@pytest.mark.parametrize("capability", long_but([80, 89, 90], 90))
@pytest.mark.parametrize("dtype", long_but(["bf16", "fp16", "fp32"], "bf16"))
def test_kernel_compiled_for_a_gpu_keeps_its_values_in_registers(capability: int, dtype: str) -> None:
    from tests.support.cuda.kernel_assembly import usage_of

    usage = usage_of(capability, dtype)

    assert usage.spilled_bytes == 0
    # What a block may have on the smallest of these GPUs, without asking for more.
    assert usage.shared_bytes <= 48 * 1024


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel would be launched")
def test_kernel_that_cannot_be_built_ends_the_start_with_what_it_takes() -> None:
    from inference.lora.products.paged_products import launch

    with pytest.raises(EngineStartFailed, match=r"cannot be built \(.*\): Triton needs gcc and .*TRITON_CACHE_DIR"):
        launch((1, 1, 1), *[torch.zeros(1, dtype=torch.int32)] * 20, PAGE_RANK=8, **TILES)


def test_pointwise_convolutions_are_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    from inference.lora.products import paged_products

    scene = scene_of("shortcut", num_rows=3)
    scene.x = scene.x.to(memory_format=torch.channels_last)
    grids: list[tuple[int, int, int]] = []
    monkeypatch.setattr(paged_products, "launch", lambda grid, *_, **__: grids.append(grid))
    runs = scene.bank._runs_by_group([scene.rows[0], (), scene.rows[0]])
    for group, products in paged_products.find_paged_products(runs, dict.fromkeys(runs), CPU).items():
        group.products = products

    scene.draw()

    # Of the two rows that have an adapter.
    assert grids == [(2, 1, 1)]
