"""The object store, and the way to it."""

from tests.mutations.row import Mutation, Row

LIVE = "tests/test_live_faults_store.py::"
STORAGE = "tests/test_clients_storage.py::"

ROWS: tuple[Row, ...] = (
    Row(
        "C1",
        "the store says twice that it is too busy, or that it broke",
        "the request is repeated after a pause; picture, end and queues are as ever",
        tests=(f"{LIVE}test_a_busy_store_is_asked_again_and_nobody_hears_of_it",),
        without=(Mutation("clients/storage_wire.py", '"total_max_attempts": MAX_ATTEMPTS', '"total_max_attempts": 1'),),
        also=(f"{STORAGE}test_a_busy_store_is_asked_again",),
    ),
    Row(
        "C2",
        "the store answers 500 for as long as anybody asks",
        "the job waits in a retry queue while others are drawn; its last try fails it, once",
        tests=(f"{LIVE}test_a_store_that_fails_one_job_for_ever_fails_it_once_and_no_other",),
        without=(
            Mutation(
                "worker/settling.py",
                'return _again(attempt, "STORAGE_UNAVAILABLE", f"the object store failed {attempt} times: {error}")',
                'return Verdict(Disposition.ACK, "STORAGE_UNAVAILABLE", str(error))',
            ),
        ),
        also=("tests/test_live_faults.py::test_while_the_store_is_down_a_job_waits_in_the_retry_queue",),
    ),
    Row(
        "C3",
        "the store refuses the worker's keys",
        "no job fails: the worker is not ready, takes no more, and goes on once the keys are right",
        tests=(
            f"{LIVE}test_a_store_that_refuses_the_worker_itself_fails_no_job_and_stops_the_taking_of_jobs[ExpiredToken]",
        ),
        without=(Mutation("worker/breakers.py", "self._breaker.refuse(str(error))", "pass"),),
        also=(
            "tests/test_live_breakers.py::test_a_store_that_refuses_the_keys_fails_no_job_and_costs_no_picture_twice",
            "tests/test_live_breakers.py::test_one_object_that_may_not_be_read_is_its_own_job_s_failure",
        ),
    ),
    Row(
        "C4",
        "the adapter is not there, or not yet",
        "looked for once more after a moment; then the job fails undrawn, never without its style",
        tests=(f"{LIVE}test_an_adapter_that_comes_a_moment_after_its_job_is_not_missing",),
        without=(Mutation("worker/fetching.py", "self.is_draining.wait(SECOND_LOOK_SECONDS)", "raise"),),
        also=(f"{LIVE}test_without_its_adapter_a_job_fails_and_nothing_is_drawn",),
    ),
    Row(
        "C5",
        "a download breaks off in the middle",
        "fetched again from its start; under its name lies a whole file or none",
        tests=(f"{LIVE}test_an_adapter_cut_in_the_middle_of_its_way_is_fetched_again",),
        without=(Mutation("clients/storage.py", "MAX_DOWNLOAD_TRIES = 3", "MAX_DOWNLOAD_TRIES = 1"),),
        also=(
            f"{STORAGE}test_a_body_cut_short_is_fetched_again",
            f"{STORAGE}test_a_body_that_stays_damaged_is_told_after_three_tries",
        ),
    ),
    Row(
        "C6",
        "a download has its length and a wrong byte",
        "its MD5 is not the ETag: fetched again, and the wrong one never used",
        tests=(f"{LIVE}test_an_adapter_with_a_wrong_byte_is_fetched_again_and_never_used",),
        without=(Mutation("clients/storage.py", "if _is_md5(found.etag, answer) and md5 != found.etag:", "if False:"),),
        also=(f"{STORAGE}test_a_body_that_stays_damaged_is_told_after_three_tries",),
    ),
    Row(
        "C7",
        "a download comes byte by byte, so that no read ever times out",
        "given up below 64 kB/s, and asked for again",
        tests=(f"{LIVE}test_an_adapter_that_arrives_too_slowly_is_asked_for_again_long_before_its_time_is_over",),
        without=(Mutation("clients/storage.py", "return rate < MIN_RATE_BYTES_PER_SECOND", "return False"),),
        also=(
            f"{LIVE}test_a_slow_store_costs_time_and_nothing_else",
            f"{STORAGE}test_a_download_below_the_minimum_rate_ends_long_before_its_deadline",
            f"{STORAGE}test_a_dripping_download_ends_at_its_deadline",
        ),
    ),
    Row(
        "C8",
        "the store takes the request and never answers, or answers without end",
        "every call has a deadline of its own; the job is tried again later",
        tests=(
            f"{LIVE}test_a_store_that_hangs_is_given_up_in_time_and_the_job_tried_again",
            f"{LIVE}test_an_answer_that_drips_ends_with_the_call",
        ),
        without=(Mutation("clients/deadline.py", "self._timer.start()", "pass"),),
        also=(f"{STORAGE}test_a_store_without_an_answer_ends_at_the_deadline",),
    ),
    Row(
        "C9",
        "a write is cut in the middle, or its answer is lost",
        "whole object or none; the repeat finds its own and goes on, drawn and told once",
        tests=(f"{LIVE}test_a_write_whose_answer_is_lost_is_one_write_and_one_end",),
        without=(
            Mutation(
                "clients/storage.py",
                "            except ObjectChanged:\n                return False",
                "            except ObjectChanged:\n                raise",
            ),
        ),
        also=(f"{LIVE}test_a_picture_cut_in_the_middle_of_its_way_is_sent_again_whole",),
    ),
    Row(
        "C10",
        "an upload in parts is left unfinished",
        "there is none to be left: a picture is one request",
        tests=(
            f"{LIVE}test_a_picture_cut_in_the_middle_of_its_way_is_sent_again_whole",
            f"{STORAGE}test_a_put_is_one_plain_request_with_its_sha256",
            "tests/test_live_faults_process.py::"
            "test_a_worker_killed_at_any_point_leaves_one_end_and_one_whole_picture[in_the_picture]",
        ),
        because="nothing is uploaded in parts, so that nothing has to be swept",
    ),
    Row(
        "C11",
        "another task's picture lies under the generation's key",
        "it gives way to a task that has no recorded end, and a warning names both; our own is no conflict",
        tests=(f"{LIVE}test_a_picture_of_another_task_gives_way_and_the_log_says_so",),
        without=(
            Mutation(
                "worker/storing.py",
                "            if self._overwrite(file, found):\n                return\n",
                "            return\n",
            ),
        ),
        also=(
            "tests/test_live_faults_process.py::"
            "test_a_worker_killed_at_any_point_leaves_one_end_and_one_whole_picture[behind_the_picture]",
        ),
    ),
    Row(
        "C12",
        "the store knows no conditional writes",
        "found out once and said in the log; from then on it is looked before it is written",
        tests=(f"{LIVE}test_a_store_that_knows_no_conditions_is_written_to_without_them",),
        without=(
            Mutation(
                "worker/ledger.py",
                "        except NotSupported:\n            return False",
                "        except NotSupported:\n            raise",
            ),
        ),
    ),
    Row(
        "C13",
        "the store redirects to another host",
        "nobody goes there; the job is tried again, and fails where it stays so",
        tests=(f"{LIVE}test_a_redirect_to_another_host_is_not_followed", f"{STORAGE}test_a_redirect_is_not_followed"),
        because="boto3's transport follows no redirect, and there is no other",
    ),
    Row(
        "C14",
        "the worker's clock is too far from the store's",
        "as with refused keys, and both log and readiness say which it is",
        tests=(
            f"{LIVE}test_a_store_that_refuses_the_worker_itself_fails_no_job_and_stops_the_taking_of_jobs"
            "[RequestTimeTooSkewed]",
        ),
        without=(
            Mutation("clients/storage_errors.py", '        "RequestTimeTooSkewed",\n', ""),
            Mutation("clients/storage_errors.py", "    403: AccessDenied,\n", ""),
        ),
    ),
)
