"""Compute a campaign's figures from its journal, bucket and queues, and check them against limits. Pure."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from tests.campaigns.journal import Acted, Counted, Ended, Entry, Published, ReceivedWebhook, only

# A worker that fell under suspicion is an engine's or a worker's doing; the jobs of a campaign are all harmless.
POISON_CODES = {"ENGINE_CRASHED", "JOB_TIMEOUT", "WORKER_CRASHED"}
OUTAGE = "outage"
SIGTERM = "sigterm"


class StoredObject(NamedTuple):
    """An object in the results: its bytes' sha256, the one in its metadata, and whether it is a whole picture."""

    sha256: str
    claimed_sha256: str
    is_image: bool


@dataclass(frozen=True)
class Limits:
    """What a campaign may cost; None: anything.

    A repeat may come `mark_tolerance_seconds` behind the ledger's mark: the mark's time is known to a second, and the
    repeat's sender read the record before it sent.
    """

    mark_tolerance_seconds: float = 2.0
    max_repeat_share: float | None = None
    max_extra_share: float | None = None
    max_late_seconds: float | None = None
    max_idle_seconds: float | None = None
    grace_seconds: float | None = None


@dataclass(frozen=True)
class Figures:
    """What a campaign came to. Lists hold generation ids, or a few words for each case."""

    num_published: int
    num_complete: int
    num_failed_as_meant: int
    lost: list[int]
    both_ends: list[int]
    duplicate_effects: list[int]
    wrong_ends: list[str]
    failed_as_poison: list[str]
    num_repeats: int
    num_provoked_repeats: int
    num_unjudged_repeats: int
    repeats_outside: list[str]
    altered_repeats: list[str]
    missing_objects: list[str]
    surplus_objects: list[str]
    broken_objects: list[str]
    wrong_hashes: list[str]
    left_in_queues: dict[str, int]
    num_dead_letters: int
    actions: dict[str, int]
    num_lives: int
    own_exits: list[str]
    bad_exits: list[str]
    slowest_exit_seconds: float
    lane_steps: float
    needed_steps: int
    late_seconds: float
    idle_seconds: float
    seconds: float
    poisoned: list[int]
    poisoned_delivered: list[int]
    poisoned_gone: list[int]

    @property
    def repeat_share(self) -> float:
        """Raw repeats that the backend did not provoke, of all ends."""
        return (self.num_repeats - self.num_provoked_repeats) / max(1, self.num_complete + self.num_failed_as_meant)

    @property
    def extra_share(self) -> float:
        """Denoising beyond what the pictures needed."""
        return self.lane_steps / max(1, self.needed_steps) - 1


class Check(NamedTuple):
    """One line of the result: a figure, its limit, and whether it is met. `limit` is empty for one that is only
    reported.
    """

    name: str
    value: str
    limit: str
    is_met: bool


def compute_figures(
    entries: Iterable[Entry],
    objects: Mapping[str, StoredObject],
    queues: Mapping[str, int],
    *,
    limits: Limits,
    poisoned: Collection[int] = (),
    parked: Collection[int] = (),
) -> Figures:
    """Compute the figures. `objects` by their keys; `queues`: messages left by the name behind the jobs' queue, without
    the `parked` ones.

    `parked` are the generations whose ends are left in the outbox, as those of all `poisoned` ones should be.
    """
    entries = list(entries)
    published = {job.generation_id: job for job in only(entries, Published)}
    heard = [one for one in only(entries, ReceivedWebhook) if one.is_end]
    effects = _effects(heard)
    kinds = {number: {end.kind for end in ends} for number, ends in effects.items()}
    complete = [number for number, found in kinds.items() if "complete" in found]
    failed = [end for ends in effects.values() for end in ends if end.kind == "failed"]
    innocent = [end for end in failed if not _must_fail(published, end.generation_id)]
    poison = [end for end in innocent if end.code in POISON_CODES]
    waiting = [number for number in poisoned if number in published and not published[number].must_fail]
    drawn = [published[number] for number in {*complete, *waiting} if number in published]
    return Figures(
        num_published=len(published),
        num_complete=len(complete),
        num_failed_as_meant=len(failed) - len(innocent),
        lost=sorted(published.keys() - effects.keys() - set(poisoned)),
        both_ends=sorted(number for number, found in kinds.items() if len(found) > 1),
        duplicate_effects=sorted(number for number, ends in effects.items() if len(ends) > 1),
        wrong_ends=[
            *(f"{number}: complete" for number in complete if _must_fail(published, number)),
            *(f"{end.generation_id}: {end.code}" for end in innocent if end.code not in POISON_CODES),
            *(f"{number}: never published" for number in sorted(effects.keys() - published.keys())),
        ],
        failed_as_poison=[f"{end.generation_id}: {end.code}" for end in poison],
        **_repeats(heard, limits.mark_tolerance_seconds),
        **_images(drawn, objects),
        left_in_queues={name: count for name, count in queues.items() if count and name != ".dead"},
        num_dead_letters=queues.get(".dead", 0),
        **_workers(entries, limits),
        needed_steps=sum(job.num_steps for job in drawn),
        late_seconds=_late_seconds(entries, heard),
        seconds=_span(entries),
        poisoned=sorted(poisoned),
        poisoned_delivered=sorted(effects.keys() & set(poisoned)),
        poisoned_gone=sorted(set(poisoned) - set(parked)),
    )


