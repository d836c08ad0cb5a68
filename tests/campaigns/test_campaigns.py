"""Kills, broken connections and SIGTERMs at random: nothing lost, nothing twice. The long forms: `make campaign`.

Kills and a breaking network are in `make test`; SIGTERMs, and all at once, are left to `make faults`.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS
from tests.campaigns import chaos, plans
from tests.campaigns.backend import ERROR, LOSE, RESET
from tests.campaigns.chaos import FaultSchedule
from tests.campaigns.figures import Limits, checks
from tests.campaigns.plans import Campaign
from tests.campaigns.running import run
from tests.faults.station import QUICK_RETRIES
from tests.support.long import long


def short(campaign: Campaign, *schedules: FaultSchedule, **fields: Any) -> Campaign:
    """Shorten the campaign: quick chaos and short jobs."""
    return dataclasses.replace(
        campaign,
        schedules=schedules,
        steps=(20, 60),
        depth=8,
        patience_seconds=60.0,
        **fields,
    )


KILL = short(
    plans.kill(6, 2, has_real_engine=False),
    FaultSchedule("kill", chaos.kill_something, (0.2, 1.5), 2),
    limits=Limits(),  # one repeat of six is a large share
)
SIGTERM = short(
    plans.sigterm(30, 6, has_real_engine=False), FaultSchedule("sigterm", chaos.stop_a_worker, (0.3, 2.0), 6)
)
NETWORK = short(
    plans.network(6, 1, num_workers=1, has_real_engine=False),
    FaultSchedule("connections closed", chaos.close_connections, (0.5, 2.0), 1),
    FaultSchedule("connections reset", chaos.reset_connections, (0.2, 1.0), 2),
    FaultSchedule("broker restart", chaos.restart_broker, (0.5, 1.0), 1),
    # No calls that hang: one costs the worker's whole deadline.
    mishaps={ERROR: 0.2, RESET: 0.05, LOSE: 0.05},
)
STORM = short(
    plans.storm(20, 4, has_real_engine=False),
    FaultSchedule("kill", chaos.kill_something, (0.5, 2.0), 4),
    FaultSchedule("connections closed", chaos.close_connections, (1.0, 3.0)),
    constants=QUICK_RETRIES,
)


@pytest.mark.parametrize(
    "campaign",
    [
        pytest.param(campaign, marks=[long] if campaign in (SIGTERM, STORM) else [], id=campaign.name)
        for campaign in (KILL, NETWORK, SIGTERM, STORM)
    ],
)
def test_a_campaign_loses_nothing_and_does_nothing_twice(
    rabbitmq: RabbitMQ, s3_server: SeaweedFS, tmp_path: Path, campaign: Campaign
) -> None:
    figures = run(campaign, rabbitmq, s3_server, tmp_path, seed=1, console=Console(quiet=True))

    assert [check for check in checks(figures, campaign.limits) if not check.is_met] == []
    assert figures.num_published == campaign.num_jobs
