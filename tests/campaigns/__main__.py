"""`python -m tests.campaigns [kill|network|sigterm|outage|storm]`: the long forms; without a name all of them in turn.

Prints a table for people and, last, a line of JSON for each campaign; exit code 1 where a limit is not kept. A campaign
that was broken off goes on with `--resume FOLDER`.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once

import argparse
import dataclasses
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS
from tests.campaigns.figures import Check, Figures, checks
from tests.campaigns.journal import Began, Journal
from tests.campaigns.plans import CAMPAIGNS, Campaign
from tests.campaigns.running import run

# The network campaign twice: what one worker draws twice is its own fault, two share the blame.
ALL: tuple[tuple[str, dict[str, int]], ...] = (
    ("kill", {}),
    ("network", {}),
    ("network", {"num_workers": 1}),
    ("sigterm", {}),
    ("outage", {}),
    ("storm", {}),
)


def main() -> None:
    """Run what was asked for."""
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(143))  # workers must not outlive it
    arguments = _arguments()
    console = Console(width=None if sys.stdout.isatty() else 160)
    if arguments.resume is not None:
        results = [_resume(arguments.resume, console)]
    else:
        results = [_begin(name, options, arguments, console) for name, options in _asked(arguments)]
    for line, _ in results:
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    sys.exit(0 if all(is_met for _, is_met in results) else 1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns", description=__doc__)
    parser.add_argument("campaign", nargs="?", choices=CAMPAIGNS, help="default: all of them")
    parser.add_argument("--jobs", type=int, help="number of jobs")
    parser.add_argument("--actions", type=int, help="kills, SIGTERMs, or restarts of the broker")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--fake-gpu", action="store_true", help="engines that start at once and draw noise")
    parser.add_argument("--out", type=Path, default=Path("out/campaigns"), help="a new folder is made in it for each")
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="go on with the campaign in this folder")
    return parser.parse_args()


def _asked(arguments: argparse.Namespace) -> list[tuple[str, dict[str, int]]]:
    given = {"num_jobs": arguments.jobs, "num_actions": arguments.actions, "num_workers": arguments.workers}
    options = {name: number for name, number in given.items() if number is not None}
    if arguments.campaign is not None:
        return [(arguments.campaign, options)]
    return [(name, own | options) for name, own in ALL]


def _begin(name: str, options: dict[str, int], arguments: argparse.Namespace, console: Console) -> tuple[str, bool]:
    campaign = CAMPAIGNS[name](**options, has_real_engine=not arguments.fake_gpu)
    folder = arguments.out / f"{name}-{arguments.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    return _fight(campaign, folder, arguments.seed, console)


def _resume(folder: Path, console: Console) -> tuple[str, bool]:
    journal = Journal(folder / "journal.jsonl")
    journal.close()
    began = journal.all(Began)[0]
    campaign = CAMPAIGNS[began.campaign](
        num_jobs=began.num_jobs,
        num_actions=began.num_actions,
        num_workers=began.num_workers,
        has_real_engine=began.has_real_engine,
    )
    return _fight(campaign, folder, began.seed, console)


def _fight(campaign: Campaign, folder: Path, seed: int, console: Console) -> tuple[str, bool]:
    """Run one campaign and print its table; its line of JSON, and whether every limit was kept."""
    folder.mkdir(parents=True, exist_ok=True)
    console.print(f"{campaign.name}: {campaign.num_jobs} jobs, seed {seed}, in {folder}")
    with RabbitMQ(folder / "rabbitmq") as rabbitmq, SeaweedFS(folder / "seaweedfs") as store:
        figures = run(campaign, rabbitmq, store, folder.resolve(), seed=seed, console=console)
    found = checks(figures, campaign.limits)
    is_met = all(check.is_met for check in found)
    console.print(_table(campaign, found))
    return _line(campaign, seed, figures, is_met=is_met), is_met


def _table(campaign: Campaign, found: list[Check]) -> Table:
    table = Table("what", "found", "allowed", title=f"{campaign.name} campaign")
    for check in found:
        style = "" if check.is_met else "bold red"
        table.add_row(check.name, check.value, check.limit, style=style)
    return table


def _line(campaign: Campaign, seed: int, figures: Figures, *, is_met: bool) -> str:
    fields: dict[str, Any] = {"campaign": campaign.name, "seed": seed, "is_met": is_met}
    shares = {"repeat_share": round(figures.repeat_share, 5), "extra_share": round(figures.extra_share, 5)}
    return json.dumps(fields | dataclasses.asdict(figures) | shares)


if __name__ == "__main__":
    main()
