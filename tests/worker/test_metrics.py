"""What the metrics show before anything has happened."""

from clients.webhooks import WebhookKind
from worker.metrics import OUTCOMES, Metrics


def test_every_outcome_is_there_at_zero_so_that_the_first_failure_counts_as_an_increase() -> None:
    registry = Metrics().registry

    shown = {outcome: registry.get_sample_value("darkroom_jobs_total", {"outcome": outcome}) for outcome in OUTCOMES}

    assert shown == dict.fromkeys(OUTCOMES, 0.0)
    assert {WebhookKind.COMPLETE.value, WebhookKind.FAILED.value} <= set(OUTCOMES)
