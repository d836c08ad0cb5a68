"""The worker's processes, and the machine below them."""

from tests.mutations.row import Mutation, Row

LIVE = "tests/live/test_faults_process.py::"
REAL_ENGINE = "tests/live/test_faults.py::"
ENGINE = "tests/inference/process/test_engine_process.py::"
BATCHING = "tests/inference/engine/test_batching_faults.py::"
HEALTH = "tests/worker/monitoring/test_http_server.py::"
PARITY = "tests/inference/models/test_parity.py::"
EFFECT = "tests/live/test_effect.py::"
THAWS = f"{EFFECT}test_worker_that_resumes_changes_no_image_and_repeats_no_end"
TWO_GENERATIONS = f"{EFFECT}test_a_task_id_of_two_generations_gives_each_its_own_end"
OTHER_DATA = f"{EFFECT}test_task_id_with_other_data_has_one_end_and_a_warning_in_the_log"
KILLED = f"{LIVE}test_a_worker_killed_at_any_point_leaves_one_end_and_one_whole_image"

ROWS: tuple[Row, ...] = (
    Row(
        "B1",
        "a worker is killed at any of eleven points between the download and the ack",
        "the next one goes on where the record says: one end, one whole picture, no rest",
        tests=(f"{KILLED}[behind_the_record]", f"{KILLED}[before_the_webhook]", f"{KILLED}[before_the_ack]"),
        without=(Mutation("worker/jobs/handler.py", "if end is None:", "if True:"),),
        also=(
            KILLED,
            f"{LIVE}test_a_worker_killed_while_it_makes_the_png_leaves_one_end",
            f"{REAL_ENGINE}test_a_killed_worker_leaves_its_job_to_the_next_one",
        ),
    ),
    Row(
        "B2",
        "the engine is killed in the middle of a job",
        "its worker starts another and has the job drawn again, without a word to the broker",
        tests=(f"{LIVE}test_killed_engine_costs_its_job_a_second_run_and_nothing_else",),
        without=(
            Mutation("inference/process/quarantine.py", "if self._weights[victim] < POISON_WEIGHT:", "if False:"),
        ),
        also=(
            f"{REAL_ENGINE}test_killed_engine_costs_its_job_a_second_run_and_nothing_else",
            f"{ENGINE}test_crash_that_no_suspect_repeats_alone_fails_no_request",
        ),
    ),
    Row(
        "B3",
        "a job crashes every engine it is in",
        "it fails after dying twice alone, a copy is kept, and those beside it complete",
        tests=(f"{LIVE}test_a_job_that_ends_the_engine_every_time_fails_alone[poison]",),
        without=(Mutation("inference/process/quarantine.py", "if self._weights[victim] < POISON_WEIGHT:", "if True:"),),
        also=(
            "tests/live/drawing/test_batching.py::test_poison_job_fails_alone_and_the_nine_others_of_its_batch_complete",
            f"{REAL_ENGINE}test_a_job_that_kills_the_engine_every_time_fails_alone",
            f"{ENGINE}test_poison_among_nine_others_is_found_with_three_processes_and_fails_alone",
        ),
    ),
    Row(
        "B4",
        "a job takes every worker down with it",
        "counted by the broker, it fails after eleven workers, and its backend is told",
        tests=(f"{REAL_ENGINE}test_a_job_that_eleven_workers_were_killed_with_is_tried_no_more",),
        without=(Mutation("worker/jobs/handler.py", "if run.num_recoveries > MAX_RECOVERIES:", "if False:"),),
        also=(f"{LIVE}test_job_that_kills_every_worker_is_given_up_and_reported_to_the_backend",),
    ),
    Row(
        "B5",
        "a worker is killed and leaves an engine that hangs",
        "the kernel ends the engine within a second, and its job is the next worker's",
        tests=(f"{LIVE}test_an_engine_that_hangs_dies_with_its_worker_and_ends_no_job",),
        without=(Mutation("inference/process/child.py", "    die_with_parent(int(sys.argv[2]))\n", ""),),
        also=(f"{REAL_ENGINE}test_a_killed_worker_leaves_its_job_to_the_next_one",),
    ),
    Row(
        "B6",
        "SIGTERM to a worker that has nothing to do",
        "gone with exit code 0 within two seconds",
        tests=(f"{LIVE}test_an_idle_worker_ends_without_delay",),
        without=(Mutation("worker/supervisor.py", "while not self._num_signals:", "while True:"),),
    ),
    Row(
        "B7",
        "SIGTERM in the middle of a job that ends within the grace",
        "the job completes, nobody is given another one, exit code 0",
        tests=(f"{LIVE}test_a_job_that_ends_within_the_grace_is_the_last_one_of_its_worker",),
        without=(
            Mutation(
                "worker/supervisor.py",
                "while self._parts.runs.all() and time.monotonic() < deadline:",
                "while False:",
            ),
        ),
        also=(f"{REAL_ENGINE}test_sigterm_lets_the_running_job_end_and_gives_the_waiting_ones_back",),
    ),
    Row(
        "B8",
        "SIGTERM in the middle of a job that is longer than the grace",
        "the job goes back in time, unfailed, and another worker completes it",
        tests=(f"{LIVE}test_job_longer_than_the_grace_is_given_to_another_worker",),
        without=(
            Mutation(
                "worker/jobs/disposition.py",
                "return Decision(Disposition.RELEASE)",
                'return Decision(Disposition.ACK, ErrorCode.INTERNAL_ERROR, "the worker stopped")',
            ),
        ),
        also=(
            f"{REAL_ENGINE}test_sigterm_with_a_job_longer_than_the_grace_period_gives_it_back",
            "tests/worker/cli/test_commands.py::test_hanging_store_does_not_keep_the_worker_beyond_its_grace",
        ),
    ),
    Row(
        "B9",
        "a second signal; one while the model loads; one to the first process of a container",
        "ends at once, and leaves neither an engine nor a zombie",
        tests=(
            f"{LIVE}test_a_second_interrupt_ends_a_busy_worker_at_once",
            f"{REAL_ENGINE}test_a_second_signal_ends_at_once",
        ),
        without=(Mutation("worker/supervisor.py", "if self._num_signals > 1:", "if False:"),),
        also=(
            f"{REAL_ENGINE}test_sigterm_while_the_model_is_loading_ends_at_once",
            f"{LIVE}test_worker_as_pid_1_ends_by_sigterm_and_leaves_no_zombie",
        ),
    ),
    Row(
        "B10",
        "a worker is frozen until another one has done its job, and thaws",
        "its own run meets the record and tells nobody anything",
        tests=(f"{LIVE}test_a_worker_frozen_for_long_finds_that_its_job_has_ended",),
        without=(
            Mutation("worker/results/notifier.py", "if event.is_delivered:", "if False:"),
            Mutation(
                "worker/results/notifier.py",
                "is_delivered = (bool(attempts) or is_old) and self._ledger.is_delivered(event)",
                "is_delivered = False",
            ),
        ),
        also=(f"{REAL_ENGINE}test_a_record_in_the_ledger_wins_over_a_second_worker",),
    ),
    Row(
        "B11",
        "the engine hangs in a step",
        "its silence is noticed, it is replaced; a job that hangs it twice alone fails",
        tests=(f"{LIVE}test_a_job_that_hangs_the_engine_twice_fails_as_timed_out",),
        without=(Mutation("inference/process/engine_process.py", "if self._is_hung():", "if False:"),),
        also=(
            f"{ENGINE}test_an_engine_that_falls_silent_is_killed_and_the_request_drawn_by_the_next",
            f"{ENGINE}test_a_request_that_hangs_alone_twice_fails_as_hung",
            f"{ENGINE}test_a_hang_among_others_is_found_as_a_crash_is",
        ),
    ),
    Row(
        "B12",
        "the GPU's memory does not hold the batch, or not even one picture",
        "half the lanes, then half of those; decoded in tiles; one too large fails by its size",
        tests=(f"{BATCHING}test_lanes_that_do_not_fit_are_halved_and_the_cap_holds_for_a_while",),
        without=(
            Mutation(
                "inference/engine/batch_runner.py",
                "while isinstance(guarded.error, torch.OutOfMemoryError) and len(batch) > 1:",
                "while False:",
            ),
        ),
        also=(
            f"{BATCHING}test_an_image_that_does_not_fit_alone_fails_by_its_size_and_smaller_ones_beside_it_and_after_it_are_drawn",
            f"{BATCHING}test_an_image_too_large_to_decode_is_decoded_in_tiles_and_the_next_one_whole",
            f"{PARITY}test_running_out_of_memory_fails_the_request_and_the_next_one_runs",
        ),
    ),
    Row(
        "B13",
        "the device answers nothing any more, as after a sticky CUDA error",
        "the engine leaves without an answer; all that was inside is tried again in a new one",
        tests=(f"{LIVE}test_a_job_that_ends_the_engine_every_time_fails_alone[break]",),
        without=(Mutation("inference/process/child.py", "if engine.is_broken:", "if False:"),),
        also=(
            f"{BATCHING}test_a_device_that_answers_nothing_ends_every_request_and_the_engine",
            f"{ENGINE}test_broken_engine_returns_no_result_and_its_requests_are_retried",
            f"{ENGINE}test_faults_in_a_row_end_the_child_and_make_no_suspects",
        ),
    ),
    Row(
        "B14",
        "a GPU is asked for and there is none",
        "the worker says so and ends before it takes a job",
        tests=(
            f"{LIVE}test_a_gpu_that_is_missing_ends_the_worker_before_it_takes_a_job",
            f"{PARITY}test_configured_gpu_that_is_missing_is_refused_at_the_start",
        ),
        without=(
            Mutation(
                "inference/engine/local_engine.py",
                'if name.startswith("cuda"):',
                "if False:",
            ),
        ),
    ),
    Row(
        "B15",
        "what comes out are not numbers",
        "no picture is made of it: the job fails, the next one completes",
        tests=(
            f"{LIVE}test_image_of_nan_is_never_stored",
            f"{PARITY}test_image_of_nan_is_never_returned",
        ),
        without=(
            Mutation(
                "inference/device/decoded_image.py",
                "numpy() if host[-1] else None",
                "numpy()",
            ),
        ),
        also=(f"{PARITY}test_checkpoint_that_draws_nan_is_refused_at_the_start",),
    ),
    Row(
        "B16",
        "the model is missing, damaged or of another family",
        "the worker says why and ends before it takes a job",
        tests=(f"{LIVE}test_an_engine_that_cannot_load_its_model_ends_the_worker_before_it_takes_a_job",),
        without=(Mutation("worker/supervisor.py", "if engine.state is EngineState.FAILED:", "if False:"),),
        also=(
            f"{REAL_ENGINE}test_a_model_that_cannot_be_loaded_ends_the_worker_before_it_takes_a_job",
            "tests/inference/checkpoints/test_checkpoints.py::test_damage_is_named_with_its_file",
        ),
    ),
    Row(
        "B17",
        "hundreds of jobs with many more adapters than slots",
        "memory stays flat, and no picture shows a trace of the style before it",
        tests=("tests/live/drawing/test_jobs.py::test_a_job_without_an_adapter_shows_no_trace_of_the_style_before_it",),
        without=(
            Mutation(
                "inference/lora/bank.py",
                "group.products = products.get(group)",
                "group.products = products.get(group, group.products)",
            ),
        ),
        also=("tests/live/test_leaks.py::test_many_adapters_in_few_slots_leave_no_trace_in_memory_or_images",),
    ),
    Row(
        "B18",
        "a worker thaws whose job has ended elsewhere, and a newer task of the same generation too",
        "it finds its job's end before it stores anything: the newer picture stays",
        tests=(f"{THAWS}[in_a_step]", f"{THAWS}[before_the_image]", f"{THAWS}[between_two_images]"),
        without=(
            Mutation(
                "worker/results/image_store.py",
                "        if end is not None:\n            raise AlreadyEnded(end)\n",
                "        pass\n",
            ),
        ),
        also=(f"{THAWS}[in_the_image]",),
    ),
    Row(
        "B19",
        "it was frozen in the middle of replacing an earlier picture",
        "the store takes the write only over the very picture that was looked at",
        tests=("tests/clients/storage/test_client.py::test_object_replaced_or_deleted_after_head_is_not_overwritten",),
        without=(Mutation("clients/storage/client.py", '{"IfMatch": etag}', '{"IfMatch": "*"}'),),
        # A worker that was frozen for longer than a call may take has its connection shut before the store can decide.
        also=(f"{THAWS}[in_the_replacement]",),
    ),
    Row(
        "B20",
        "it was frozen between the record and the webhook, before it last looked at the record",
        "it looks whether the end was reported since: one call; frozen behind that look, it repeats the webhook-id",
        tests=(f"{THAWS}[behind_the_record]",),
        without=(Mutation("worker/results/notifier.py", "(bool(attempts) or is_old)", "bool(attempts)"),),
    ),
    Row(
        "B21",
        "the store takes no record of a failure for all tries of its job, then the same message comes again",
        "the failure waits in the outbox until it is recorded; whichever end is recorded first is the only one",
        tests=(f"{EFFECT}test_a_failure_that_cannot_be_recorded_is_reported_once_the_store_records_it",),
        without=(Mutation("worker/jobs/runner.py", "unrecorded = str(error)", "pass"),),
        also=(f"{EFFECT}test_a_failure_that_was_not_recorded_gives_way_to_the_same_message_s_completion",),
    ),
    Row(
        "B22",
        "two generations' messages have one task_id",
        "the second is done under an id of its own: two ends",
        tests=(f"{TWO_GENERATIONS}[at_once]", f"{TWO_GENERATIONS}[one_after_the_other]"),
        without=(
            Mutation(
                "worker/messages/identity.py", "if str(job.generation_id) != str(known_generation_id):", "if False:"
            ),
        ),
        also=(f"{EFFECT}test_a_job_whose_task_id_another_worker_recorded_for_another_generation_ends_under_its_own",),
    ),
    Row(
        "B23",
        "two messages of one generation have one task_id and other data",
        "one end, and a line in the log that says what was dropped",
        tests=(f"{OTHER_DATA}[at_once]", f"{OTHER_DATA}[one_after_the_other]"),
        without=(
            Mutation(
                "worker/messages/identity.py",
                "if known_fingerprint and known_fingerprint != fingerprint(body):",
                "if False:",
            ),
        ),
    ),
    Row(
        "B24",
        "a lease note that no worker wrote: nested deeply, huge numbers, until the year 9999",
        "it counts as none: the job is done",
        tests=(f"{EFFECT}test_foreign_lease_note_keeps_no_job[far_ahead]",),
        without=(
            Mutation("worker/jobs/leases.py", " or until > time.time() + MAX_VALID_SECONDS + MAX_SKEW_SECONDS", ""),
        ),
        also=(f"{EFFECT}test_foreign_lease_note_keeps_no_job[deep]",),
    ),
    Row(
        "B25",
        "a record that no worker wrote",
        "an end that cannot be read: a dead letter that says so, nothing drawn, nothing reported",
        tests=(f"{EFFECT}test_foreign_ledger_record_makes_its_job_a_dead_letter[too_long]",),
        without=(
            Mutation(
                "worker/results/ledger.py",
                'raise RecordUnreadable(f"{ref}: {error}") from error',
                'raise ObjectDamaged(f"{ref}: {error}") from error',
            ),
        ),
        # Where one of them fails its job goes round, and the next is not set up.
        also=(f"{EFFECT}test_foreign_ledger_record_makes_its_job_a_dead_letter[list]",),
    ),
    Row(
        "B26",
        "a job's pictures do not fit the supervisor's memory",
        "they are read past, and the job fails by its size at the second try; no worker ends",
        tests=(f"{EFFECT}test_result_beyond_the_supervisor_s_memory_fails_its_job_and_no_worker",),
        without=(Mutation("inference/process/pixels.py", "except MemoryError:", "except ZeroDivisionError:"),),
    ),
    Row(
        "B27",
        "the GPU's memory has no room for what a job loads: an adapter, a ControlNet, its prompts",
        "it waits, beside smaller batches, and is drawn; alone it fails by the name of what does not fit",
        tests=(
            f"{BATCHING}test_an_adapter_that_found_no_memory_once_is_drawn_right_at_the_next_try",
            f"{BATCHING}test_an_adapter_that_finds_no_memory_alone_either_fails_by_its_name_and_the_others_are_drawn_right",
        ),
        without=(
            Mutation(
                "inference/engine/step_loop.py",
                "if isinstance(guarded.error, torch.OutOfMemoryError):\n            answer = ",
                "if False:\n            answer = ",
            ),
        ),
        also=(
            f"{BATCHING}test_a_request_that_finds_no_memory_beside_others_waits_and_is_drawn_right[encode]",
            "tests/inference/engine/test_controlnets.py::test_controlnet_without_memory_is_loaded_once_there_is_some_or_fails_by_its_name",
        ),
    ),
    Row(
        "E1",
        "the disk is full",
        "no half file is left, and the job is tried again, by another worker as well",
        tests=(f"{LIVE}test_a_full_disk_leaves_no_half_file_and_the_job_to_another_worker",),
        without=(Mutation("clients/storage/cache.py", "part.unlink(missing_ok=True)", "pass"),),
        also=("tests/clients/storage/test_cache.py::test_full_disk_is_an_error_and_leaves_no_partial_file",),
    ),
    Row(
        "E2",
        "the cache cannot be written, or holds what a killed worker left",
        "the worker says so and ends before it takes a job; parts are never taken for files",
        tests=(f"{LIVE}test_a_cache_that_cannot_be_written_ends_the_worker_before_it_takes_a_job",),
        without=(Mutation("clients/storage/cache.py", "with self._part():\n", "if True:\n"),),
        also=(
            f"{KILLED}[in_download]",
            "tests/clients/storage/test_cache.py::test_only_stale_parts_are_removed_at_the_start",
            "tests/clients/storage/test_cache.py::test_a_file_of_the_wrong_size_is_fetched_again",
        ),
    ),
    Row(
        "E3",
        "the process may open no more files or connections",
        "the job is tried again, and the worker goes on once it may",
        tests=(f"{LIVE}test_a_worker_without_a_descriptor_to_spare_ends_no_job_and_goes_on_once_it_has_some",),
        without=(
            Mutation(
                "worker/jobs/disposition.py",
                "return _retry(attempt, ErrorCode.STORAGE_UNAVAILABLE, ",
                "return Decision(Disposition.ACK, ErrorCode.STORAGE_UNAVAILABLE, ",
            ),
        ),
    ),
    Row(
        "E4",
        "the wall clock jumps by an hour, either way",
        "no wait changes, nothing is cut short, ends in the outbox arrive as they would",
        tests=(f"{LIVE}test_a_clock_that_jumps_changes_no_wait_and_no_end",),
        without=(
            Mutation(
                "worker/supervisor.py",
                "import time\nfrom collections.abc",
                "import time\n\ntime.monotonic = time.time\nfrom collections.abc",
            ),
        ),
    ),
    Row(
        "E5",
        "nobody reads the log any more, or its pipe is closed",
        "lines wait, and are dropped and counted; no job and no exit waits for them",
        tests=(f"{LIVE}test_blocked_log_delays_no_job_and_no_end[blocked]",),
        without=(
            Mutation(
                "config/logs.py",
                "        line = self.format(record)\n",
                "        line = self.format(record)\n        os.write(self._descriptor, line.encode())\n",
            ),
        ),
        also=(
            f"{LIVE}test_blocked_log_delays_no_job_and_no_end[closed]",
            "tests/config/test_logs.py::test_a_closed_standard_output_does_not_end_the_job",
            "tests/config/test_logs.py::test_full_pipe_blocks_nothing_and_dropped_lines_are_counted",
        ),
    ),
    Row(
        "E10",
        "hundreds of connections to the metrics port ask nothing, or a byte at a time, and come again when cut",
        "probes are answered: a new connection takes the place of the one longest without an answer",
        tests=(f"{HEALTH}test_probes_are_answered_beside_clients_that_drip_and_come_again",),
        without=(
            Mutation(
                "worker/monitoring/bounded_server.py",
                "if not self._connection_slots.acquire(blocking=False):",
                "if False:",
            ),
        ),
        # Behind a failed one the next counts its leftover threads as its own.
        also=(
            f"{HEALTH}test_probes_are_answered_beside_any_number_of_idle_connections",
            f"{HEALTH}test_a_request_that_takes_too_long_is_cut_however_often_a_byte_comes",
        ),
    ),
    Row(
        "E11",
        "clients of the metrics port leave before their answer, or send what is no request",
        "an answer where one can be given, and no traceback between the lines of the log",
        tests=(f"{HEALTH}test_clients_that_leave_before_their_answer_print_no_traceback",),
        without=(
            Mutation(
                "worker/monitoring/bounded_server.py",
                'logger.exception("a request to the metrics port failed")',
                "pass\n        super().handle_error(request, client_address)",
            ),
        ),
        also=(
            f"{HEALTH}test_odd_requests_have_one_answer_and_print_no_traceback",
            f"{HEALTH}test_fuzzed_requests_print_no_traceback",
        ),
    ),
    Row(
        "E12",
        "the worker is started in a folder that holds a config.py, a json.py or other modules of such names",
        "its children find their own modules, as it does: the working directory is not on their path",
        tests=(
            f"{LIVE}test_a_worker_started_in_a_folder_of_modules_with_its_own_names_draws",
            "tests/worker/product/test_product.py::test_invalid_model_is_retried_and_reported_in_a_folder_of_modules_with_our_names",
        ),
        without=(
            Mutation("inference/process/child_handle.py", 'variables = {"PYTHONSAFEPATH": "1"}', "variables = {}"),
        ),
    ),
)