def checks(figures: Figures, limits: Limits) -> list[Check]:
    """Compare every figure with its limit."""
    f = figures
    unexplained = max(0, f.num_dead_letters - len(f.failed_as_poison))
    return [
        _reported("jobs published", f.num_published),
        _reported("complete", f.num_complete),
        _reported("failed as they must", f.num_failed_as_meant),
        *(_reported(f"chaos: {name}", count) for name, count in sorted(f.actions.items())),
        _reported("workers started", f.num_lives),
        _reported("seconds", round(f.seconds)),
        _zero("lost", f.lost),
        _zero("with both kinds of end", f.both_ends),
        _zero("duplicate effects", f.duplicate_effects),
        _zero("ended as they must not", f.wrong_ends),
        _reported("failed as poison though innocent", _listed(f.failed_as_poison)),
        _reported("raw repeats", f"{f.num_repeats} ({f.num_provoked_repeats} of them provoked)"),
        _at_most("share of unprovoked repeats", f.repeat_share, limits.max_repeat_share),
        _reported("repeats while the store was away", f.num_unjudged_repeats),
        _zero("repeats outside the window between post and mark", f.repeats_outside),
        _zero("repeats with another body", f.altered_repeats),
        _zero("pictures missing", f.missing_objects),
        _zero("pictures of no complete job", f.surplus_objects),
        _zero("pictures that cannot be decoded", f.broken_objects),
        _zero("pictures with another sha256 than their metadata", f.wrong_hashes),
        _reported("ends that the backend never takes", _listed(f.poisoned)),
        _zero("delivered of these", f.poisoned_delivered),
        _zero("no longer parked of these", f.poisoned_gone),
        _zero("left in queues", [f"{name or 'jobs'}: {count}" for name, count in f.left_in_queues.items()]),
        _zero("dead letters without a reason", [unexplained] if unexplained else []),
        _zero("workers that ended without being asked", f.own_exits),
        _zero("exits late or with a wrong code", f.bad_exits),
        _reported("slowest exit after SIGTERM, seconds", f.slowest_exit_seconds),
        _at_most("denoising beyond need", f.extra_share, limits.max_extra_share),
        _at_most("last end behind the outage, seconds", f.late_seconds, limits.max_late_seconds, is_share=False),
        _at_most(
            "engines idle between first and last step, seconds", f.idle_seconds, limits.max_idle_seconds, is_share=False
        ),
    ]


def _effects(heard: list[ReceivedWebhook]) -> dict[int, list[ReceivedWebhook]]:
    """Group by generation what a backend that drops repeats of an id has acted on."""
    effects: dict[int, list[ReceivedWebhook]] = defaultdict(list)
    known: set[str] = set()
    for end in heard:
        if end.webhook_id not in known:
            known.add(end.webhook_id)
            effects[end.generation_id].append(end)
    return effects


def _must_fail(published: Mapping[int, Published], generation_id: int) -> bool:
    return generation_id in published and published[generation_id].must_fail


