"""The backend, and the way to it."""

from tests.mutations.row import Mutation, Row

FILE = "tests/live/test_faults_backend.py"
RESULTS = "tests/live/test_results.py"
REAL_ENGINE = "tests/live/test_faults.py"
ANSWERS = "tests/clients/test_responses.py"
CLIENT = "tests/clients/test_webhooks.py"
REFUSING = f"{FILE}::test_backend_that_refuses_the_worker_stops_drawing_until_it_accepts_again"
PAUSED = f"{FILE}::test_retry_after_of_the_backend_is_obeyed"
OUTBOX = "tests/worker/results/test_notifier.py"
PACING = "tests/worker/results/test_pacing.py"
REFUSALS = "tests/worker/results/test_address_breaker.py"
NEVER_TAKEN = f"{FILE}::test_events_never_taken_delay_none_that_an_outage_parked"
EVERY_END = f"{FILE}::test_backend_that_refuses_every_end_stops_drawing_and_gets_the_ends_later"
CUT_OFF = f"{ANSWERS}::test_incomplete_response_head_is_ambiguous"
FOR_GOOD = f"{FILE}::test_event_refused_for_good_is_sent_once_and_dead_lettered"
PROGRESS = f"{FILE}::test_progress_that_is_not_taken_delays_no_end_and_never_follows_it"

