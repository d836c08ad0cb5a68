"""The servers of the tests themselves: up, down, back with their data, and gone without a trace."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import requests
from botocore.exceptions import ClientError

from config.store import StoreSettings
from examples.parts.backend import Backend
from examples.parts.processes import ServerError, ServerProcess
from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS
from tests.support.long import long
from tests.support.paths import ROOT
from tests.support.world import eventually


def processes_below(folder: Path) -> list[str]:
    """Name the live processes that run in `folder` or have it on their command line; a zombie has neither.

    From /proc itself: psutil needs ten times as long, and this is asked in a loop.
    """
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            places = os.fsencode((entry / "cwd").readlink()) + b"\0" + (entry / "cmdline").read_bytes()
            if os.fsencode(folder) in places:
                found.append((entry / "comm").read_text().strip())
    return found


def assert_nothing_runs_below(folder: Path) -> None:
    """Assert it in the end: killed processes take a moment, and Erlang's helpers see that their node is gone."""
    eventually(lambda: processes_below(folder) == [], lambda: str(processes_below(folder)))


@long
def test_a_broker_keeps_its_queues_over_a_restart_and_leaves_no_process_behind(tmp_path: Path) -> None:
    node = RabbitMQ(tmp_path)
    with node:
        node.evaluate(
            'rabbit_amqqueue:declare({resource, <<"/">>, queue, <<"kept">>}, true, false, [], none, <<"x">>).'
        )
        # Mnesia writes its log a moment after it answers: a kill at once would be a kill before. Khepri, which newer
        # nodes have instead, has written before it answers.
        node.evaluate("catch mnesia:sync_log().")
        assert {"beam.smp", "epmd"} <= set(processes_below(tmp_path))

        node.kill()
        assert_nothing_runs_below(tmp_path)
        node.start()

        assert "kept" in node.queues()

    assert_nothing_runs_below(tmp_path)
    with pytest.raises(ServerError, match="stopped"):
        node.ctl("status")


def test_a_server_dies_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    # Given a Python process that started a server which would run for a minute
    script = (
        "import sys, time, os; from pathlib import Path; from examples.parts.processes import ServerProcess\n"
        "folder = Path(sys.argv[1])\n"
        "server = ServerProcess(['sleep', '60'], env=dict(os.environ), log=folder / 'log', cwd=folder)\n"
        "print(server.pid, flush=True); time.sleep(60)"
    )
    repository = ROOT
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], cwd=repository, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    server = psutil.Process(int(parent.stdout.readline()))

    # When that process is killed
    parent.send_signal(signal.SIGKILL)
    parent.communicate()

    # Then the server ends too
    eventually(lambda: not server.is_running() or server.status() == psutil.STATUS_ZOMBIE)


def test_a_server_that_ends_at_once_is_an_error_with_its_log(tmp_path: Path) -> None:
    server = ServerProcess(["sh", "-c", "echo no such disk; exit 3"], env={}, log=tmp_path / "log", cwd=tmp_path)
    with pytest.raises(ServerError, match=r"status 3\nno such disk"):
        server.wait_until(lambda: False, timeout_seconds=120)
    server.kill()


def test_the_object_store_refuses_a_second_writer(s3_server: SeaweedFS, store_settings: StoreSettings) -> None:
    client, bucket = s3_server.client(), store_settings.bucket
    client.put_object(Bucket=bucket, Key="record", Body=b"first", IfNoneMatch="*")

    with pytest.raises(ClientError) as refused:
        client.put_object(Bucket=bucket, Key="record", Body=b"second", IfNoneMatch="*")

    assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 412
    assert client.get_object(Bucket=bucket, Key="record")["Body"].read() == b"first"


def test_the_object_store_keeps_its_objects_over_a_kill_and_leaves_no_process_behind(tmp_path: Path) -> None:
    store = SeaweedFS(tmp_path)
    with store:
        store.make_bucket("kept")
        store.client().put_object(Bucket="kept", Key="key", Body=b"kept")
        store.kill()
        assert_nothing_runs_below(tmp_path)
        store.start()
        assert store.client().get_object(Bucket="kept", Key="key")["Body"].read() == b"kept"
    assert_nothing_runs_below(tmp_path)


def call(backend: Backend, path: str, body: object, **headers: str) -> int:
    headers = {"Authorization": f"Bearer {backend.token}"} | headers
    return requests.post(
        f"{backend.url}/api/webhooks/inference/{path}", json=body, headers=headers, timeout=120
    ).status_code


def test_a_backend_answers_as_scripted_and_counts_ends_once(backend: Backend) -> None:
    backend.answer("complete", 503, times=2)

    statuses = [call(backend, "complete", {"generation_id": 7}, **{"webhook-id": "t:complete"}) for _ in range(4)]

    assert statuses == [503, 503, 200, 200]
    assert [entry.status for entry in backend.calls("complete", 7)] == statuses
    assert len(backend.ends(7)) == 1
    assert backend.wait_for_end(7, 0) == backend.ends(7)[0]
    with pytest.raises(TimeoutError, match="generation 8"):
        backend.wait_for_end(8, 0.05)


def test_backend_refuses_wrong_tokens_and_unknown_paths(backend: Backend) -> None:
    assert call(backend, "complete", {"generation_id": 7}, Authorization="Bearer wrong") == 401
    assert call(backend, "nothing", {}) == 404
    assert backend.ends(7) == []


def test_a_stopped_backend_refuses_even_open_connections_and_comes_back_on_its_port(backend: Backend) -> None:
    with requests.Session() as session:
        url = f"{backend.url}/api/webhooks/inference/complete"
        session.headers["Authorization"] = f"Bearer {backend.token}"
        session.post(url, json={"generation_id": 1}, timeout=120)

        backend.stop()
        with pytest.raises(requests.ConnectionError):
            session.post(url, json={"generation_id": 2}, timeout=120)

        backend.start()
        assert session.post(url, json={"generation_id": 3}, timeout=120).status_code == 200
    assert [entry.generation_id for entry in backend.calls()] == [1, 3]
