"""The row `tracing` of `darkroom check`: there where jobs are traced, and good where the collector takes traces."""

import pytest

from examples.parts.ports import free_port
from tests.support.servers.collector import running_collector
from worker.cli.check.checks import CheckResult, State, run_checks
from worker.cli.check.tracing import tracing_checks

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


def row() -> CheckResult:
    (result,) = run_checks(tracing_checks())
    return result


def test_jobs_that_are_not_traced_have_no_row() -> None:
    assert tracing_checks() == ()


def test_a_collector_that_answers_is_good(monkeypatch: pytest.MonkeyPatch) -> None:
    with running_collector() as collector:
        monkeypatch.setenv(ENDPOINT, collector.url)

        assert row() == CheckResult("tracing", State.GOOD, f"{collector.url} takes traces")


def test_a_collector_at_another_path_is_bad_and_its_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with running_collector() as collector:
        monkeypatch.setenv(ENDPOINT, f"{collector.url}/otlp")

        result = row()

    assert result.state is State.BAD
    assert f"{collector.url}/otlp takes no traces: Failed to export" in result.detail


def test_a_collector_that_is_not_there_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENDPOINT, f"http://127.0.0.1:{free_port()}")

    result = row()

    assert result.state is State.BAD
    assert "takes no traces" in result.detail
    assert "Jobs go on without them" in result.detail


def test_a_protocol_that_cannot_be_spoken_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:4317")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")

    assert row().state is State.BAD
    assert "OTEL_EXPORTER_OTLP_PROTOCOL=grpc is not supported" in row().detail
