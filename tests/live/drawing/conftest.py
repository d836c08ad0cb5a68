"""One worker with the real engine for all the tests of this folder: starting one costs more than all that they draw.

`tests/conftest.py` gives the folder to one test process. Each test leaves the worker as good as new, and counts from
where it begins.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS
from tests.support.models.onnx_files import write_dark_finder
from tests.support.paths import DEMO_MODEL
from tests.support.servers.certificates import Chain, make_chain
from tests.support.world import Worker, World, new_world


@pytest.fixture(scope="package")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return make_chain(tmp_path_factory.mktemp("chain"))


@pytest.fixture(scope="package")
def controlnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write an untrained ControlNet for the demo model; its outputs are small, not zero."""
    import diffusers  # as late as this: every test process reads this file
    import torch

    folder = tmp_path_factory.mktemp("controlnet")
    unet = diffusers.UNet2DConditionModel.from_pretrained(DEMO_MODEL / "checkpoint", subfolder="unet")
    controlnet = diffusers.ControlNetModel.from_unet(unet)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for conv in [*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block]:
            conv.weight.normal_(std=0.02, generator=generator)
        controlnet.controlnet_cond_embedding.conv_out.weight.normal_(std=0.1, generator=generator)
    controlnet.save_pretrained(folder)
    return folder


@pytest.fixture(scope="package")
def world(
    rabbitmq: RabbitMQ, s3_server: SeaweedFS, tmp_path_factory: pytest.TempPathFactory, chain: Chain, controlnet: Path
) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    cutout_model = write_dark_finder(folder / "dark.onnx")
    with new_world(rabbitmq, s3_server, folder) as made:
        made.start_worker(CONTROLNETS=f"edges={controlnet}", CUTOUT_MODEL=str(cutout_model), **chain.env())
        made.workers[0].wait_until_ready()
        made.upload_demo_adapter("neon")
        yield made


@pytest.fixture(scope="package")
def worker(world: World) -> Worker:
    return world.workers[0]
