"""What a product job's task that is tried again finds of its stages, in a real store."""

import io
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
from PIL import Image

from clients.storage.client import Storage
from clients.storage.location import ObjectRef
from config.store import StoreSettings
from tests.support.images.products import bottle, scene
from worker.breakers import STORE_THRESHOLD, Breaker, StoreGate
from worker.messages.decoder import decode
from worker.messages.job import Job
from worker.messages.rules import JobRules
from worker.product.stage_store import ProductStage, StageStore
from worker.results.image_store import ImageStore

SIZE = (64, 48)
TASK = "660f9511-f3ac-52e5-b827-557766551111"

NewStore = Callable[[], StageStore]


def a_job(task_id: str = TASK) -> Job:
    body = b'{"task_id": "%s", "data": {"generation_id": 7, "prompt": "a fox"}}' % task_id.encode()
    return decode(body, JobRules(8, 3.0, locate=lambda _: pytest.fail("names nothing")))


@pytest.fixture
def new_store(store_settings: StoreSettings, bucket: str) -> NewStore:
    """Return a maker of stage stores of the same job, one for each try."""
    gate = StoreGate(Breaker("the store", STORE_THRESHOLD), threading.Event())
    store = ImageStore(Storage(store_settings), gate)
    return lambda: StageStore(store, bucket, a_job())


def change(stage_store: StageStore, stage: ProductStage, image: Image.Image) -> None:
    """Change a stored stage as an image editor does, which keeps no metadata."""
    content = io.BytesIO()
    image.save(content, "PNG")
    ref = ObjectRef(stage_store.bucket, f"stages/gen-7/{stage}.png")
    stage_store.store.storage.put(ref, content.getvalue(), content_type="image/png")


def test_task_finds_its_saved_stages_up_to_the_first_gap(new_store: NewStore) -> None:
    first = new_store()
    first.save(ProductStage.CUTOUT, bottle())
    first.save(ProductStage.BACKGROUND, scene(SIZE), {"scheduler": "ddim"})
    first.save(ProductStage.REFINED, scene(SIZE))

    again = new_store()
    cutout, background = again.find(ProductStage.CUTOUT, "RGBA"), again.find(ProductStage.BACKGROUND, "RGB")

    assert cutout is not None
    assert cutout.image.tobytes() == bottle().tobytes()
    assert background is not None
    assert background.image.tobytes() == scene(SIZE).tobytes()
    assert not background.is_changed
    assert background.metadata["scheduler"] == "ddim"
    assert background.metadata["stage"] == "background"
    assert again.find(ProductStage.COMPOSITE, "RGB") is None
    assert again.find(ProductStage.REFINED, "RGB") is None
    assert again.uris == {
        "cutout": f"s3://{again.bucket}/stages/gen-7/cutout.png",
        "background": f"s3://{again.bucket}/stages/gen-7/background.png",
    }


def test_stages_of_another_task_are_not_used_and_replaced(new_store: NewStore) -> None:
    new_store().save(ProductStage.CUTOUT, bottle())
    other = new_store()
    other.job = replace(other.job, task_id="770f9511-f3ac-52e5-b827-557766551111")

    assert other.find(ProductStage.CUTOUT, "RGBA") is None
    other.save(ProductStage.CUTOUT, bottle(60))
    assert new_store().find(ProductStage.CUTOUT, "RGBA") is None


def test_changed_stage_is_used_and_later_stages_are_not(new_store: NewStore) -> None:
    first = new_store()
    for stage, image in (
        (ProductStage.CUTOUT, bottle()),
        (ProductStage.BACKGROUND, scene(SIZE)),
        (ProductStage.COMPOSITE, scene(SIZE)),
    ):
        first.save(stage, image)
    change(first, ProductStage.BACKGROUND, Image.new("RGB", SIZE, "red"))

    again = new_store()
    again.find(ProductStage.CUTOUT, "RGBA")
    background = again.find(ProductStage.BACKGROUND, "RGB")

    assert background is not None
    assert background.is_changed
    assert background.image.getpixel((0, 0)) == (255, 0, 0)
    assert again.find(ProductStage.COMPOSITE, "RGB") is None


def test_stage_without_a_task_is_not_used(new_store: NewStore) -> None:
    change(new_store(), ProductStage.CUTOUT, bottle())

    assert new_store().find(ProductStage.CUTOUT, "RGBA") is None


def test_stage_that_is_no_longer_an_image_is_made_again(new_store: NewStore) -> None:
    first = new_store()
    first.save(ProductStage.CUTOUT, bottle())
    first.save_png(ProductStage.BACKGROUND, b"broken")

    again = new_store()

    assert again.find(ProductStage.CUTOUT, "RGBA") is not None
    assert again.find(ProductStage.BACKGROUND, "RGB") is None
