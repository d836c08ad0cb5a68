"""The denoiser's blocks, compiled: the batches that their graphs serve, and those that run eagerly.

Inductor takes minutes to generate the code of the graphs: without `LONG` torch's own operators run them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel, ZImagePipeline
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config

from inference.errors import EngineStartFailed
from inference.lane import Lane
from inference.models import compiling
from inference.models.compiling import BlockCompiler
from inference.request import AdapterFile, GenerationRequest
from tests.support.engine.engine_requests import request_of
from tests.support.engine.watched_engine import EngineCall, WatchedEngine, WatchedModel, submit_together
from tests.support.images.parity import draw, psnr
from tests.support.long import long, long_but
from tests.support.models.tiny_adapters import ATTENTION, write_adapter
from tests.support.models.tiny_chroma import build_tiny_chroma
from tests.support.models.tiny_flux import build_tiny_flux
from tests.support.models.tiny_flux_2 import build_tiny_flux_2
from tests.support.models.tiny_krea2 import build_tiny_krea2
from tests.support.models.tiny_models import build_tiny_sd, build_tiny_sdxl, build_tiny_z_image

pytestmark = [pytest.mark.usefixtures("one_thread", "no_forward_failed")]

# Generated code adds up in another order, and computes Z-Image's positions in real numbers.
SAME_DB = 60.0
LONG = "a red fox sits on a green hill, under a wide sky, and looks at the sea. " * 2


def narrow_unet() -> UNet2DConditionModel:
    """Build a UNet with blocks of one width."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
    )


BUILDERS: dict[str, Callable[[Path], Path]] = {
    "sd": build_tiny_sd,
    "sdxl": build_tiny_sdxl,
    "z_image": build_tiny_z_image,
    "flux": build_tiny_flux,
    "chroma": build_tiny_chroma,
    "flux_2": build_tiny_flux_2,
    "krea2": build_tiny_krea2,
}
# By width: with one row, with several, and with several behind a mask. Z-Image's have three kinds of blocks instead of
# widths; those of the image alone have no mask in the warm-up of the tiny model. FLUX.1's have two kinds and no mask; a
# single block's input is laid out otherwise behind another one. FLUX.2's is laid out the same, and Chroma's has a mask.
NUM_GRAPHS = {"sd": 6, "sdxl": 6, "z_image": 8, "flux": 6, "chroma": 4, "flux_2": 4, "krea2": 2}


def adapters_of(checkpoint: Path) -> list[AdapterFile]:
    """Write adapters of three ranks, two of them for more layers than those of attention."""
    pipe = DiffusionPipeline.from_pretrained(checkpoint)
    is_gated = isinstance(pipe, ZImagePipeline)
    of_any = ("proj_in", "proj_mlp", "ff.net.2", "to_qkv_mlp_proj", "ff.linear_out")
    more = ("feed_forward.w1", "feed_forward.w2") if is_gated else of_any
    files = []
    for rank, others in ((4, ()), (16, more), (40, more)):
        path = checkpoint.parent / f"rank{rank}.safetensors"
        write_adapter(path, pipe, layout="diffusers_new", rank=rank, seed=rank, targets=(*ATTENTION, *others))
        files.append(AdapterFile(path, None, 0.7))
    return files


class Pair:
    """Two engines of one checkpoint, the first with compiled blocks; and adapters for it."""

    def __init__(self, name: str, checkpoint: Path) -> None:
        self.adapters = adapters_of(checkpoint)
        torch._dynamo.reset()
        counters.clear()
        self.name = name
        self.compiled = WatchedEngine(checkpoint, COMPILE="blocks")
        self.num_graphs = num_graphs()
        self.eager = WatchedEngine(checkpoint, COMPILE="off")

    def close(self) -> None:
        self.compiled.close()
        self.eager.close()

    def assert_equal(self, requests: Sequence[GenerationRequest]) -> None:
        """Assert that drawn together by compiled blocks, each gives the image that it gives alone without."""
        calls = submit_together(self.compiled, requests)
        ratios = [psnr(call.image, draw(self.eager, call.request)[0]) for call in calls]
        assert min(ratios) >= SAME_DB, ratios


def num_graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.fixture(
    scope="module",
    params=long_but([f"{name}, {backend}" for backend in ("eager", "inductor") for name in BUILDERS], "sd, eager"),
)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Iterator[Pair]:
    name, backend = request.param.split(", ")
    checkpoint = BUILDERS[name](tmp_path_factory.mktemp(name) / "checkpoint")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiling, "BACKEND", backend)
        made = Pair(name, checkpoint)
    yield made
    made.close()


def job(seed: int, **fields: Any) -> GenerationRequest:
    return request_of(**{"width": 64, "height": 64, "num_inference_steps": 3, "seeds": (seed,)} | fields)


def batches(adapters: Sequence[AdapterFile]) -> list[list[GenerationRequest]]:
    """List batches of every kind, in sizes and lengths that the warm-up did not draw, most jobs with adapters."""
    plain = [
        [job(1, guidance_scale=0.0)],
        [job(2, prompt=LONG, guidance_scale=0.0)],
        [job(3)],
        [job(4, width=96, height=48)],
        [job(5), job(6), job(7)],
        [job(8), job(9, prompt=LONG)],
        [job(10, prompt=LONG * 2), job(11, prompt=LONG), job(12)],
        [job(13, guidance_scale=0.0), job(14)],
        [job(15, guidance_scale=0.0, prompt=LONG), job(16, guidance_scale=0.0)],
        [job(17, width=128, height=64), job(18, width=64, height=128, prompt=LONG)],
        [job(19, width=80, height=80), job(20, width=80, height=80, negative_prompt=LONG)],
        [job(seed, scheduler=name) for seed, name in enumerate(("euler", "heun", "lcm"), 21)],
    ]
    return [[replace(one, adapters=chosen(adapters, one.seeds[0])) for one in batch] for batch in plain]


