"""Tracing is on where OpenTelemetry's own variables ask for it, and no wrong value of theirs stops a worker."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.servers.collector import running_collector
from worker.tracing.otel import OtelTracing
from worker.tracing.switch import endpoint_of, open_tracing, read_variables
from worker.tracing.tracing import Tracing

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
URL = "http://127.0.0.1:4318"


@pytest.mark.parametrize(
    ("variables", "endpoint"),
    [
        ({}, ""),
        ({"OTEL_SERVICE_NAME": "pictures"}, ""),
        ({ENDPOINT: URL}, URL),
        ({ENDPOINT: URL, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://traces/v1/traces"}, "http://traces/v1/traces"),
        ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": URL}, ""),
        ({ENDPOINT: URL, "OTEL_SDK_DISABLED": "True"}, ""),
        ({ENDPOINT: URL, "OTEL_SDK_DISABLED": "false"}, URL),
        ({ENDPOINT: URL, "OTEL_TRACES_EXPORTER": "none"}, ""),
        ({ENDPOINT: URL, "OTEL_TRACES_EXPORTER": "otlp"}, URL),
    ],
)
def test_endpoint_is_the_one_for_traces_unless_traces_are_off(variables: dict[str, str], endpoint: str) -> None:
    assert endpoint_of(variables) == endpoint


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({ENDPOINT: "localhost:4317"}, "OTEL_EXPORTER_OTLP_ENDPOINT must be an http:// or https:// URL with a host"),
        ({ENDPOINT: URL, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "set http/protobuf, which a collector takes on"),
        ({ENDPOINT: URL, "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/json"}, "http/json is not supported"),
        ({ENDPOINT: URL, "OTEL_BSP_MAX_QUEUE_SIZE": "-1"}, "cannot be set up: ValueError: max_queue_size must be"),
        ({ENDPOINT: "http://user:hunter2@[::1"}, "OTEL_EXPORTER_OTLP_ENDPOINT is not a URL"),
        ({ENDPOINT: "http://user:hunter2@collector"}, "must not carry a user, a password"),
    ],
)
def test_a_wrong_variable_leaves_the_worker_untraced_and_is_one_sentence(
    variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)  # as for the SDK, which reads nothing else

    tracing = open_tracing(variables, worker="here")

    (record,) = caplog.records
    reason = record.fields["reason"]  # type: ignore[attr-defined]
    assert type(tracing) is Tracing
    assert (record.levelname, record.message) == ("WARNING", "jobs are not traced")
    assert said in reason
    assert "hunter2" not in reason


def test_a_worker_without_the_extra_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "import logging; from worker.tracing.switch import open_tracing\n"
        "logging.basicConfig(format='%(message)s %(fields)s')\n"
        f"print(type(open_tracing({{'{ENDPOINT}': '{URL}'}}, worker='here')).__name__)"
    )

    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )

    assert ended.stdout == "Tracing\n"
    assert "is set, but OpenTelemetry is not installed" in ended.stderr
    assert "install the extra `tracing`, in a checkout by pip install '.[tracing]'" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_variables_of_the_settings_file_count_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text(f"{ENDPOINT}={URL}\nOTEL_SERVICE_NAME=pictures\nMODEL_ID=x\nOTEL_LOG_LEVEL=\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OTEL_SERVICE_NAME", "drawings")

    assert read_variables() == {ENDPOINT: URL, "OTEL_SERVICE_NAME": "drawings"}


def test_a_worker_with_the_variable_exports_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with running_collector() as collector:
        monkeypatch.setenv(ENDPOINT, collector.url)

        tracing = open_tracing(read_variables(), worker="here")

        assert isinstance(tracing, OtelTracing)
        tracing.close()
