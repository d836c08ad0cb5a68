"""The metrics' own values, read back: the status page and Prometheus cannot disagree."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from prometheus_client import CollectorRegistry

PREFIX = "darkroom_"


@dataclass(frozen=True, slots=True)
class MetricsSnapshot:
    """Every sample of one moment but for histograms' buckets, by its name behind the prefix and its labels' values."""

    values: Mapping[tuple[str, ...], float]

    @classmethod
    def of(cls, registry: CollectorRegistry) -> Self:
        samples = [sample for metric in registry.collect() for sample in metric.samples]
        return cls(
            {
                (sample.name.removeprefix(PREFIX), *sample.labels.values()): sample.value
                for sample in samples
                if not sample.name.endswith("_bucket")
            }
        )

    def value(self, name: str, *labels: str) -> float:
        """One sample; 0 where it has none yet."""
        return self.values.get((name, *labels), 0.0)

    def by_label(self, name: str) -> dict[str, float]:
        """Every sample of a metric with one label, by that label."""
        return {key[1]: value for key, value in self.values.items() if key[0] == name and len(key) == 2}