ROWS: tuple[Row, ...] = (
    Row(
        name="D1",
        fault="it fails three times, then listens",
        answer="four calls of one id and one body, after waits that grow",
        tests=(f"{FILE}::test_end_refused_three_times_is_redelivered_unchanged_after_growing_waits",),
        without=(
            Mutation(
                "worker/results/notifier.py",
                "planned = DELAYS_SECONDS[min(num_attempts, len(DELAYS_SECONDS)) - 1]",
                "planned = 0.0",
            ),
        ),
        also=(f"{REAL_ENGINE}::test_a_server_error_is_tried_again_under_the_same_webhook_id",),
    ),
    Row(
        name="D2",
        fault="it fails for ever",
        answer="the event waits in the outbox and no job for it; a dead letter after a day",
        tests=(f"{FILE}::test_backend_that_always_fails_delays_no_job_and_leaves_a_dead_letter_after_a_day",),
        without=(
            Mutation(
                "worker/results/notifier.py",
                "patience = 0.0 if event.kind in self._failing else PATIENCE_SECONDS",
                "patience = 3600.0",
            ),
        ),
    ),
    Row(
        name="D3",
        fault="it is down",
        answer="jobs go on; each end is told once it is back, and outlives a worker meanwhile",
        tests=(f"{FILE}::test_backend_that_is_down_delays_no_job_and_gets_each_end_once_it_is_back",),
        without=(
            Mutation(
                "clients/webhooks.py",
                "return WebhookAttempt(WebhookResult.RETRY, None, None, reason, timer.was_sent)",
                "return WebhookAttempt(WebhookResult.REJECTED, None, None, reason, timer.was_sent)",
            ),
        ),
        also=(
            f"{REAL_ENGINE}::test_jobs_go_on_while_the_backend_is_down_and_each_end_arrives_later",
            f"{REAL_ENGINE}::test_events_in_the_outbox_outlive_the_worker_that_put_them_there",
            "tests/live/test_outage.py::test_outage_of_the_backend_delays_no_image_and_every_end_arrives",
        ),
    ),
    Row(
        name="D4",
        fault="it takes the call and never answers, or answers a byte at a time",
        answer="the call ends in 20 seconds all told and is made again",
        tests=(
            f"{FILE}::test_call_to_a_hanging_backend_times_out_and_is_delivered_later",
            f"{FILE}::test_dripping_answer_ends_with_the_call_and_the_end_is_redelivered",
        ),
        without=(Mutation("clients/deadline.py", "TIMEOUTS.call_after(seconds,", "TIMEOUTS.call_after(3600,"),),
        also=(
            f"{CLIENT}::test_silence_ends_at_the_deadline_and_is_ambiguous",
            f"{CLIENT}::test_dripping_headers_end_at_the_deadline_and_are_ambiguous",
            f"{CLIENT}::test_a_dripping_body_ends_at_the_deadline_and_the_status_counts",
        ),
    ),
    Row(
        name="D5",
        fault="it acts, and its answer is lost",
        answer="told again under the same id, and counted as ambiguous",
        tests=(f"{FILE}::test_end_whose_answer_was_lost_is_redelivered_under_the_same_id",),
        without=(
            Mutation(
                "clients/webhooks.py",
                '"webhook-id": webhook.webhook_id,',
                '"webhook-id": f"{webhook.webhook_id}:{time.time_ns()}",',
            ),
        ),
        also=(f"{CLIENT}::test_a_reset_after_the_request_is_ambiguous",),
    ),
    Row(
        name="D6",
        fault="it refuses the token",
        answer="not ready, no new work; every end is kept, and all goes on once the token is right",
        tests=(f"{REFUSING}[wrong_token]", f"{REFUSING}[forbidden]"),
        without=(Mutation("worker/results/notifier.py", "if attempt.status in REFUSING_STATUSES:", "if False:"),),
        also=("tests/live/test_breakers.py::test_backend_that_refuses_the_token_stops_consuming_until_it_accepts_it",),
    ),
    Row(
        name="D7",
        fault="it does not know the generation, yet or at all",
        answer="told again for a minute, then a dead letter",
        tests=(
            f"{FILE}::test_end_of_a_generation_unknown_yet_is_redelivered_until_it_is_taken",
            f"{FILE}::test_end_of_a_generation_never_known_becomes_a_dead_letter",
        ),
        without=(
            Mutation(
                "clients/webhooks.py",
                "RETRY_STATUSES = frozenset({401, 403, 404,",
                "RETRY_STATUSES = frozenset({401, 403,",
            ),
        ),
    ),
    Row(
        name="D8",
        fault="it refuses the event for good: 400, 409, 410, 422",
        answer="one call and a dead letter",
        tests=(f"{FOR_GOOD}[400]", f"{FOR_GOOD}[422]"),
        without=(
            Mutation(
                "clients/webhooks.py",
                'return WebhookAttempt(WebhookResult.REJECTED, status, None, f"HTTP {status}", False)',
                'return WebhookAttempt(WebhookResult.RETRY, status, None, f"HTTP {status}", False)',
            ),
        ),
        also=(
            f"{FOR_GOOD}[409]",
            f"{FOR_GOOD}[410]",
            f"{REAL_ENGINE}::test_a_backend_that_refuses_the_event_for_good_leaves_a_dead_letter",
        ),
    ),
    Row(
        name="D9",
        fault="it asks for a pause, in seconds, by a date or in nonsense",
        answer="left alone so long, but never longer than an hour, by the outbox too",
        tests=(f"{PAUSED}[seconds]", f"{PAUSED}[a date]"),
        without=(
            Mutation("worker/results/notifier.py", "return max(planned, retry_after_seconds or 0.0)", "return planned"),
        ),
        also=(
            f"{PAUSED}[nonsense]",
            f"{CLIENT}::test_retry_after_is_honoured_up_to_a_limit",
            f"{CLIENT}::test_retry_after_of_any_value_keeps_the_result",
        ),
    ),
    Row(
        name="D10",
        fault="it answers with a redirect to another host",
        answer="not followed: a dead letter that says so; the token goes nowhere",
        tests=(f"{FILE}::test_redirect_is_a_refusal_and_the_token_is_not_forwarded",),
        without=(Mutation("clients/webhooks.py", "adapter.send(prepared,", "session.send(prepared,"),),
        also=(f"{CLIENT}::test_a_redirect_is_not_followed",),
    ),
    Row(
        name="D11",
        fault="it takes progress slowly or not at all",
        answer="no step waits for it; reports rise, and none comes behind the end",
        tests=(f"{PROGRESS}[200-5.0]",),
        without=(
            Mutation(
                "worker/progress/reporter.py",
                "self._reporter.queue.offer(self, [self._webhook(milestone, report) for milestone in crossed])",
                "[self._reporter._send(self, self._webhook(milestone, report)) for milestone in crossed]",
            ),
        ),
        also=(
            f"{PROGRESS}[500-0.0]",
            "tests/worker/progress/test_reporter.py::test_a_slow_backend_does_not_hold_up_the_steps",
            "tests/worker/progress/test_reporter.py::test_close_waits_for_the_call_in_flight_and_nothing_is_sent_after_it",
        ),
    ),
    Row(
        name="D12",
        fault="it answers with a body of 200 MB",
        answer="64 kB of it are read; the status counts",
        tests=(f"{CLIENT}::test_a_long_body_is_cut_off",),
        without=(Mutation("clients/webhooks.py", "while num_bytes < MAX_BODY_BYTES and (chunk", "while (chunk"),),
    ),
    Row(
        name="D13",
        fault="its name is unknown, its certificate nobody's, or it speaks no TLS where it should",
        answer="told nothing, not even the token; tried again later",
        tests=(f"{CLIENT}::test_certificate_without_a_trusted_issuer_is_not_trusted",),
        without=(Mutation("clients/webhooks.py", "adapter.send(prepared,", "adapter.send(prepared, verify=False,"),),
        also=(
            f"{CLIENT}::test_an_unknown_host_had_no_effect",
            f"{FILE}::test_https_address_of_a_plain_http_server_gets_no_webhook",
        ),
    ),
    Row(
        name="D14",
        fault="a netrc file or a proxy in the worker's environment",
        answer="not read: the token stays ours and the way direct",
        tests=(f"{CLIENT}::test_the_environment_changes_nothing",),
        without=(Mutation("clients/webhooks.py", "session.trust_env = False", "session.trust_env = True"),),
    ),
    Row(
        name="D15",
        fault="interim answers, 100 to 199, come before its answer",
        answer="the final one counts, for the store as well; a switch of protocol that nobody asked for is no answer",
        tests=(
            f"{ANSWERS}::test_final_answer_decides_the_result_whatever_comes_before_it",
            f"{ANSWERS}::test_an_interim_answer_that_comes_alone_is_skipped",
        ),
        without=(
            Mutation("clients/deadline.py", "response_class: Any = FinalResponse", "_unused: Any = FinalResponse"),
        ),
        also=(
            f"{ANSWERS}::test_an_interim_answer_to_a_conditional_write_is_not_its_result",
            f"{ANSWERS}::test_a_final_answer_before_the_body_is_the_result_with_or_without_a_reason",
        ),
    ),
    Row(
        name="D16",
        fault="the connection ends inside the head of its answer",
        answer="no answer, so told again under the same id; a body cut off changes nothing",
        tests=(f"{CUT_OFF}[cut off behind the status]", f"{CUT_OFF}[cut off in a header]"),
        without=(
            Mutation(
                "clients/responses.py",
                'raise IncompleteHead("the connection ended inside the head of an answer")',
                "pass",
            ),
        ),
        also=(
            f"{CUT_OFF}[cut off in an interim answer]",
            f"{ANSWERS}::test_a_whole_head_of_2xx_is_delivered_whatever_its_body_is",
        ),
    ),
    Row(
        name="D17",
        fault="it redirects to what is no address, or with a body without end",
        answer="a refusal like any other, and the thread that asked goes on",
        tests=(f"{ANSWERS}::test_a_redirect_to_no_address_is_a_refusal_like_any_other",),
        without=(
            Mutation("clients/webhooks.py", "adapter.send(prepared,", "session.send(prepared, allow_redirects=False,"),
        ),
        also=(f"{ANSWERS}::test_the_body_of_a_redirect_is_cut_off_as_any_other",),
    ),
    Row(
        name="D18",
        fault="it never takes one end of a kind, by 500, 404, 503 with a pause, or a reset",
        answer="it goes behind the others, which are told within a minute of an outage's end, and is dead after a day",
        tests=(f"{OUTBOX}::test_events_never_taken_do_not_delay_others_of_their_kind",),
        without=(
            Mutation("worker/results/pacing.py", "self.due_at = now + jittered(planned)", "pass"),
            Mutation("worker/results/pacing.py", "(one.num_own_failures, one.rank, one.order)", "one.due_at"),
        ),
        also=(
            NEVER_TAKEN,
            f"{OUTBOX}::test_event_over_a_day_old_is_dead_lettered_however_far_its_next_turn",
            f"{OUTBOX}::test_event_that_times_out_delays_no_other_once_some_are_taken",
            f"{PACING}::test_events_after_an_outage_are_delivered_within_a_minute_beside_known_failures",
            f"{PACING}::test_new_event_beside_a_known_failure_is_sent_at_once",
            "tests/campaigns/test_campaigns.py::test_a_campaign_loses_nothing_and_does_nothing_twice[kill]",
        ),
    ),
    Row(
        name="D19",
        fault="as many ends that it never takes are in hand as the broker gives at once",
        answer="each that failed goes to the tail of the queue by a confirmed copy, and those behind come in",
        tests=(f"{OUTBOX}::test_failed_event_goes_to_the_tail_of_the_queue_when_the_prefetch_is_full",),
        without=(Mutation("worker/results/kind_queue.py", "if self._is_full():", "if False:"),),
        also=(NEVER_TAKEN,),
    ),
    Row(
        name="D20",
        fault="it comes back from an outage in which as many ends were parked that it never takes as others",
        answer="its first answer, whatever it says, gives every end one try: all others are told within a minute",
        tests=(f"{PACING}::test_events_after_an_outage_are_delivered_within_a_minute_beside_failures_parked_in_it",),
        without=(
            Mutation("worker/results/pacing.py", "self._num_allowed = max(FAILURES_BEFORE_PAUSE, num_parked)", "pass"),
        ),
    ),
    Row(
        name="D21",
        fault="it refuses every end: 400 for its ALLOWED_HOSTS, 404 for a path twice in its address, redirects",
        answer="after five in a row not ready, with what to look at; no new work, and no end more is a dead letter",
        tests=(
            f"{EVERY_END}[400-ALLOWED_HOSTS]",
            f"{REFUSALS}::test_ends_refused_in_a_row_open_the_breaker_and_stop_dead_lettering",
        ),
        without=(
            Mutation(
                "worker/results/address_breaker.py",
                "return len(self._refused.get(setting, ())) >= REFUSALS_TO_OPEN",
                "return False",
            ),
        ),
        also=(
            f"{EVERY_END}[404-BACKEND_API_URL]",
            f"{REFUSALS}::test_accepted_end_resets_the_count",
        ),
    ),
    Row(
        name="D22",
        fault="it is down, and hundreds of ends are parked",
        answer="it is asked with one of them each half minute",
        tests=(f"{PACING}::test_backend_without_a_connection_is_tried_with_one_event_each_half_minute",),
        without=(
            Mutation(
                "worker/results/pacing.py",
                "            self._is_unavailable = True\n            self._pause(now)\n",
                "            self._is_unavailable = True\n",
            ),
        ),
        also=(f"{PACING}::test_backend_that_fails_all_is_tried_with_a_few_events_each_half_minute",),
    ),
    Row(
        name="D23",
        fault="it is down for longer than a presigned address of the parked event's picture lasts",
        answer="the address is signed as the event is sent, and opens",
        tests=(f"{RESULTS}::test_event_parked_for_longer_than_an_address_lasts_is_sent_with_one_that_opens",),
        without=(
            Mutation(
                "worker/results/image_store.py",
                "return self.storage.public_url(ref)",
                "return self.storage.result_url(ref)",
            ),
            Mutation("worker/results/notifier.py", "webhook = self.urls.webhook_of(event)", "webhook = event.webhook"),
        ),
        also=(
            "tests/worker/results/test_result_urls.py::test_every_image_of_the_event_is_presigned_and_the_event_is_not_changed",
        ),
    ),
    Row(
        name="D24",
        fault="the address of its own that one kind has is wrong, and the other kind's is right",
        answer="what the right one takes closes nothing: not ready, with the setting, and no end more is a dead letter",
        tests=(
            f"{REFUSALS}::"
            "test_address_that_refuses_every_end_opens_the_breaker_while_another_address_accepts_its_own[405]",
            f"{REFUSALS}::test_parked_end_is_no_dead_letter_after_another_address_accepted_an_end",
        ),
        without=(
            Mutation("worker/results/address_breaker.py", "self._refused.pop(setting, None)", "self._refused.clear()"),
        ),
        also=(f"{REFUSALS}::test_two_addresses_that_refuse_every_end_are_both_named_and_share_their_trials",),
    ),
    Row(
        name="D25",
        fault="the host of its own that one kind is sent to refuses the token, and the other kind's accepts it",
        answer="what the other one accepts closes nothing: not ready, with the setting",
        tests=(
            f"{REFUSALS}::test_token_that_one_address_refuses_opens_its_breaker_while_another_address_accepts_it",
            "tests/worker/test_breakers.py::"
            "test_addresses_of_the_backend_share_a_breaker_where_they_have_one_origin[host]",
        ),
        without=(
            Mutation(
                "worker/results/notifier.py",
                "self._breakers[attempt.setting].accept()",
                "[breaker.accept() for breaker in self._breakers.values()]",
            ),
            Mutation(
                "clients/webhooks.py",
                'return parts.scheme, parts.hostname or "", parts.port or PORTS[parts.scheme]',
                'return "", "", 0',
            ),
        ),
    ),
)
