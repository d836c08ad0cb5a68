"""Dashboard, alerts and documentation name metrics and labels that exist; Prometheus's own tool agrees."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.support.paths import ROOT
from tests.support.promql import (
    DASHBOARD,
    PROMETHEUS,
    SCRAPE_LABELS,
    alert_rules,
    dashboard,
    dashboard_queries,
    documented_queries,
    groupings,
    panels,
    samples,
    selectors,
)
from worker.amqp.topology import QueueNames
from worker.metrics import Metrics
from worker.monitoring.idle import REASON_OF_PHASE
from worker.outcome import Outcome

QUERIES = [
    *dashboard_queries(),
    *documented_queries(),
    *((rule["alert"], rule["expr"]) for rule in alert_rules()),
]
IDS = [f"{title}-{number}" for number, (title, _) in enumerate(QUERIES)]
REASONS = {*REASON_OF_PHASE.values(), "engine_starting", "switching_model", "broker_down", "refused", "no_jobs"}


def promtool(*args: str | Path) -> str:
    done = subprocess.run(["promtool", *map(str, args)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(("title", "query"), QUERIES, ids=IDS)
def test_every_metric_and_every_label_of_a_query_exists(title: str, query: str) -> None:
    known = samples()
    own_labels: set[str] = set()

    for name, labels in selectors(query):
        assert name in known, f"{title} asks for {name}"
        assert labels <= known[name] | SCRAPE_LABELS, f"{title} selects {name} by {sorted(labels)}"
        own_labels |= known[name]
    if own_labels or selectors(query):
        assert groupings(query) <= own_labels | SCRAPE_LABELS, f"{title} groups by {sorted(groupings(query))}"


@pytest.mark.parametrize(("label", "values"), [("reason", REASONS), ("outcome", set(Outcome))])
def test_every_value_a_query_selects_by_exists(label: str, values: set[str]) -> None:
    asked = {
        value
        for _, query in QUERIES
        for found in re.findall(rf'{label}(?:=|=~|!=)"([^"]+)"', query)
        for value in found.split("|")
    }

    assert asked
    assert asked <= values


def test_the_pattern_for_the_jobs_queue_finds_it_and_none_of_the_workers_own() -> None:
    [pattern] = {found for _, query in QUERIES for found in re.findall(r'queue!~"([^"]+)"', query)}
    names = QueueNames("any-name")

    assert [name for name in names.everything if not re.fullmatch(pattern, name)] == [names.jobs]


def test_every_metric_of_the_registry_is_on_the_dashboard() -> None:
    shown = {name for _, query in dashboard_queries() for name, _ in selectors(query)}

    missing = {
        family.name
        for family in Metrics().registry.collect()
        if not any(name == family.name or name.startswith(f"{family.name}_") for name in shown)
    }

    assert missing == set()


def test_panels_do_not_overlap_and_fill_whole_rows() -> None:
    cells = [
        (x, y)
        for panel in dashboard()["panels"]
        for place in [panel["gridPos"]]
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]

    assert len(set(cells)) == len(cells)
    height = max(y for _, y in cells) + 1
    assert len(cells) == 24 * height


def test_every_panel_has_a_description_and_uses_the_chosen_source_and_workers() -> None:
    for panel in panels():
        assert panel["description"], panel["title"]
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}"
            num_selectors = len(selectors(target["expr"]))
            assert target["expr"].count('job=~"$job", instance=~"$instance"') == num_selectors, panel["title"]

    variables = {variable["name"] for variable in dashboard()["templating"]["list"]}
    assert set(re.findall(r"\$\{?([a-z]+)", DASHBOARD.read_text())) <= variables


def test_prometheus_reads_every_query(tmp_path: Path) -> None:
    rules = [{"record": f"query:{number}", "expr": query} for number, (_, query) in enumerate(QUERIES)]
    groups = {"groups": [{"name": "queries", "rules": rules}]}
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(groups))

    assert f"{len(rules)} rules found" in promtool("check", "rules", tmp_path / "rules.yaml")


def test_prometheus_reads_the_configuration_and_the_alert_rules() -> None:
    said = promtool("check", "config", PROMETHEUS / "prometheus.yml")

    assert f"{len(alert_rules())} rules found" in said


def test_alert_rules_fire_as_their_unit_tests_expect() -> None:
    promtool("test", "rules", PROMETHEUS / "alerts_test.yaml")


@pytest.mark.parametrize("rule", alert_rules(), ids=lambda rule: rule["alert"])
def test_every_alert_has_a_unit_test_that_fires_it_one_that_does_not_a_section_and_a_row(
    rule: dict[str, object],
) -> None:
    stories = yaml.safe_load((PROMETHEUS / "alerts_test.yaml").read_text())["tests"]
    # What a story expects of the alert in the end; before that one waits for its time.
    ends = [
        [bool(test["exp_alerts"]) for test in story["alert_rule_test"] if test["alertname"] == rule["alert"]]
        for story in stories
    ]

    assert {fires[-1] for fires in ends if fires} == {True, False}
    assert rule["labels"]["severity"] in ("warning", "critical")  # type: ignore[index]
    notes: dict[str, str] = rule["annotations"]  # type: ignore[assignment]
    assert set(notes) == {"summary", "description", "runbook"}
    path, anchor = notes["runbook"].split("#")
    page = (ROOT / path).read_text()
    headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    assert anchor in {heading.lower().replace(" ", "-") for heading in headings}
    answer = "pages" if rule["labels"]["severity"] == "critical" else "waits"  # type: ignore[index]
    assert f"\n| [{rule['alert']}](#{anchor}) | {answer} | " in page


def test_the_documentation_has_a_line_for_every_metric_and_every_idle_reason() -> None:
    text = (ROOT / "docs" / "operating.md").read_text()
    documented = set(re.findall(r"^\| `(darkroom_\w+)`", text, re.MULTILINE))

    assert documented == {re.sub("_(bucket|sum|count)$", "", name) for name in samples()}
    assert set(re.findall(r"^\| `([a-z_]+)` \|", text, re.MULTILINE)) - documented == REASONS
