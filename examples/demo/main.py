"""The demo itself: start the parts, upload what the jobs need, publish, watch, and draw what came of it."""

import signal
import site
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from examples.demo.bars import JobBars
from examples.demo.contact_sheet import Sheet, draw_contact_sheet
from examples.demo.jobs import JOBS, DemoJob
from examples.demo.publish import MODEL, publish, upload
from examples.demo.timeline import draw_timeline
from examples.parts.backend import Backend
from examples.parts.processes import ServerProcess
from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS
from inference.process.child_handle import path_variables
from worker.results.terminal_event import TerminalEvent

BUCKET = "media"
QUEUE = "image_generation"
# Nothing heard of any job: a slow machine may take long over all of them.
SILENCE_SECONDS = 180.0
STOP_SECONDS = 30.0
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


def run_demo(out: Path, jobs: Sequence[DemoJob] = JOBS, draw_sheet: Sheet = draw_contact_sheet) -> int:
    """Run the jobs and leave their sheet and timeline in folder `out`; the process's exit code.

    Nothing that it starts outlives it: SIGTERM and a closed terminal end it as Ctrl-C does, in order, and where it is
    killed its servers and the worker end with it.
    """
    for number in ENDING_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, _exit_once)
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="darkroom-")))
        rabbitmq, store = _start_parts(stack, folder, console)
        store.make_bucket(BUCKET)
        upload(store.client(), BUCKET, folder)
        bars = JobBars(jobs, console)
        backend = stack.enter_context(Backend(on_call=bars.on_call))
        worker = _start_worker(rabbitmq, store, backend, folder, out / "worker.log")
        stack.callback(worker.kill)
        publish(rabbitmq.url, QUEUE, jobs, BUCKET)
        console.print(f"{len(jobs)} jobs published; the worker is loading the model")
        with bars:
            num_done = _wait(backend, worker, jobs)
        worker.stop(STOP_SECONDS)
        if num_done == len(jobs):
            _draw(store.client(), jobs, out, draw_sheet, console)

    console.print(f"what the worker logged:  {out / 'worker.log'}", highlight=False)
    console.print(f"{num_done} of {len(jobs)} jobs complete; the worker ended with exit code {worker.exit_code}")
    return 0 if num_done == len(jobs) and worker.exit_code == 0 else 1


def _exit_once(number: int, _: object) -> NoReturn:
    # What is being stopped in order is not interrupted by a second signal.
    for one in ENDING_SIGNALS:
        signal.signal(one, signal.SIG_IGN)
    sys.exit(128 + number)


def _start_parts(stack: ExitStack, folder: Path, console: Console) -> tuple[RabbitMQ, SeaweedFS]:
    started_at = time.monotonic()
    rabbitmq, store = RabbitMQ(folder / "rabbitmq"), SeaweedFS(folder / "seaweedfs")
    stack.callback(rabbitmq.stop)
    stack.callback(store.stop)
    with console.status("starting RabbitMQ and SeaweedFS"), ThreadPoolExecutor() as pool:
        for start in [pool.submit(rabbitmq.start), pool.submit(store.start)]:
            start.result()
    console.print(f"RabbitMQ and SeaweedFS are up after {time.monotonic() - started_at:.1f} s")
    return rabbitmq, store


def _start_worker(rabbitmq: RabbitMQ, store: SeaweedFS, backend: Backend, folder: Path, log: Path) -> ServerProcess:
    """Start `darkroom run` as an operator starts it: configured by its environment.

    By its module, as no folder is sure to hold the command; and without the working directory on its path, where a
    user's config.py would be imported in place of ours.
    """
    environment = rabbitmq.env() | store.env(BUCKET) | backend.env() | path_variables()
    environment |= {
        "PATH": str(Path(sys.executable).parent),
        "HOME": str(folder),
        # Packages of the user's own stay in sight under another HOME.
        "PYTHONUSERBASE": site.getuserbase(),
        "MODEL_ID": str(MODEL / "checkpoint"),
        "CACHE_DIR": str(folder / "cache"),
        "METRICS_PORT": "0",
        "RABBITMQ_QUEUE": QUEUE,
        "HF_HUB_OFFLINE": "1",
    }
    log.unlink(missing_ok=True)
    return ServerProcess([sys.executable, "-m", "worker", "run"], env=environment, log=log, cwd=folder)


def _wait(backend: Backend, worker: ServerProcess, jobs: Sequence[DemoJob]) -> int:
    """Return how many jobs are complete, once all have ended, the worker has, or nothing is heard any more."""
    num_calls, heard_at = 0, time.monotonic()
    while time.monotonic() < heard_at + SILENCE_SECONDS and worker.is_running:
        if all(backend.ends(job.generation_id) for job in jobs):
            break
        if len(backend.calls()) > num_calls:
            num_calls, heard_at = len(backend.calls()), time.monotonic()
        time.sleep(0.1)
    return sum(any(end.kind == "complete" for end in backend.ends(job.generation_id)) for job in jobs)


def _draw(client: Any, jobs: Sequence[DemoJob], out: Path, draw_sheet: Sheet, console: Console) -> None:
    images = {}
    for job in jobs:
        key = f"generations/gen-{job.generation_id}.png"
        images[job.generation_id] = client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
    sheet, timeline = out / "contact-sheet.png", out / "timeline.png"
    draw_sheet(jobs, images, sheet)
    draw_timeline(jobs, _records(client), timeline)
    console.print(f"the pictures:            {sheet}", highlight=False)
    console.print(f"where the time went:     {timeline}", highlight=False)


def _records(client: Any) -> list[TerminalEvent]:
    listing = client.list_objects_v2(Bucket=BUCKET, Prefix="jobs/")["Contents"]
    bodies = (client.get_object(Bucket=BUCKET, Key=entry["Key"])["Body"].read() for entry in listing)
    return [TerminalEvent.from_json(body) for body in bodies]
