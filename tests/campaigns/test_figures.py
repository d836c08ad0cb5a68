"""The figures of the campaigns, on made-up journals: each fault is found, and nothing else."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from tests.campaigns.figures import Figures, Limits, StoredObject, checks, compute_figures
from tests.campaigns.jobs import plan_jobs
from tests.campaigns.journal import Acted, Counted, Ended, Entry, Journal, Published, ReceivedWebhook

IMAGE = StoredObject("abc", "abc", is_image=True)


def job(number: int, **fields: Any) -> Published:
    made = Published(float(number), number, f"task-{number}", num_images=1, num_steps=10, must_fail=False)
    return dataclasses.replace(made, **fields)


def end(number: int, kind: str = "complete", **fields: Any) -> ReceivedWebhook:
    made = ReceivedWebhook(number + 100.0, kind, f"task-{number}:{kind}", number, "taken", digest="same")
    return dataclasses.replace(made, **fields)


def images(*numbers: int) -> dict[str, StoredObject]:
    return {f"generations/gen-{number}.png": IMAGE for number in numbers}


def figures_and_unmet(
    entries: list[Entry],
    objects: dict[str, StoredObject],
    queues: dict[str, int] | None = None,
    limits: Limits = Limits(),  # noqa: B008 - frozen
) -> tuple[Figures, list[str]]:
    """Return the figures, and the names of the checks that are not met."""
    figures = compute_figures(entries, objects, queues or {}, limits=limits)
    return figures, [check.name for check in checks(figures, limits) if not check.is_met]


def test_campaign_without_faults_has_no_unmet_check() -> None:
    entries = [job(1), job(2, must_fail=True), end(1), end(2, "failed", code="LORA_NOT_FOUND")]

    figures, unmet = figures_and_unmet(entries, images(1), {"": 0, ".dead": 0})

    assert unmet == []
    assert (figures.num_complete, figures.num_failed_as_meant) == (1, 1)


def test_a_job_without_an_end_is_lost() -> None:
    figures, unmet = figures_and_unmet([job(1), job(2), end(1)], images(1))
    assert figures.lost == [2]
    assert unmet == ["lost"]


def test_end_refused_by_the_backend_is_not_counted() -> None:
    figures, _ = figures_and_unmet([job(1), end(1, answer="refused")], {})
    assert figures.lost == [1]


def test_both_kinds_of_end_are_found() -> None:
    figures, unmet = figures_and_unmet([job(1), end(1), end(1, "failed", code="ENGINE_CRASHED")], images(1))
    assert figures.both_ends == [1]
    assert "with both kinds of end" in unmet


def test_a_second_effect_under_another_id_is_found() -> None:
    figures, unmet = figures_and_unmet([job(1), end(1), end(1, webhook_id="other:complete")], images(1))
    assert figures.duplicate_effects == [1]
    assert unmet == ["duplicate effects"]


def test_a_repeat_is_no_second_effect_but_counted() -> None:
    limits = Limits(max_repeat_share=0.5)

    figures, unmet = figures_and_unmet([job(1), end(1), end(1, mark="open")], images(1), limits=limits)

    assert figures.duplicate_effects == []
    assert (figures.num_repeats, figures.num_provoked_repeats, figures.repeat_share) == (1, 0, 1.0)
    assert unmet == ["share of unprovoked repeats"]


def test_a_repeat_after_a_lost_answer_is_provoked() -> None:
    figures, unmet = figures_and_unmet(
        [job(1), end(1, answer="lost"), end(1, mark="open")], images(1), limits=Limits(max_repeat_share=0.0)
    )
    assert figures.num_provoked_repeats == 1
    assert unmet == []


@pytest.mark.parametrize(("seconds_ago", "num_found"), [(1.0, 0), (5.0, 1)])
def test_a_repeat_long_behind_the_ledgers_mark_is_found(seconds_ago: float, num_found: int) -> None:
    late = end(1, mark="marked", marked_seconds_ago=seconds_ago)
    figures, unmet = figures_and_unmet([job(1), end(1), late], images(1))
    assert len(figures.repeats_outside) == len(unmet) == num_found


def test_a_repeat_with_another_body_is_found() -> None:
    _, unmet = figures_and_unmet([job(1), end(1), end(1, mark="open", digest="other")], images(1))
    assert unmet == ["repeats with another body"]


@pytest.mark.parametrize(
    ("published", "ended", "found"),
    [
        (job(1), end(1, "failed", code="STORAGE_UNAVAILABLE"), "1: STORAGE_UNAVAILABLE"),
        (job(1, must_fail=True), end(1), "1: complete"),
        (job(2), end(1), "1: never published"),
    ],
)
def test_unexpected_end_is_found(published: Published, ended: ReceivedWebhook, found: str) -> None:
    figures, unmet = figures_and_unmet([published, ended], images(1))
    assert found in figures.wrong_ends
    assert "ended as they must not" in unmet


def test_job_failed_as_poison_by_mistake_is_counted_apart_and_explains_its_dead_letter() -> None:
    entries = [job(1), end(1, "failed", code="ENGINE_CRASHED")]

    figures, unmet = figures_and_unmet(entries, {}, {".dead": 1})

    assert figures.failed_as_poison == ["1: ENGINE_CRASHED"]
    assert figures.wrong_ends == unmet == []
    assert figures_and_unmet(entries, {}, {".dead": 2})[1] == ["dead letters without a reason"]


@pytest.mark.parametrize(
    ("objects", "found"),
    [
        (images(), "pictures missing"),
        (images(1, 2), "pictures of no complete job"),
        (
            {"generations/gen-1.png": IMAGE._replace(sha256="other")},
            "pictures with another sha256 than their metadata",
        ),
        ({"generations/gen-1.png": IMAGE._replace(is_image=False)}, "pictures that cannot be decoded"),
    ],
)
def test_faults_in_the_bucket_are_found(objects: dict[str, StoredObject], found: str) -> None:
    assert figures_and_unmet([job(1), end(1)], objects)[1] == [found]


def test_each_image_of_a_job_is_checked() -> None:
    figures, _ = figures_and_unmet([job(1, num_images=3), end(1)], images(1))
    assert figures.missing_objects == ["generations/gen-1-2.png", "generations/gen-1-3.png"]


def test_a_message_left_in_a_queue_is_found() -> None:
    figures, unmet = figures_and_unmet([job(1), end(1)], images(1), {"": 0, ".outbox": 1})
    assert figures.left_in_queues == {".outbox": 1}
    assert unmet == ["left in queues"]


def test_work_is_counted_over_all_lives_of_the_workers() -> None:
    counts = [Counted(1.0, 1, 0.0, 0.0), Counted(2.0, 1, 8.0, 0.0), Counted(3.0, 2, 4.0, 0.0)]

    figures, unmet = figures_and_unmet([job(1), *counts, end(1)], images(1), limits=Limits(max_extra_share=0.1))

    assert (figures.num_lives, figures.lane_steps, figures.needed_steps) == (2, 12.0, 10)
    assert unmet == ["denoising beyond need"]


@pytest.mark.parametrize(
    ("ended", "found"),
    [
        (Ended(1.0, 1, -9, "kill", 0.1, was_ready=True), []),
        (Ended(1.0, 1, 0, "sigterm", 9.0, was_ready=True), []),
        (Ended(1.0, 1, -15, "sigterm", 0.1, was_ready=False), []),
        (Ended(1.0, 1, -15, "sigterm", 0.1, was_ready=True), ["exits late or with a wrong code"]),
        (Ended(1.0, 1, 0, "sigterm", 11.0, was_ready=True), ["exits late or with a wrong code"]),
        (Ended(1.0, 1, 1, "", 0.0, was_ready=True), ["workers that ended without being asked"]),
    ],
)
def test_exits_are_checked(ended: Ended, found: list[str]) -> None:
    assert figures_and_unmet([job(1), end(1), ended], images(1), limits=Limits(grace_seconds=10.0))[1] == found


def test_ends_long_after_an_outage_are_found() -> None:
    entries = [job(1), Acted(90.0, "outage", "60 s"), end(1)]

    figures, unmet = figures_and_unmet(entries, images(1), limits=Limits(max_late_seconds=10.0))

    assert figures.late_seconds == 11.0
    assert unmet == ["last end behind the outage, seconds"]


def test_a_journal_is_read_again_without_a_line_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.write(job(1))
    journal.write(end(1))
    journal.close()
    with path.open("a") as file:
        file.write('{"entry": "Publi')

    again = Journal(path)
    again.write(job(2))
    again.close()

    assert Journal(path).entries() == [job(1), end(1), job(2)]


def test_the_same_seed_plans_the_same_jobs() -> None:
    jobs = plan_jobs(40, seed=1, steps=(6, 12))
    assert jobs == plan_jobs(40, seed=1, steps=(6, 12))
    assert jobs != plan_jobs(40, seed=2, steps=(6, 12))
    assert len({one.task_id for one in jobs}) == 40
    assert {one.num_images for one in jobs} == {1, 2}
    assert sum(one.must_fail for one in jobs) == 2


def test_end_never_taken_by_the_backend_must_be_parked_and_not_delivered() -> None:
    entries = [job(1), job(2), job(3, must_fail=True), end(1)]

    def unmet_of(parked: list[int], *more: Entry) -> list[str]:
        figures = compute_figures([*entries, *more], images(1, 2), {}, limits=Limits(), poisoned={2, 3}, parked=parked)
        return [check.name for check in checks(figures, Limits()) if not check.is_met]

    assert unmet_of([3, 2]) == []
    assert unmet_of([3]) == ["no longer parked of these"]
    assert unmet_of([3, 2], end(2)) == ["delivered of these"]
