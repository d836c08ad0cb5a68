"""The row of `darkroom check` for the port of health, metrics and the status page."""

import errno
import os
import socket

import pytest

from examples.parts.ports import free_port
from tests.support.servers.clients_servers import AnsweringServer, answer
from tests.support.status_pages import served, status
from worker.cli.check.checks import CheckFailed
from worker.cli.check.port import check_port, explain_bind_error


def test_free_port_is_good_and_the_status_page_s_address_is_shown() -> None:
    port = free_port()

    assert f"http://localhost:{port}/" in check_port(port)


def test_port_0_takes_a_free_one() -> None:
    assert "a free one" in check_port(0)


def test_a_port_that_a_worker_serves_already_is_good_and_the_worker_is_named() -> None:
    with served(status) as address:
        port = int(address.rstrip("/").rpartition(":")[2])

        assert f"served by the worker {status().worker.name}" in check_port(port)


def test_a_port_in_use_is_bad_and_names_the_process_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.cli.check.port.ANSWER_SECONDS", 0.1)  # nothing ever answers
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(CheckFailed, match=rf"METRICS_PORT {port} is in use by process {os.getpid()} \(.+\)"):
            check_port(port)


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"worker": 1}', b'{"worker": {}}', b"[" * 100_000, b"\xff"])
def test_a_port_with_another_server_is_in_use_by_no_worker(body: bytes) -> None:
    with AnsweringServer([answer(200, body)]) as server:
        port = int(server.url.rstrip("/").rpartition(":")[2])
        with pytest.raises(CheckFailed, match="is in use by process"):
            check_port(port)


def test_the_process_that_has_a_port_is_found_though_a_file_before_it_is_closed_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("worker.cli.check.port.ANSWER_SECONDS", 0.1)  # nothing ever answers
    with socket.socket() as lower, socket.create_server(("0.0.0.0", 0)) as taken:
        lower.close()  # its number is then that of the folder being listed, which is closed once it has been

        explanation = explain_bind_error(taken.getsockname()[1], OSError(errno.EADDRINUSE, "Address already in use"))

    assert f"is in use by process {os.getpid()} (" in explanation


def test_privileged_port_is_refused_with_the_first_unprivileged_one() -> None:
    assert "from 1024 on" in explain_bind_error(80, OSError(errno.EACCES, "Permission denied"))
    assert "cannot be used (Cannot assign" in explain_bind_error(80, OSError(errno.EADDRNOTAVAIL, "Cannot assign"))
