"""The broker, and the way to it."""

from tests.mutations.row import Mutation, Row

FILE = "tests/live/test_faults_broker.py"
LOST = f"{FILE}::test_a_connection_lost_in_mid_job_is_adopted_and_no_tag_of_the_lost_session_is_sent"
RESTARTED = f"{FILE}::test_a_broker_restarted_in_mid_job_has_kept_every_message_and_nothing_is_drawn_twice"
REAL_ENGINE = "tests/live/test_faults.py"
RETURNS = "tests/live/test_returns.py"
QUEUES = "tests/live/test_queues.py"
INTAKE = "tests/worker/amqp/test_intake.py"
UNUSABLE = (
    "tests/worker/amqp/test_job_queues.py"
    "::test_a_queue_that_cannot_be_used_is_left_out_and_joins_the_session_once_it_can"
)

ADOPTING = Mutation("worker/jobs/runs.py", "            if known is not None:\n", "            if False:\n")

ROWS: tuple[Row, ...] = (
    Row(
        name="A1",
        fault="an operator closes every connection in the middle of a job",
        answer="the job goes on, its redelivered message is adopted, it is drawn and told once",
        tests=(f"{LOST}[closed]",),
        without=(ADOPTING,),
        also=(
            f"{REAL_ENGINE}::test_a_connection_closed_in_mid_job_is_adopted_and_nothing_runs_twice",
            "tests/live/test_leases.py::test_a_lost_connection_of_one_of_two_workers_costs_no_second_run",
        ),
    ),
    Row(
        name="A2",
        fault="the consuming connection is reset in the middle of a job",
        answer="a new connection within two seconds, and as above",
        tests=(f"{LOST}[reset]",),
        without=(
            Mutation(
                "worker/amqp/connection.py",
                "seconds = random.uniform(MIN_BACKOFF_SECONDS / 2, self._ceiling)",
                "seconds = 30.0",
            ),
        ),
    ),
    Row(
        name="A3",
        fault="the broker is stopped and started in the middle of a job",
        answer="no message of ours is gone; the worker comes back by itself and draws nothing twice",
        tests=(f"{RESTARTED}[stopped]",),
        without=(
            Mutation(
                "worker/amqp/consumer.py",
                "        while not self._is_closing:\n            try:\n",
                "        for _ in range(1):\n            try:\n",
            ),
        ),
    ),
    Row(
        name="A4",
        fault="the broker is killed and started in the middle of a job",
        answer="as above",
        tests=(f"{RESTARTED}[killed]",),
        without=(ADOPTING,),
        also=(f"{REAL_ENGINE}::test_a_broker_restarted_in_mid_job_changes_nothing_for_the_backend",),
    ),
    Row(
        name="A5",
        fault="a job takes longer than the broker waits for an ack",
        answer="its message goes on lease in time; a channel closed all the same is noticed, its job adopted",
        tests=(
            f"{FILE}::test_a_job_longer_than_the_broker_waits_goes_on_lease_and_keeps_its_connection",
            f"{FILE}::test_a_channel_that_the_broker_closed_is_noticed_and_its_job_adopted",
        ),
        without=(
            Mutation(
                "worker/jobs/leases.py",
                "self._lease_after = consumer_timeout_seconds * LEASE_AFTER_SHARE",
                'self._lease_after = float("inf")',
            ),
            Mutation(
                "worker/amqp/consumer.py",
                " or not all(channel.is_open for channel in self._channels.values()):",
                ":",
            ),
        ),
        also=(
            "tests/live/test_leases.py::test_a_job_longer_than_the_broker_waits_runs_once_beside_another_worker",
            f"{REAL_ENGINE}::test_heartbeats_flow_through_a_job_longer_than_the_broker_would_wait",
        ),
    ),
    Row(
        name="A6",
        fault="the broker freezes and thaws",
        answer="pictures are stored and told meanwhile; the silence is noticed; nothing is drawn twice",
        tests=(f"{FILE}::test_a_broker_that_falls_silent_delays_no_end_and_has_nothing_drawn_twice",),
        without=(
            Mutation(
                "worker/amqp/connection.py",
                "parameters.heartbeat = settings.heartbeat_seconds",
                "parameters.heartbeat = 0",
            ),
        ),
    ),
    Row(
        name="A7",
        fault="the way to the broker swallows everything, and another worker gets the job",
        answer="both draw it; the first end recorded is the only one told",
        tests=(f"{FILE}::test_a_job_behind_a_black_hole_goes_to_another_worker_and_one_end_wins",),
        without=(
            Mutation(
                "worker/results/ledger.py",
                "        if self._storage.put_if_absent(self._ref(event.task_id), event.to_json(),"
                " content_type=CONTENT_TYPE):\n            return event\n",
                "        self._storage.put(self._ref(event.task_id), event.to_json(), content_type=CONTENT_TYPE)\n"
                "        return event\n",
            ),
        ),
    ),
    Row(
        name="A8",
        fault="the link is slow: a second for each chunk, or one byte at a time",
        answer="heartbeats flow beside the work, so the connection lasts",
        tests=(f"{FILE}::test_a_slow_link_costs_time_and_no_connection[by_chunks]",),
        without=(
            Mutation(
                "worker/jobs/dispatcher.py", "self._threads.submit(self._do, work, *args)", "self._do(work, *args)"
            ),
        ),
        also=(f"{FILE}::test_a_slow_link_costs_time_and_no_connection[by_bytes]",),
    ),
    Row(
        name="A9",
        fault="the broker is down at the start, or knows neither the user nor the virtual host",
        answer="not ready, but up; asks seldom where it is refused, logs no password, begins once let in",
        tests=(
            f"{FILE}::test_worker_refused_by_the_broker_retries_seldom_and_begins_once_accepted[unknown_user]",
            f"{FILE}::test_worker_refused_by_the_broker_retries_seldom_and_begins_once_accepted[unknown_vhost]",
        ),
        without=(
            Mutation(
                "worker/amqp/consumer.py",
                "refused = REFUSED_BACKOFF_SECONDS if isinstance(error, (*REFUSED, QueueUnusable)) else 0.0",
                "refused = 0.0",
            ),
        ),
        also=(f"{REAL_ENGINE}::test_a_broker_that_is_down_at_the_start_is_waited_for",),
    ),
    Row(
        name="A10",
        fault="the broker accepts a connection and says nothing",
        answer="the handshake is given up after five seconds and begun anew",
        tests=(f"{FILE}::test_handshake_without_an_answer_times_out_and_is_retried",),
        # pika's own limit is 15 s.
        without=(
            Mutation("worker/amqp/connection.py", "stack_timeout = STACK_TIMEOUT_SECONDS\n", "stack_timeout = 1e6\n"),
        ),
    ),
    Row(
        name="A11",
        fault="the jobs' queue is deleted in the middle of a job",
        answer="it is declared again as the backend declares it, and consumed; the job ends once",
        tests=(f"{FILE}::test_a_queue_deleted_in_mid_job_is_there_again_and_the_job_ends_once",),
        without=(Mutation("worker/amqp/consumer.py", "self._is_cancelled_by_broker = True", "pass"),),
        also=(f"{REAL_ENGINE}::test_a_deleted_queue_is_declared_again_and_consumed",),
    ),
    Row(
        name="A12",
        fault="the broker raises an alarm and takes no publishes",
        answer="acks go through; what must be copied first is not acked before the copy is confirmed",
        tests=(f"{FILE}::test_in_an_alarm_acks_go_through_and_what_must_be_published_is_not_lost",),
        without=(Mutation("worker/amqp/publisher.py", "self._channel.confirm_delivery()", "pass"),),
    ),
    Row(
        name="A13",
        fault="a policy sends the queue's dead letters nowhere",
        answer="nothing: ours are confirmed copies in a queue of their own, by no policy",
        tests=(f"{FILE}::test_policy_that_drops_dead_letters_loses_none_of_ours",),
        without=(
            Mutation(
                "worker/jobs/settler.py", "            self.publish_until_confirmed(publish)\n", "            pass\n"
            ),
        ),
    ),
    Row(
        name="A14",
        fault="the queue a copy should go to has been deleted",
        answer="the broker returns the copy; the queue is made again, and then it is sent once more",
        tests=(f"{FILE}::test_a_copy_whose_queue_is_gone_finds_it_made_again",),
        without=(Mutation("worker/amqp/publisher.py", "properties, mandatory=True)", "properties, mandatory=False)"),),
    ),
    Row(
        name="A15",
        fault="the same message five times at once on two workers, and three times afterwards",
        answer="drawn at most once by each, told with one body; afterwards neither drawn nor told",
        tests=(f"{FILE}::test_the_same_job_five_times_on_two_workers_has_one_end",),
        without=(Mutation("worker/jobs/handler.py", "        if end is None:\n", "        if True:\n"),),
        also=(
            "tests/live/drawing/test_jobs.py::test_the_same_message_five_times_is_one_job",
            f"{REAL_ENGINE}::test_a_record_in_the_ledger_wins_over_a_second_worker",
        ),
    ),
    Row(
        name="A16",
        fault="a failed generation is published again under a new task id",
        answer="a new run with an end and a webhook id of its own",
        tests=(f"{FILE}::test_every_new_try_of_a_generation_has_an_end_of_its_own",),
        without=(
            Mutation(
                "worker/results/terminal_event.py",
                'webhook_id=f"{self.task_id}:{self.kind.value}"',
                'webhook_id=f"{self.generation_id}:{self.kind.value}"',
            ),
        ),
        also=("tests/live/test_cancelling.py::test_a_new_try_of_a_cancelled_generation_is_drawn",),
    ),
    Row(
        name="A17",
        fault="a long job in front of a long queue",
        answer="its worker holds as many messages as it can draw and two more; others take the rest",
        tests=(f"{FILE}::test_a_worker_with_a_long_job_leaves_a_backlog_to_the_others",),
        without=(
            Mutation(
                "worker/amqp/consumer.py",
                "channel.basic_qos(prefetch_count=subscription.prefetch)",
                "channel.basic_qos(prefetch_count=0)",
            ),
        ),
    ),
    Row(
        name="A18",
        fault="a job ends that was delivered by a connection which is gone",
        answer="the lost delivery's tag is never sent, so the new channel stays open",
        tests=(f"{LOST}[closed]", f"{LOST}[reset]"),
        without=(
            Mutation("worker/amqp/consumer.py", "if delivery.session == self._session and channel", "if channel"),
        ),
    ),
    Row(
        name="A19",
        fault="connections break more often than the broker returns a message, in queues that an older worker made",
        answer="what was returned is replaced by a copy of which nothing is counted; ends are told and jobs drawn",
        tests=(f"{RETURNS}::test_connections_lost_again_and_again_lose_neither_a_parked_event_nor_a_recovered_job",),
        without=(
            Mutation("worker/results/outbox.py", "        if delivery.num_deliveries > 0:\n", "        if False:\n"),
            Mutation(
                "worker/jobs/dispatcher.py", "if delivery.num_deliveries > 0 or num_crashes", "if False and num_crashes"
            ),
        ),
        also=(
            f"{RETURNS}::test_an_event_parked_outlives_forty_restarts",
            "tests/worker/cli/test_dead_letters.py::test_listing_often_uses_up_no_letter",
        ),
    ),
    Row(
        name="A20",
        fault="a policy limits the length of the worker's queues, the age of their messages and their returns",
        answer="a full queue refuses and the job keeps its end; what the broker gives up is a dead letter",
        tests=(
            f"{RETURNS}::test_a_full_queue_refuses_what_is_published_and_keeps_what_it_has",
            f"{RETURNS}::test_a_message_at_a_policy_s_limit_becomes_a_dead_letter",
        ),
        without=(
            Mutation("worker/amqp/topology.py", ', "x-overflow": "reject-publish"}', "}"),
            Mutation(
                "worker/amqp/topology.py", "held = _QUORUM | self._dead_lettering(to=self.dead)", "held = _QUORUM"
            ),
        ),
        also=(
            f"{RETURNS}::test_a_policy_with_every_limit_loses_no_end",
            "tests/worker/cli/check/test_checks.py::test_a_policy_that_limits_the_worker_s_queues_is_found",
        ),
    ),
    Row(
        name="A21",
        fault="workers are stopped in order, one after another, in the middle of a recovered job",
        answer="its copy carries the number of killed workers, which is no higher; the next one draws it",
        tests=(f"{RETURNS}::test_deployments_in_the_middle_of_a_long_job_are_no_crashes[4]",),
        without=(
            Mutation(
                "worker/jobs/settler.py",
                "        if disposition is Disposition.RELEASE:\n            self.move(",
                "        if False:\n            self.move(",
            ),
        ),
    ),
    Row(
        name="A22",
        fault="ten jobs come back at once after a kill, while nothing else waits",
        answer="as many are drawn at once as there are lanes",
        tests=(f"{RETURNS}::test_recovered_jobs_come_as_many_at_once_as_there_are_lanes",),
        without=(Mutation("worker/wiring.py", "max(num_lanes, MIN_RECOVER_PREFETCH)", "MIN_RECOVER_PREFETCH"),),
    ),
    Row(
        name="A23",
        fault="one of several recovered jobs kills every worker that it is in",
        answer="from the third time on it is done with no recovered job beside it, so that those are not given up",
        tests=(f"{RETURNS}::test_a_job_that_several_workers_were_killed_with_is_done_with_no_recovered_one_beside_it",),
        without=(
            Mutation("worker/jobs/dispatcher.py", "if is_suspect(delivery) and not self", "if False and not self"),
        ),
    ),
    Row(
        name="A24",
        fault="a job on lease kills its worker: its message was acked, so that the broker counts nothing",
        answer="a note that has run out and was not taken away counts as a crash",
        tests=(f"{RETURNS}::test_a_job_on_lease_whose_worker_was_killed_has_one_crash_more",),
        without=(
            Mutation(
                "worker/jobs/dispatcher.py", "num_crashes=delivery.num_crashes + 1", "num_crashes=delivery.num_crashes"
            ),
        ),
    ),
    Row(
        name="A25",
        fault="a message's properties or headers hold what pika cannot decode: a time in milliseconds, deep nesting",
        answer="the job is done or its body a dead letter, the connection stays, and so is what is behind it",
        tests=(
            f"{FILE}::test_message_with_headers_undecodable_by_pika_is_done_and_so_are_those_behind_it",
            "tests/hostile/test_fuzzing.py::test_deliveries_with_fuzzed_properties_all_end_on_one_connection",
        ),
        without=(
            Mutation(
                "worker/amqp/content_headers.py",
                "if buffer[:1] == bytes((pika.spec.FRAME_HEADER,)) and",
                "if False and",
            ),
        ),
        also=("tests/worker/amqp/test_content_headers.py::test_any_bytes_are_read",),
    ),
    Row(
        name="A26",
        fault="a cancel order's headers are nested thousands of levels deep",
        answer="the order is obeyed: what is deeper than sixteen levels is not decoded",
        tests=("tests/live/test_cancelling.py::test_cancel_order_is_obeyed_whatever_its_headers",),
        without=(Mutation("worker/amqp/content_headers.py", "if depth >= MAX_DEPTH:", "if False:"),),
        also=("tests/worker/amqp/test_content_headers.py::test_nesting_ends_in_bytes_however_deep_it_is",),
    ),
    Row(
        name="A27",
        fault="dead letters whose headers pika cannot decode or encode, or that name other queues for copies",
        answer="they are listed, shown and replayed, and go back byte by byte, to no other queue",
        tests=(
            "tests/worker/cli/test_dead_letters.py::test_letters_whose_headers_pika_cannot_decode_are_listed_shown_copied_and_replayed",
            "tests/worker/cli/test_dead_letters.py::test_a_letter_copied_goes_to_no_queue_that_its_headers_name",
        ),
        without=(
            Mutation(
                "worker/amqp/queue_browser.py",
                "held.properties.for_copy(without=NOT_COPIED)",
                "pika.BasicProperties(headers=dict(held.headers))",
            ),
        ),
        also=(
            "tests/worker/amqp/test_content_headers.py::test_a_copy_has_all_properties_byte_by_byte_but_the_user_and_what_is_left_out",
        ),
    ),
    Row(
        name="A28",
        fault="workers are stopped in mid job, whose queue has a time to live, a length or a delivery limit",
        answer="a copy in .recover, where the broker confirms it, takes its place: no limit drops or counts it",
        tests=(
            f"{QUEUES}::test_deployments_in_mid_job_lose_it_in_no_queue_and_count_in_none[classic]",
            f"{QUEUES}::test_a_deployment_while_the_queue_is_full_loses_no_job_in_hand[classic]",
        ),
        without=(
            Mutation(
                "worker/jobs/settler.py",
                "if disposition is Disposition.RELEASE:\n            self.move(",
                "if False:\n            self.move(",
            ),
        ),
        also=(
            f"{QUEUES}::test_deployments_in_mid_job_lose_it_in_no_queue_and_count_in_none[quorum]",
            f"{QUEUES}::test_a_killed_worker_s_job_survives_a_delivery_limit_of_one",
        ),
    ),
    Row(
        name="A29",
        fault="express and ordinary jobs wait in two queues of one worker, more of them than it can draw",
        answer="each queue has its weight's share of the starts; none is starved, and no place stays empty",
        tests=(
            f"{INTAKE}::test_starts_are_by_weight_even_where_all_places_become_free_at_once[classic]",
            "tests/worker/amqp/test_fair_share.py::test_starts_are_by_weight_and_interleaved",
        ),
        without=(
            Mutation(
                "worker/amqp/fair_share.py",
                "self._now + Fraction(1, self._weights[name])",
                "self._now + Fraction(1, 1)",
            ),
        ),
        also=(
            "tests/benchmarks/test_queues.py::test_express_jobs_have_three_of_four_starts_and_ordinary_ones_the_fourth",
            f"{INTAKE}::test_an_empty_queue_s_places_go_to_the_other_and_its_first_message_is_the_next_to_start",
        ),
    ),
    Row(
        name="A30",
        fault="many jobs come at once to queues that were empty, and the worker takes them by weight",
        answer="it holds as many as it has places and at most one more of each queue; the rest is there for others",
        tests=(f"{INTAKE}::test_messages_that_come_to_empty_queues_are_taken_at_once_while_there_are_places[classic]",),
        without=(
            Mutation(
                "worker/amqp/intake.py",
                "self._channels[queue].basic_cancel(self._consumers.pop(queue))",
                "self._consumers.pop(queue)",
            ),
        ),
    ),
    Row(
        name="A31",
        fault="a job of the second queue loses its worker and then meets trouble, again and again",
        answer="each retry returns to its own queue, and its dead letter knows that and its priority",
        tests=(
            f"{QUEUES}::test_a_job_returns_to_the_queue_it_came_from_with_its_priority_also_behind_a_killed_worker",
        ),
        without=(
            Mutation(
                "worker/amqp/topology.py", "return jobs if jobs in self.others else self.jobs", "return self.jobs"
            ),
            Mutation("worker/amqp/publisher.py", "            priority=priority,\n", ""),
            Mutation(
                "worker/amqp/publisher.py", "headers[PRIORITY_HEADER], priority = priority, None", "priority = None"
            ),
        ),
    ),
    Row(
        name="A32",
        fault="a worker is told to stop, and its job on lease goes on for longer than a note holds",
        answer="the note is renewed until the drain is over: no crash is counted, and no other worker draws the job",
        tests=("tests/live/test_leases.py::test_lease_is_kept_while_a_worker_that_stops_waits_for_its_job",),
        without=(
            Mutation(
                "worker/supervisor.py",
                "while not self._is_drained.wait(self._parts.leases.renew_every):",
                "while not self._parts.is_draining.wait(self._parts.leases.renew_every):",
            ),
        ),
    ),
    Row(
        name="A33",
        fault="one of several queues of jobs cannot be used: no permission, crashed, of one consumer",
        answer="told once; the others' jobs go on, and it joins the session once it can be used",
        tests=tuple(f"{UNUSABLE}[{how}]" for how in ("forbidden", "missing", "crashed", "single")),
        without=(
            Mutation(
                "worker/amqp/job_queues.py",
                "        if refusals and not self._intake.queues:\n",
                "        if refusals:\n",
            ),
        ),
        also=(
            "tests/worker/amqp/test_publisher.py"
            "::test_a_queue_of_jobs_that_cannot_be_used_stops_nothing_that_is_published_elsewhere",
        ),
    ),
)
