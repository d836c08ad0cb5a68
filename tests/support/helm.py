"""Render the Helm chart, and lint it, by Helm's own library: `python -m tests.support.helm`, values in, JSON out.

In a process of its own, as that library brings Go's runtime and its signal handlers along.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from tests.support.promql import DEPLOY

CHART = DEPLOY / "helm" / "darkroom"


def helm(values: Mapping[str, Any], *, release: str = "darkroom") -> dict[str, Any]:
    """Return what Helm makes of the chart: `lint`'s report, and `rendered` texts by template or the `error`."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.helm", release],
        input=json.dumps(values),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def main() -> None:
    from helm_python import Chart, HelmError
    from helm_python.chart import lint

    values = json.load(sys.stdin)
    made: dict[str, Any] = {"lint": lint(CHART, values, strict=True)}
    with Chart.load(CHART) as chart:
        try:
            chart.validate_schema(values)
            made["rendered"] = chart.render(values, name=sys.argv[1], namespace="images")
        except HelmError as error:
            made["error"] = str(error)
    sys.stdout.write(json.dumps(made))


if __name__ == "__main__":
    main()
