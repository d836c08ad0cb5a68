"""The object store, and the way to it."""

from tests.mutations.row import Mutation, Row

LIVE = "tests/live/test_faults_store.py::"
STORAGE = "tests/clients/storage/test_client.py::"
BATCHING = "tests/inference/engine/test_batching.py::"
GOOGLE = "tests/clients/storage/test_google.py::"
CACHE = "tests/clients/storage/test_cache.py::"
FETCHING = "tests/worker/jobs/inputs/test_fetcher.py::"

ROWS: tuple[Row, ...] = (
    Row(
        "C1",
        "the store says twice that it is too busy, or that it broke",
        "the request is repeated after a pause; picture, end and queues are as ever",
        tests=(f"{LIVE}test_busy_store_is_retried_and_the_job_completes",),
        without=(
            Mutation("clients/storage/transport.py", '"total_max_attempts": MAX_ATTEMPTS', '"total_max_attempts": 1'),
        ),
        also=(f"{STORAGE}test_busy_store_is_retried",),
    ),
    Row(
        "C2",
        "the store answers 500 for as long as anybody asks",
        "the job waits in a retry queue while others are drawn; its last try fails it, once",
        tests=(f"{LIVE}test_a_store_that_fails_one_job_for_ever_fails_it_once_and_no_other",),
        without=(
            Mutation(
                "worker/jobs/disposition.py",
                "return _retry(attempt, ErrorCode.STORAGE_UNAVAILABLE, ",
                "return Decision(Disposition.ACK, ErrorCode.STORAGE_UNAVAILABLE, ",
            ),
        ),
        also=("tests/live/test_faults.py::test_job_waits_in_the_retry_queue_while_the_store_is_down",),
    ),
    Row(
        "C3",
        "the store refuses the worker's keys",
        "no job fails: the worker is not ready, takes no more, and goes on once the keys are right",
        tests=(f"{LIVE}test_store_that_refuses_the_worker_s_keys_fails_no_job_and_stops_consuming[ExpiredToken]",),
        without=(Mutation("worker/breakers.py", "self._breaker.refuse(str(error))", "pass"),),
        also=(
            "tests/live/test_breakers.py::test_store_that_refuses_the_keys_fails_no_job_and_draws_no_image_twice",
            "tests/live/test_breakers.py::test_object_that_may_not_be_read_fails_its_own_job",
        ),
    ),
    Row(
        "C4",
        "the adapter is not there, or not yet",
        "looked for once more after a moment; then the job fails undrawn, never without its style",
        tests=(f"{LIVE}test_adapter_uploaded_a_moment_after_its_job_is_found",),
        without=(
            Mutation("worker/jobs/inputs/store_source.py", "self.is_draining.wait(NOT_FOUND_RETRY_SECONDS)", "raise"),
        ),
        also=(f"{LIVE}test_job_without_its_adapter_fails_and_draws_nothing",),
    ),
    Row(
        "C5",
        "a download breaks off in the middle",
        "fetched again from its start; under its name lies a whole file or none",
        tests=(f"{LIVE}test_adapter_download_cut_off_is_fetched_again",),
        without=(Mutation("clients/storage/download.py", "MAX_DOWNLOAD_TRIES = 3", "MAX_DOWNLOAD_TRIES = 1"),),
        also=(
            f"{STORAGE}test_a_body_cut_short_is_fetched_again",
            f"{STORAGE}test_body_that_stays_damaged_is_an_error_after_three_tries",
        ),
    ),
    Row(
        "C6",
        "a download has its length and a wrong byte",
        "its MD5 is not the ETag: fetched again, and the wrong one never used",
        tests=(f"{LIVE}test_an_adapter_with_a_wrong_byte_is_fetched_again_and_never_used",),
        without=(Mutation("clients/storage/digest.py", "        if not is_right:\n", "        if False:\n"),),
        also=(f"{STORAGE}test_body_that_stays_damaged_is_an_error_after_three_tries",),
    ),
    Row(
        "C7",
        "a download comes byte by byte, so that no read ever times out",
        "given up below 64 kB/s, and asked for again",
        tests=(f"{LIVE}test_adapter_download_below_the_minimum_rate_is_retried_long_before_its_deadline",),
        without=(Mutation("clients/storage/download.py", "return rate < MIN_RATE_BYTES_PER_SECOND", "return False"),),
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
        tests=(f"{LIVE}test_dripping_answer_ends_with_the_call",),
        without=(Mutation("clients/deadline.py", "TIMEOUTS.call_after(seconds,", "TIMEOUTS.call_after(3600,"),),
        # Silence is ended by urllib3's own timeout too, after ten seconds a try.
        also=(
            f"{LIVE}test_call_to_a_hanging_store_times_out_and_the_job_is_retried",
            f"{STORAGE}test_a_store_without_an_answer_ends_at_the_deadline",
        ),
    ),
    Row(
        "C9",
        "a write is cut in the middle, or its answer is lost",
        "whole object or none; the repeat finds its own and goes on, drawn and told once",
        tests=(f"{LIVE}test_a_write_whose_answer_is_lost_is_one_write_and_one_end",),
        without=(
            Mutation(
                "clients/storage/client.py",
                "            except ObjectChanged:\n                return False",
                "            except ObjectChanged:\n                raise",
            ),
        ),
        also=(f"{LIVE}test_image_upload_cut_off_is_sent_again_whole",),
    ),
    Row(
        "C10",
        "an upload in parts is left unfinished",
        "there is none to be left: a picture is one request",
        tests=(
            f"{LIVE}test_image_upload_cut_off_is_sent_again_whole",
            f"{STORAGE}test_a_put_is_one_plain_request_with_its_sha256",
            "tests/live/test_faults_process.py::"
            "test_a_worker_killed_at_any_point_leaves_one_end_and_one_whole_image[in_the_image]",
        ),
        because="nothing is uploaded in parts, so that nothing has to be swept",
    ),
    Row(
        "C11",
        "another task's picture lies under the generation's key",
        "it gives way to a task that has no recorded end, and a warning names both; our own is no conflict",
        tests=(f"{LIVE}test_image_of_another_task_is_replaced_and_logged",),
        without=(
            Mutation(
                "worker/results/image_store.py",
                "            if self._overwrite(file, found):\n                return\n",
                "            return\n",
            ),
        ),
        also=(
            "tests/live/test_faults_process.py::"
            "test_a_worker_killed_at_any_point_leaves_one_end_and_one_whole_image[behind_the_image]",
        ),
    ),
    Row(
        "C12",
        "the store knows no conditional writes",
        "found out once and said in the log; from then on it is looked before it is written",
        tests=(f"{LIVE}test_store_without_conditional_writes_is_written_to_without_them",),
        without=(
            Mutation(
                "worker/results/ledger.py",
                "            except NotSupported:\n                self._is_conditional = False",
                "            except NotSupported:\n                raise",
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
            f"{LIVE}test_store_that_refuses_the_worker_s_keys_fails_no_job_and_stops_consuming[RequestTimeTooSkewed]",
        ),
        without=(
            Mutation("clients/storage/errors.py", '        "RequestTimeTooSkewed",\n', ""),
            Mutation("clients/storage/errors.py", "    403: AccessDenied,\n", ""),
        ),
    ),
    Row(
        "C15",
        "many jobs name one adapter, whose file on the disk is touched at every use",
        "it is identified by its object's key, ETag and size: one reading, one slot; a replaced one is read anew",
        tests=(f"{BATCHING}test_an_adapter_of_one_version_is_read_once_however_its_file_is_touched",),
        without=(
            Mutation("inference/lora/adapter_key.py", "        if file.version:\n", "        if False:\n"),
            Mutation(
                "inference/engine/preparer.py",
                "            if reading is None or ran_out_of_memory(reading):\n",
                "            if True:\n",
            ),
        ),
        also=(
            f"{BATCHING}test_another_version_under_the_same_path_is_another_adapter",
            "tests/live/drawing/test_jobs.py::test_five_jobs_of_one_style_read_its_adapter_once_into_one_slot",
            "tests/live/drawing/test_jobs.py::test_an_adapter_replaced_at_its_key_is_read_anew_and_the_one_before_is_not_drawn",
        ),
    ),
    Row(
        "C16",
        "both files of an adapter's folder are replaced while they are fetched",
        "the config is looked at again behind the weights: no job draws with the files of two versions",
        tests=(f"{FETCHING}test_an_adapter_folder_replaced_during_the_fetch_gives_both_files_of_one_version",),
        without=(
            Mutation("worker/jobs/inputs/fetcher.py", "            if config == before:\n", "            if True:\n"),
        ),
        also=(
            f"{FETCHING}test_an_adapter_folder_that_is_replaced_without_end_is_tried_again_later",
            f"{FETCHING}test_a_job_keeps_the_adapter_that_it_fetched_when_the_object_is_replaced",
        ),
    ),
    Row(
        "C17",
        "one of the worker's own buckets is missing, in another region or behind another server",
        "as with refused keys: no job fails, the worker is not ready and says why, and goes on once it is there",
        tests=("tests/live/test_breakers.py::test_store_that_refuses_the_keys_fails_no_job_and_draws_no_image_twice",),
        without=(
            Mutation(
                "worker/breakers.py",
                "            except StoreRefused as error:\n",
                "            except FileExistsError as error:\n",
            ),
        ),
        also=(
            f"{FETCHING}test_a_bucket_of_the_worker_s_own_that_is_missing_is_waited_for",
            f"{FETCHING}test_a_bucket_that_only_the_job_names_and_that_does_not_exist_is_its_own_failure",
            f"{STORAGE}test_permanent_errors_differ_from_temporary_ones",
        ),
    ),
    Row(
        "C18",
        "an object is never answered for, and more jobs name it than the worker has places",
        "half of the places wait for it; the other jobs that name it go to the retry queue and others are drawn",
        tests=(
            f"{LIVE}test_object_that_never_arrives_blocks_half_of_the_lanes_and_other_jobs_are_drawn",
            "tests/worker/jobs/inputs/test_slow_fetches.py::test_waits_for_an_object_that_never_arrives_are_limited",
        ),
        without=(
            Mutation(
                "worker/jobs/inputs/slow_fetches.py",
                "has_slow_place = self._slow.total() < self._num_slow",
                "has_slow_place = True",
            ),
        ),
        also=(
            "tests/worker/jobs/inputs/test_slow_fetches.py::test_an_object_known_to_be_slow_is_not_waited_for_where_no_more_may_wait",
        ),
    ),
    Row(
        "C19",
        "what the store sends is damaged or cut short, time and again",
        "trouble of the store: the job is tried again later, and fails for want of the store, not for its input",
        tests=(f"{FETCHING}test_download_damaged_by_the_store_does_not_fail_the_job",),
        without=(
            Mutation(
                "worker/jobs/inputs/fetcher.py",
                "        except ImageInvalid as error:",
                "        except (ObjectChanged.__base__, ImageInvalid) as error:",
            ),
        ),
        also=(f"{STORAGE}test_body_that_stays_damaged_is_an_error_after_three_tries",),
    ),
    Row(
        "C20",
        "the store's ETags look like MD5s and are none",
        "bytes that come twice the same are the store's own; a header made for it is believed before the ETag",
        tests=(f"{STORAGE}test_a_body_that_comes_twice_the_same_is_whole_and_its_etag_no_md5",),
        without=(
            Mutation("clients/storage/digest.py", " or md5 == expected or md5 in self._refused", " or md5 == expected"),
        ),
        also=(f"{STORAGE}test_an_etag_that_is_no_md5_is_not_taken_for_one",),
    ),
    Row(
        "C21",
        "a write is answered by something that neither refuses nor confirms it: an interim answer, a proxy's page",
        "what lies under the key is read back: written, taken by another, or to be tried again",
        tests=(
            f"{STORAGE}test_a_conditional_write_that_nothing_confirms_is_read_back",
            f"{STORAGE}test_write_that_failed_is_an_error_whatever_the_answer",
        ),
        without=(Mutation("clients/storage/upload.py", '    return "ETag" in answer\n', "    return True\n"),),
        also=(f"{STORAGE}test_an_error_inside_a_good_answer_to_a_write_is_an_error",),
    ),
    Row(
        "C22",
        "the store is Google's, which passes over If-None-Match on a write",
        "requests go in Google's dialect, whose own condition lets one of two writers win",
        tests=(
            f"{GOOGLE}test_conditional_write_by_many_writers_succeeds_once_by_google_s_generation_match",
            f"{GOOGLE}test_ledger_has_conditional_writes_and_the_probe_finds_them",
        ),
        without=(Mutation("clients/storage/google.py", 'kept[IF_GENERATION] = "0"', "pass"),),
        also=(
            "tests/live/test_google.py::test_a_job_is_drawn_stored_and_recorded_once_behind_google_s_condition",
            f"{GOOGLE}test_image_is_not_cached_without_revalidation",
        ),
    ),
    Row(
        "C23",
        "two workers on one host have one folder for their downloads",
        "each locks one of its own inside it, so that none evicts what another uses; a killed worker's is free at once",
        tests=(
            f"{CACHE}test_a_second_cache_has_a_folder_of_its_own_until_the_first_is_gone",
            f"{CACHE}test_a_worker_s_folder_is_free_once_its_process_was_killed",
        ),
        without=(
            Mutation(
                "clients/storage/locked_folder.py", "fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass"
            ),
        ),
        also=("tests/live/test_sharing.py::test_two_workers_share_forty_jobs_within_a_fifth_of_evenly",),
    ),
)
