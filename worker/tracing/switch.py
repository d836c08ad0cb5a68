"""Whether jobs are traced, by the variables that OpenTelemetry's own SDK reads."""

import logging
import os
from collections.abc import Mapping

from config.logs import log_event
from config.redacting import redacted
from config.section import check_http_url, nonempty_variables
from worker.tracing.tracing import Tracing

logger = logging.getLogger(__name__)

PREFIX = "OTEL_"
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
HTTP = "http/protobuf"
INSTALL = "install the extra `tracing`, in a checkout by pip install '.[tracing]'"


class TracingUnavailable(Exception):
    """Traces are asked for and cannot be made; the message says what to do."""


def read_variables() -> dict[str, str]:
    """Return the SDK's variables, of `.env` too. Raises `SettingsError` where that file cannot be read."""
    return {name: value for name, value in nonempty_variables().items() if name.startswith(PREFIX)}


def endpoint_of(variables: Mapping[str, str]) -> str:
    """Return the collector's address that is set; "" where jobs are not to be traced."""
    is_off = variables.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    exporter = variables.get("OTEL_TRACES_EXPORTER", "otlp").strip()
    return "" if is_off or exporter != "otlp" else _first(variables, ENDPOINTS, "")


def open_tracing(variables: Mapping[str, str], *, worker: str) -> Tracing:
    """Return what traces the jobs. Where that cannot be had the worker works on untraced, and its log says why:

    such variables are often set for everything on a cluster, and telemetry is no reason to refuse jobs.
    """
    if not endpoint_of(variables):
        return Tracing()
    try:
        prepare(variables)
        return _start(worker)
    except TracingUnavailable as error:
        log_event(logger, "jobs are not traced", logging.WARNING, reason=str(error))
        return Tracing()


def prepare(variables: Mapping[str, str]) -> None:
    """Let the SDK see the variables. Raises `TracingUnavailable` where it or its exporter cannot be used with them."""
    try:
        check_http_url(endpoint_of(variables))
    except ValueError as error:
        raise TracingUnavailable(f"{ENDPOINTS[1]} {error}, as http://localhost:4318") from error
    protocol = _first(variables, PROTOCOLS, HTTP)
    if protocol != HTTP:
        raise TracingUnavailable(
            f"{PROTOCOLS[1]}={redacted(protocol)} is not supported: set {HTTP}, which a collector takes on port 4318"
        )
    try:
        import worker.tracing.otel  # noqa: F401, PLC0415 - not for those who do not trace
    except ImportError as error:
        raise TracingUnavailable(
            f"{ENDPOINTS[1]} is set, but OpenTelemetry is not installed ({error.name}): {INSTALL}"
        ) from error
    os.environ.update(variables)  # the settings read `.env` without exporting it


def _start(worker: str) -> Tracing:
    from worker.tracing.otel import OtelTracing  # noqa: PLC0415

    try:
        return OtelTracing(worker=worker)
    except Exception as error:
        # Which errors its variables lead to, the SDK does not say.
        raise TracingUnavailable(f"OpenTelemetry cannot be set up: {type(error).__name__}: {error}") from error


def _first(variables: Mapping[str, str], names: tuple[str, ...], default: str) -> str:
    return next((variables[name].strip() for name in names if variables.get(name)), default)
