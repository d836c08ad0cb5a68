"""`python -m tests.support.pages.screenshots [FOLDER]`: take the pictures of the status page, of a real worker at work.

The worker draws the demo's jobs with the demo's model. There is no picture of the Grafana dashboard: Grafana is in none
of the package sources that are used here, and what it would draw is not made up.
"""

import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from playwright.sync_api import Browser

from examples.demo.jobs import JOBS, message
from examples.demo.references import draw_references
from examples.demo.signatures import draw_signatures
from examples.parts.backend import Backend
from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS
from tests.support.browsing import DESKTOP, PHONE, PageSession, chromium
from tests.support.paths import DEMO_MODEL, ROOT
from tests.support.world import Worker, World, eventually

BUCKET, QUEUE = "media", "image_generation"
# So many have ended when the pictures are taken: there is something in every part of the page.
NUM_ENDED = 6
VIEWS = {"status-page.png": DESKTOP, "status-page-phone.png": PHONE}


def upload_inputs(world: World) -> None:
    """Upload what the demo's jobs name."""
    for adapter in (DEMO_MODEL / "adapters").glob("*.safetensors"):
        world.upload_demo_adapter(adapter.stem)
    for prefix, paths in (("signatures", draw_signatures(world.folder)), ("uploads", draw_references(world.folder))):
        for path in paths.values():
            world.upload(f"{prefix}/{path.name}", path.read_bytes())


def take(browser: Browser, worker: Worker, folder: Path) -> None:
    """Take a picture of the whole page for each view."""
    for name, viewport in VIEWS.items():
        with PageSession(browser, viewport=viewport) as session:
            session.page.goto(f"http://127.0.0.1:{worker.port}/")
            for image in session.page.locator("img").all():
                image.scroll_into_view_if_needed()  # thumbnails are loaded once they are near the view
                image.evaluate("image => image.decode()")
            session.page.screenshot(path=folder / name, full_page=True)


def main(folder: Path) -> None:
    """Run a worker on the demo's jobs, and take the pictures while it draws."""
    with ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="darkroom-")))
        rabbitmq, store = RabbitMQ(temporary / "rabbitmq"), SeaweedFS(temporary / "seaweedfs")
        for part in (rabbitmq, store):
            part.start()
            stack.callback(part.stop)
        store.make_bucket(BUCKET)
        backend = stack.enter_context(Backend())
        world = World(rabbitmq, store, backend, BUCKET, QUEUE, temporary)
        stack.callback(world.stop)
        upload_inputs(world)
        browser = stack.enter_context(chromium())
        worker = world.start_worker(STATUS_SHOW_PROMPTS="True", MAX_CONCURRENT_GENERATIONS="6")
        worker.wait_until_ready()
        world.publish_raw(*(message(job, BUCKET) for job in JOBS))
        eventually(lambda: sum(bool(backend.ends(job.generation_id)) for job in JOBS) >= NUM_ENDED, worker.log_tail)
        take(browser, worker, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs")
