"""`python -m tests.support.prometheus_rule`: write the alerts as Kubernetes and the Helm chart take them."""

import textwrap

from tests.support.promql import DEPLOY, PROMETHEUS

MANIFEST = DEPLOY / "kubernetes" / "prometheusrule.yaml"
CHART_FILE = DEPLOY / "helm" / "darkroom" / "files" / "alerts.yaml"
HEAD = """\
# Made from ../prometheus/alerts.yaml by `python -m tests.support.prometheus_rule`.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: darkroom
  labels:
    app.kubernetes.io/name: darkroom
spec:
"""


def alerts() -> str:
    """Return the alerts' file without the comment at its head."""
    text = (PROMETHEUS / "alerts.yaml").read_text()
    return text[text.index("groups:") :]


def manifest() -> str:
    """Return the text of the PrometheusRule."""
    return HEAD + textwrap.indent(alerts(), "  ")


if __name__ == "__main__":
    MANIFEST.write_text(manifest())
    CHART_FILE.parent.mkdir(parents=True, exist_ok=True)
    CHART_FILE.write_text(alerts())
