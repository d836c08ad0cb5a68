"""The ledger on a real store: the first end of a job is its only one."""

import dataclasses
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from clients.storage.client import Storage
from clients.storage.errors import ObjectDamaged
from clients.storage.location import ObjectRef
from config.store import StoreSettings
from worker.errors import ErrorCode
from worker.results.ledger import Ledger
from worker.results.terminal_event import TerminalEvent, failed_event


@pytest.fixture
def storage(store_settings: StoreSettings) -> Storage:
    return Storage(store_settings)


@pytest.fixture
def ledger(storage: Storage, bucket: str) -> Ledger:
    return Ledger(storage, bucket)


def event(task_id: str, message: str = "too bad") -> TerminalEvent:
    return failed_event(task_id=task_id, generation_id=7, code=ErrorCode.GPU_OOM, message=message, retry_count=0)


def test_a_job_without_an_end_has_none(ledger: Ledger) -> None:
    assert ledger.find(str(uuid.uuid4())) is None


def test_a_recorded_end_is_found_as_it_was_written(ledger: Ledger) -> None:
    written = event(str(uuid.uuid4()), "화가")

    assert ledger.record(written) == written
    assert ledger.find(written.task_id) == written


def test_a_second_end_gives_way_to_the_first(ledger: Ledger) -> None:
    first = event(str(uuid.uuid4()), "first")
    ledger.record(first)

    assert ledger.record(dataclasses.replace(first, body={"generation_id": 7, "result_url": "x"})) == first
    assert ledger.find(first.task_id) == first


def test_one_of_many_writers_records_its_end_and_the_others_adopt_it(storage: Storage, bucket: str) -> None:
    task_id = str(uuid.uuid4())
    ends = [event(task_id, f"writer {number}") for number in range(12)]

    with ThreadPoolExecutor(12) as pool:
        adopted = set(pool.map(lambda end: Ledger(storage, bucket).record(end).body["error_message"], ends))

    assert len(adopted) == 1


def test_delivered_end_is_marked(ledger: Ledger) -> None:
    end = ledger.record(event(str(uuid.uuid4())))
    assert not ledger.is_delivered(end)

    ledger.mark_delivered(end)

    assert ledger.is_delivered(end)
    found = ledger.find(end.task_id)
    assert found == dataclasses.replace(end, is_delivered=True)


def test_unreadable_record_is_an_error_and_not_an_absence(ledger: Ledger, storage: Storage, bucket: str) -> None:
    task_id = str(uuid.uuid4())
    storage.put(ObjectRef(bucket, f"jobs/{task_id}.json"), b"{}", content_type="application/json")

    with pytest.raises(ObjectDamaged, match=task_id):
        ledger.find(task_id)
    assert not ledger.is_delivered(event(task_id))
