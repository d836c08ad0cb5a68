"""What the metrics show before anything has happened."""

from clients.webhooks import WebhookKind
from worker.metrics import Metrics
from worker.outcome import Outcome


def test_outcome_counters_start_at_zero() -> None:
    registry = Metrics().registry

    shown = {outcome: registry.get_sample_value("darkroom_jobs_total", {"outcome": outcome}) for outcome in Outcome}

    assert shown == dict.fromkeys(Outcome, 0.0)
    assert {WebhookKind.COMPLETE.value, WebhookKind.FAILED.value} <= set(Outcome)
