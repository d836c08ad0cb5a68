"""The queries of the dashboard, the alert rules and the documentation, and what the worker's metrics allow."""

import json
import re
from collections.abc import Iterator
from typing import Any

import yaml

from tests.support.paths import ROOT
from worker.metrics import Metrics

DEPLOY = ROOT / "deploy"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "darkroom.json"
PROMETHEUS = DEPLOY / "prometheus"

# What Grafana puts in for its variables.
VARIABLES = {"$job": ".*", "$instance": ".*", "$__rate_interval": "5m"}
# Labels that a scrape adds, and the buckets' own.
SCRAPE_LABELS = frozenset({"job", "instance"})
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",), "info": ("_info",)}

_SELECTOR = re.compile(r"\b(darkroom_\w+)\s*(?:\{([^}]*)\})?")
_MATCHER = re.compile(r'(\w+)\s*(?:=~|!~|!=|=)\s*"')
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)")


def dashboard() -> dict[str, Any]:
    return json.loads(DASHBOARD.read_text())  # type: ignore[no-any-return]


def panels() -> list[dict[str, Any]]:
    """Yield every panel with queries."""
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def dashboard_queries() -> Iterator[tuple[str, str]]:
    """Yield the title of the panel and each query, its variables filled in."""
    for panel in panels():
        for target in panel["targets"]:
            query = target["expr"]
            for variable, value in VARIABLES.items():
                query = query.replace(variable, value)
            yield panel["title"], query


def documented_queries() -> Iterator[tuple[str, str]]:
    """List every query that docs/operating.md gives, with the number of its place there."""
    text = (ROOT / "docs" / "operating.md").read_text()
    for number, query in enumerate(re.findall(r"^```promql\n(.+?)^```", text, re.MULTILINE | re.DOTALL)):
        yield f"docs/operating.md {number}", query


def alert_rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def samples() -> dict[str, frozenset[str]]:
    """Return every sample a worker may expose, with its own labels."""
    metrics = Metrics()
    metrics.set_build(model="any")  # the labels of an `Info` are those of its values
    found = {}
    for collector in vars(metrics).values():
        if not hasattr(collector, "collect") or not hasattr(collector, "_labelnames"):
            continue
        [family] = collector.collect()
        values = {label for sample in family.samples for label in sample.labels} if family.type == "info" else set()
        for suffix in SUFFIXES[family.type]:
            own = {*collector._labelnames, *values} | ({"le"} if suffix == "_bucket" else set())
            found[family.name + suffix] = frozenset(own)
    return found


def selectors(query: str) -> list[tuple[str, frozenset[str]]]:
    """Yield each `darkroom_` sample of a query with the labels it is selected by."""
    return [(name, frozenset(_MATCHER.findall(inside))) for name, inside in _SELECTOR.findall(query)]


def groupings(query: str) -> frozenset[str]:
    """Yield every label a query groups or matches by."""
    return frozenset(
        label.strip() for inside in _GROUPING.findall(query) for label in inside.split(",") if label.strip()
    )
