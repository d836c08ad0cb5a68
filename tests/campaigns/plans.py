"""The five campaigns: what goes wrong in each, how often, and what it may cost."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.campaigns import chaos
from tests.campaigns.backend import ERROR, HANG, LOSE, RESET
from tests.campaigns.chaos import FaultSchedule
from tests.campaigns.figures import Limits

GRACE_SECONDS = 20
# Where the backend fails, a worker goes on with its tries for ten seconds after it has read the job's record.
BACKEND_PATIENCE_SECONDS = 12.0
# A worker with a real engine needs six seconds and more to come up; with a stand-in, one or two.
GAP_SECONDS = (3.0, 13.0)
STAND_IN_GAP_SECONDS = (0.5, 3.0)
# Each takes a stand-in 20 ms (`running.py`), with all its lanes together.
STAND_IN_STEPS = (60, 150)
OUTAGE_SECONDS = 120.0


@dataclass(frozen=True)
class Campaign:
    """Jobs, workers, chaos and limits. `num_actions` is how often the campaign's own fault strikes in all.

    `depth` jobs are kept in the queue and at work beyond what the chaos is due; `steps` are those of one image, from
    and to; `patience_seconds` is how long nothing may end before the rest counts as lost. Without `has_real_engine` the
    engine is `tests.faults.stand_in`, which starts in a second and draws noise. `mishaps` are shares of the backend's
    calls, `store_error_share` of the store's, which needs `has_proxies`.
    With `has_poison` the backend never takes one end of each kind, which must wait for it without delaying others.
    `constants` of the worker are changed with that engine alone, see `tests/faults/site`.
    """

    name: str
    num_jobs: int
    num_actions: int
    num_workers: int
    schedules: tuple[FaultSchedule, ...]
    limits: Limits
    steps: tuple[int, int]
    depth: int = 20
    patience_seconds: float = 420.0  # the longest retry queue holds a job for 300
    mishaps: Mapping[str, float] = field(default_factory=dict)
    store_error_share: float = 0.0
    env: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    has_proxies: bool = False
    has_poison: bool = False
    has_real_engine: bool = True


def kill(
    num_jobs: int = 1000, num_actions: int = 200, num_workers: int = 2, *, has_real_engine: bool = True
) -> Campaign:
    """Plan `kill -9` of supervisors and engines."""
    return Campaign(
        name="kill",
        num_jobs=num_jobs,
        num_actions=num_actions,
        num_workers=num_workers,
        schedules=(FaultSchedule("kill", chaos.kill_something, _gap(has_real_engine), num_actions),),
        limits=Limits(max_repeat_share=0.005),
        # Two seconds of work, so that most kills meet workers that are busy.
        steps=(20, 80) if has_real_engine else STAND_IN_STEPS,
        has_poison=True,
        has_real_engine=has_real_engine,
    )


def network(
    num_jobs: int = 500, num_actions: int = 3, num_workers: int = 2, *, has_real_engine: bool = True
) -> Campaign:
    """Plan connections that break, a broker and a store that stop, and a backend that fails three calls in ten."""
    return Campaign(
        name="network",
        num_jobs=num_jobs,
        num_actions=num_actions,
        num_workers=num_workers,
        schedules=(
            FaultSchedule("connections closed", chaos.close_connections, (10.0, 40.0)),
            FaultSchedule("connections reset", chaos.reset_connections, (10.0, 40.0)),
            FaultSchedule("broker restart", chaos.restart_broker, (5.0, 30.0), num_actions),
            FaultSchedule("store paused", chaos.pause_store, (30.0, 60.0)),
            FaultSchedule("store restart", chaos.restart_store, (5.0, 60.0), num_actions),
        ),
        limits=Limits(
            max_extra_share=0.03 if num_workers == 1 else 0.10, mark_tolerance_seconds=BACKEND_PATIENCE_SECONDS
        ),
        steps=(8, 40) if has_real_engine else STAND_IN_STEPS,
        mishaps={ERROR: 0.17, RESET: 0.05, HANG: 0.03, LOSE: 0.05},
        has_proxies=True,
        has_poison=True,
        has_real_engine=has_real_engine,
    )


def sigterm(
    num_jobs: int = 500, num_actions: int = 100, num_workers: int = 2, *, has_real_engine: bool = True
) -> Campaign:
    """Plan workers that are stopped in order while jobs flow."""
    return Campaign(
        name="sigterm",
        num_jobs=num_jobs,
        num_actions=num_actions,
        num_workers=num_workers,
        schedules=(FaultSchedule("sigterm", chaos.stop_a_worker, _gap(has_real_engine), num_actions),),
        limits=Limits(max_repeat_share=0.0, grace_seconds=GRACE_SECONDS),
        steps=(10, 40) if has_real_engine else STAND_IN_STEPS,
        has_real_engine=has_real_engine,
        env={"SHUTDOWN_GRACE_SECONDS": str(GRACE_SECONDS)},
    )


def outage(num_jobs: int = 50, num_actions: int = 1, num_workers: int = 1, *, has_real_engine: bool = True) -> Campaign:
    """Plan a backend that is down for two minutes while all jobs are drawn."""
    return Campaign(
        name="outage",
        num_jobs=num_jobs,
        num_actions=num_actions,
        num_workers=num_workers,
        schedules=(FaultSchedule("outage", chaos.backend_outage(OUTAGE_SECONDS), (0.0, 0.1), num_actions),),
        limits=Limits(max_repeat_share=0.0, max_extra_share=0.0, max_late_seconds=60.0, max_idle_seconds=1.0),
        steps=(8, 40) if has_real_engine else STAND_IN_STEPS,
        depth=num_jobs,
        has_poison=True,
        has_real_engine=has_real_engine,
    )


def storm(
    num_jobs: int = 1000, num_actions: int = 100, num_workers: int = 2, *, has_real_engine: bool = True
) -> Campaign:
    """Plan all at once: kills, closed connections, and a store and a backend that answer some calls with errors."""
    return Campaign(
        name="storm",
        num_jobs=num_jobs,
        num_actions=num_actions,
        num_workers=num_workers,
        schedules=(
            FaultSchedule("kill", chaos.kill_something, (3.0, 23.0), num_actions),
            FaultSchedule("connections closed", chaos.close_connections, (15.0, 25.0)),
        ),
        limits=Limits(mark_tolerance_seconds=BACKEND_PATIENCE_SECONDS),
        steps=(20, 80) if has_real_engine else STAND_IN_STEPS,
        mishaps={ERROR: 0.10},
        store_error_share=0.05,
        has_proxies=True,
        has_real_engine=has_real_engine,
    )


def _gap(has_real_engine: bool) -> tuple[float, float]:
    return GAP_SECONDS if has_real_engine else STAND_IN_GAP_SECONDS


CAMPAIGNS: dict[str, Callable[..., Campaign]] = {
    "kill": kill,
    "network": network,
    "sigterm": sigterm,
    "outage": outage,
    "storm": storm,
}