def chosen(adapters: Sequence[AdapterFile], number: int) -> tuple[AdapterFile, ...]:
    """Return none of the adapters, one, or one and the next."""
    both = adapters[number % len(adapters)], adapters[(number + 1) % len(adapters)]
    return both[: number % 3]


def mixed_batches(adapters: Sequence[AdapterFile]) -> Iterator[list[GenerationRequest]]:
    """Yield two hundred batches of jobs that differ in all that a job may, by a seed."""
    random = Random(18)
    for _ in range(200):
        yield [
            job(
                random.randrange(1000),
                width=random.choice((64, 80, 96)),
                height=random.choice((48, 64)),
                prompt=random.choice(("a red fox", LONG, LONG * 2)),
                guidance_scale=random.choice((0.0, 5.0)),
                num_inference_steps=random.choice((1, 2)),
                adapters=chosen(adapters, random.randrange(9)),
            )
            for _ in range(random.randrange(1, 7))
        ]


def test_warm_up_makes_a_graph_of_each_kind_of_batch_without_breaks(pair: Pair) -> None:
    assert pair.num_graphs == NUM_GRAPHS[pair.name]
    assert counters["graph_break"] == {}


def test_batches_of_any_size_run_compiled_and_give_the_images_of_eager_blocks(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        # It fails a forward that would run eagerly.
        patch.setattr(compiling, "SEALED_STANCE", "fail_on_recompile")
        for requests in batches(pair.adapters):
            pair.assert_equal(requests)

    assert num_graphs() == pair.num_graphs


@long
def test_two_hundred_mixed_batches_make_no_graph(pair: Pair) -> None:
    for requests in mixed_batches(pair.adapters):
        for call in submit_together(pair.compiled, requests):
            assert call.image.size == (call.request.width, call.request.height)

    assert num_graphs() == pair.num_graphs


def test_a_batch_that_fits_no_graph_runs_eagerly(pair: Pair) -> None:
    if pair.name == "z_image":
        # Images of two lengths: 36 tokens and 30, which are filled up to 64 and 32.
        requests = [job(1, width=96, height=96), job(2, width=80, height=96)]
    else:
        # A size of one token, which torch takes for a constant.
        requests = [job(1, width=16, height=16), job(2, width=32, height=32, prompt=LONG)]

    pair.assert_equal(requests)

    assert num_graphs() == pair.num_graphs


@pytest.fixture
def no_graphs() -> None:
    """Forget the graphs of other tests: they belong to the code of the blocks, not to their engines."""
    torch._dynamo.reset()
    counters.clear()


def test_sizes_that_are_equal_in_the_first_batch_may_differ_in_others(
    no_graphs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    unet, compiler = narrow_unet().eval(), BlockCompiler()
    compiler.compile(unet)
    with torch.inference_mode():
        with compiler.applied():
            # Four rows, of four tokens each in the blocks.
            unet(torch.randn(4, 4, 4, 4), 1, torch.randn(4, 77, 32))
        compiler.seal()
        monkeypatch.setattr(compiling, "SEALED_STANCE", "fail_on_recompile")

        with compiler.applied():
            predicted = unet(torch.randn(3, 4, 4, 4), 1, torch.randn(3, 154, 32)).sample

    assert predicted.shape == (3, 4, 4, 4)


# --- What cannot be compiled


def failing(_graph: torch.fx.GraphModule, _inputs: Sequence[torch.Tensor]) -> Any:
    """Generate no code."""
    raise RuntimeError("no-such-compiler: not found")


@pytest.mark.parametrize("backend", long_but(["inductor", failing], failing))
def test_start_without_a_compiler_says_what_is_missing(
    no_graphs: None, monkeypatch: pytest.MonkeyPatch, backend: Any
) -> None:
    monkeypatch.setattr(compiling, "BACKEND", backend)
    unet = narrow_unet().eval()
    compiler = BlockCompiler()
    compiler.compile(unet)
    nowhere = inductor_config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True})

    with (
        torch.inference_mode(),
        nowhere,
        pytest.raises(EngineStartFailed, match=r"^COMPILE=blocks: .*no-such-compiler.*g\+\+"),
        compiler.applied(),
    ):
        unet(torch.randn(2, 4, 8, 8), 1, torch.randn(2, 77, 32))


class UncompiledModel(WatchedModel):
    """Cannot compile its blocks."""

    def denoise(self, lanes: Sequence[Lane]) -> list[torch.Tensor]:
        raise EngineStartFailed("COMPILE=blocks: no compiler")


def test_engine_that_cannot_compile_does_not_start(tmp_path: Path) -> None:
    checkpoint = build_tiny_sd(tmp_path / "checkpoint")

    with pytest.raises(EngineStartFailed, match=r"^COMPILE=blocks: no compiler$"):
        WatchedEngine(checkpoint, UncompiledModel, COMPILE="blocks")


def test_blocks_are_not_compiled_unless_the_settings_say_so(tmp_path: Path, no_graphs: None) -> None:
    engine = WatchedEngine(build_tiny_sd(tmp_path / "checkpoint"), COMPILE="off")

    call = EngineCall(engine, job(1))

    assert call.image.size == (64, 64)
    assert num_graphs() == 0
    engine.close()
