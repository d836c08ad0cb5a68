"""Export of spans by OTLP over HTTP, and what the worker's log says of it. Imported only where tracing is on."""

import logging
from collections.abc import Sequence

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from config.logs import log_event
from config.redacting import redacted

logger = logging.getLogger(__name__)

PROBE_SECONDS = 5.0


class SdkMessages(logging.Handler):
    """Handler of what the SDK and its exporter log: each message is one event of ours, once until `forget`.

    They log every batch that fails, and some errors with a traceback.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.newest = ""
        self._said: set[tuple[str, str]] = set()

    def install(self) -> None:
        """Take over the loggers of the SDK."""
        theirs = logging.getLogger("opentelemetry")
        theirs.handlers, theirs.propagate = [self], False

    def emit(self, record: logging.LogRecord) -> None:
        """Log the record as an event, unless it was logged before."""
        self.newest = redacted(record.getMessage())
        message = (record.name, str(record.msg))
        if message not in self._said:
            self._said.add(message)
            log_event(logger, "tracing", record.levelno, reason=self.newest)

    def forget(self) -> None:
        """Let every message be logged again."""
        self._said.clear()


class LoggedExporter(SpanExporter):
    """Exports by another exporter, and logs the end of an outage. The SDK calls it on one thread of its own."""

    def __init__(self, exporter: SpanExporter, messages: SdkMessages) -> None:
        self._exporter = exporter
        self._messages = messages
        self._num_lost = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Export the spans; those that the collector does not take are lost."""
        result = self._exporter.export(spans)
        if result is not SpanExportResult.SUCCESS:
            self._num_lost += len(spans)
        elif self._num_lost:
            log_event(logger, "traces exported again", num_spans_lost=self._num_lost)
            self._num_lost = 0
            self._messages.forget()
        return result

    def shutdown(self) -> None:
        """Give up a retry that is being waited for."""
        self._exporter.shutdown()


def probe_collector() -> str:
    """Send the collector an empty request; return what went wrong, "" where it was accepted."""
    messages = SdkMessages()
    messages.install()
    exporter = OTLPSpanExporter(timeout=PROBE_SECONDS)
    return "" if exporter.export([]) is SpanExportResult.SUCCESS else messages.newest
