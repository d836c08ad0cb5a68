"""What the metrics show before anything has happened, of the ends of jobs, and of what runs here."""

from clients.webhooks import WebhookKind
from worker.errors import ErrorCode
from worker.metrics import Metrics
from worker.outcome import Outcome
from worker.version import darkroom_version


def jobs(metrics: Metrics) -> dict[tuple[str, str], float]:
    """Return the counters of jobs by outcome and code."""
    samples = [sample for metric in metrics.registry.collect() for sample in metric.samples]
    shown = [sample for sample in samples if sample.name == "darkroom_jobs_total"]
    return {(sample.labels["outcome"], sample.labels["code"]): sample.value for sample in shown}


def test_outcome_counters_start_at_zero_with_every_code_of_a_failure() -> None:
    shown = jobs(Metrics())

    assert set(shown.values()) == {0.0}
    assert {outcome for outcome, _ in shown} == set(Outcome)
    assert {WebhookKind.COMPLETE.value, WebhookKind.FAILED.value} <= set(Outcome)
    failures = {code for outcome, code in shown if outcome == "failed"}
    assert failures == set(ErrorCode) - {ErrorCode.CANCELLED} | {"OTHER"}
    assert {code for outcome, code in shown if outcome in ("complete", "released", "adopted")} == {""}


def test_failures_are_counted_by_their_code() -> None:
    metrics = Metrics()

    metrics.count_job(Outcome.FAILED, ErrorCode.LORA_NOT_FOUND)
    metrics.count_job(Outcome.RETRIED, ErrorCode.STORAGE_UNAVAILABLE)
    metrics.count_job(Outcome.CANCELLED, ErrorCode.CANCELLED)
    metrics.count_job(Outcome.COMPLETE)

    assert {key: count for key, count in jobs(metrics).items() if count} == {
        ("failed", "LORA_NOT_FOUND"): 1.0,
        ("retried", "STORAGE_UNAVAILABLE"): 1.0,
        ("cancelled", "CANCELLED"): 1.0,
        ("complete", ""): 1.0,
    }


def test_codes_that_no_worker_of_this_version_knows_make_no_series_of_their_own() -> None:
    metrics, num_series = Metrics(), len(jobs(Metrics()))

    for number in range(100):
        metrics.count_job(Outcome.FAILED, f"FORGED_{number}")
        metrics.count_job(Outcome.RETRIED, f"FORGED_{number}")
        metrics.count_job(Outcome.COMPLETE, f"FORGED_{number}")

    shown = jobs(metrics)
    assert len(shown) == num_series
    assert shown["failed", "OTHER"] == shown["retried", "OTHER"] == shown["complete", ""] == 100


def test_build_info_names_version_and_model_and_no_secret() -> None:
    metrics = Metrics()
    metrics.set_build(model="https://user:hunter2@host/model.safetensors?token=hunter2")
    metrics.set_build(model="org/model", family="sdxl")
    labels = {"version": darkroom_version(), "family": "sdxl", "model": "org/model"}

    assert metrics.registry.get_sample_value("darkroom_build_info", labels) == 1.0
    assert sum(metric.name == "darkroom_build" for metric in metrics.registry.collect()) == 1

    metrics.set_build(model="https://user:hunter2@host/model.safetensors?token=hunter2")
    assert "hunter2" not in repr([metric.samples for metric in metrics.registry.collect()])