def _repeats(heard: list[ReceivedWebhook], tolerance_seconds: float) -> dict[str, Any]:
    first: dict[str, ReceivedWebhook] = {}
    provoked: set[str] = set()
    found: dict[str, Any] = {
        "num_repeats": 0,
        "num_provoked_repeats": 0,
        "num_unjudged_repeats": 0,
        "repeats_outside": [],
        "altered_repeats": [],
    }
    for end in heard:
        known = first.setdefault(end.webhook_id, end)
        if known is not end:
            found["num_repeats"] += 1
            found["num_provoked_repeats"] += end.webhook_id in provoked
            found["num_unjudged_repeats"] += end.mark == "unknown"
            if end.mark == "marked" and end.marked_seconds_ago > tolerance_seconds:
                found["repeats_outside"].append(f"{end.webhook_id}, {end.marked_seconds_ago} s behind its mark")
            if end.digest != known.digest:
                found["altered_repeats"].append(end.webhook_id)
        if end.answer == "lost":
            provoked.add(end.webhook_id)
        else:
            provoked.discard(end.webhook_id)
    return found


def _images(complete: list[Published], objects: Mapping[str, StoredObject]) -> dict[str, Any]:
    wanted = {key for job in complete for key in keys_of(job)}
    return {
        "missing_objects": sorted(wanted - objects.keys()),
        "surplus_objects": sorted(objects.keys() - wanted),
        "broken_objects": sorted(key for key, found in objects.items() if not found.is_image),
        "wrong_hashes": sorted(key for key, found in objects.items() if found.sha256 != found.claimed_sha256),
    }


def keys_of(job: Published) -> list[str]:
    """Return the keys of the job's images."""
    suffixes = ["", *(f"-{number}" for number in range(2, job.num_images + 1))]
    return [f"generations/gen-{job.generation_id}{suffix}.png" for suffix in suffixes]


def _workers(entries: list[Entry], limits: Limits) -> dict[str, Any]:
    exits = only(entries, Ended)
    stopped = [one for one in exits if one.stopped_by == SIGTERM]
    grace = float("inf") if limits.grace_seconds is None else limits.grace_seconds
    counts = only(entries, Counted)
    return {
        "actions": dict(Counter(_named(acted) for acted in only(entries, Acted))),
        "num_lives": max((counted.life for counted in counts), default=0),
        "own_exits": [f"worker {one.life}: exit code {one.exit_code}" for one in exits if not one.stopped_by],
        "bad_exits": [
            f"worker {one.life}: exit code {one.exit_code} after {one.seconds} s"
            for one in stopped
            if one.seconds > grace or not _is_good_exit(one)
        ],
        "slowest_exit_seconds": max((one.seconds for one in stopped), default=0.0),
        "lane_steps": sum(max(found) for found in _by_life(counts, "lane_steps")),
        # Counts are noted where the steps have moved: from a life's first step to its last.
        "idle_seconds": sum(max(found) - min(found) for found in _by_life(_at_work(counts), "idle_seconds")),
    }


def _named(acted: Acted) -> str:
    """Name what was done, and to what kind of process where there were several to choose from."""
    victim, of, _ = acted.detail.partition(" of ")
    return f"{acted.action} {victim}" if of else acted.action


def _is_good_exit(ended: Ended) -> bool:
    # A process that has no handler yet dies of the signal, as it should.
    return ended.exit_code == 0 or (ended.exit_code == -15 and not ended.was_ready)


def _at_work(counts: list[Counted]) -> list[Counted]:
    return [counted for counted in counts if counted.lane_steps > 0]


def _by_life(counts: list[Counted], name: str) -> list[list[float]]:
    lives: dict[int, list[float]] = defaultdict(list)
    for counted in counts:
        lives[counted.life].append(getattr(counted, name))
    return list(lives.values())


def _late_seconds(entries: list[Entry], heard: list[ReceivedWebhook]) -> float:
    """Return the seconds from the backend's return to the last end that a job had."""
    back = [acted.at for acted in only(entries, Acted) if acted.action == OUTAGE]
    return round(max(end.at for end in heard) - max(back), 2) if back and heard else 0.0


def _span(entries: list[Entry]) -> float:
    return round(entries[-1].at - entries[0].at, 1) if entries else 0.0


def _reported(name: str, value: object) -> Check:
    return Check(name, str(value), "", is_met=True)


def _zero(name: str, cases: list[Any]) -> Check:
    return Check(name, _listed(cases), "0", is_met=not cases)


def _at_most(name: str, value: float, limit: float | None, *, is_share: bool = True) -> Check:
    def shown(number: float) -> str:
        return f"{100 * number:.2f} %" if is_share else f"{number:.1f}"

    if limit is None:
        return _reported(name, shown(value))
    return Check(name, shown(value), f"≤ {shown(limit)}", is_met=value <= limit)


def _listed(cases: list[Any]) -> str:
    return f"{len(cases)}: {', '.join(map(str, cases))}"[:400] if cases else "0"
