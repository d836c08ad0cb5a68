"""The owner of graphs over a recorder in place of CUDA: what is captured, which graph goes, and what failures do."""

import logging
from collections.abc import Callable, Iterator

import pytest
import torch

from inference.device.forward_graphs import EAGER_RUNS, MAX_GRAPHS, ForwardGraphs, ForwardInputs, padded_rows
from tests.support.cuda.recorded_capture import RecordedCapture


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    # As on the engine's thread.
    with torch.inference_mode():
        yield


def inputs_of(value: float, num_rows: int = 1, width: int = 4, table: torch.Tensor | None = None) -> ForwardInputs:
    return ForwardInputs({"x": torch.full((num_rows, width), value)}, table)


def doubled(inputs: ForwardInputs) -> torch.Tensor:
    return inputs.by_row["x"] * 2


def capture_of(graphs: ForwardGraphs, **fields: int) -> None:
    """Run forwards of one shape until theirs is captured."""
    for _ in range(EAGER_RUNS + 1):
        predictions = graphs.run(doubled, inputs_of(1.0, **fields))
    assert predictions is not None


class FailingCapture(RecordedCapture):
    """Fails when it is to capture."""

    def __init__(self, error: Callable[[], Exception]) -> None:
        super().__init__()
        self._error = error

    def capture(self, work: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        raise self._error()


def test_rows_are_added_up_to_the_next_graph_s() -> None:
    assert [padded_rows(number) for number in (1, 2, 3, 4, 5, 6, 19, 20, 23, 24, 25, 33)] == [
        *(1, 2, 3, 4, 6, 6, 20, 20, 24, 24, 32, 40)
    ]


def test_a_forward_is_captured_once_its_shape_has_run_eagerly_and_is_replayed_on_the_inputs_of_each_step() -> None:
    capture = RecordedCapture()
    graphs = ForwardGraphs(capture)

    eager = [graphs.run(doubled, inputs_of(1.0)) for _ in range(EAGER_RUNS)]
    first, *others = (graphs.run(doubled, inputs_of(value)) for value in (2.0, 3.0, 5.0))

    assert eager == [None] * EAGER_RUNS
    assert [one is not None and one[0, 0].item() for one in (first, *others)] == [4.0, 6.0, 10.0]
    assert (capture.num_captures, capture.num_replays) == (1, 2)


def test_a_replay_gives_the_real_rows_alone_and_leaves_earlier_predictions_as_they_were() -> None:
    graphs = ForwardGraphs(RecordedCapture())
    capture_of(graphs, num_rows=6)

    five, six = graphs.run(doubled, inputs_of(3.0, 5)), graphs.run(doubled, inputs_of(4.0, 6))

    assert five is not None
    assert six is not None
    assert torch.equal(five, torch.full((5, 4), 6.0))
    assert torch.equal(six, torch.full((6, 4), 8.0))


def test_a_value_that_is_no_input_stays_that_of_the_capture() -> None:
    graphs = ForwardGraphs(RecordedCapture())
    runs = [graphs.run(lambda _, value=value: torch.full((1, 4), value) + 0, inputs_of(0.0)) for value in range(9)]

    # What a graph would do: the tests of the families would see it.
    assert runs[-1] is not None
    assert runs[-1][0, 0].item() == EAGER_RUNS


def test_forwards_with_a_table_have_a_graph_of_their_own_that_reads_it_anew() -> None:
    graphs = ForwardGraphs(RecordedCapture())
    capture_of(graphs)

    def plus(inputs: ForwardInputs) -> torch.Tensor:
        assert inputs.table is not None
        return inputs.by_row["x"] + inputs.table[0]

    runs = [graphs.run(plus, inputs_of(1.0, table=torch.tensor([number] * 3))) for number in range(6)]

    assert runs[:EAGER_RUNS] == [None] * EAGER_RUNS
    assert [one is not None and one[0, 0].item() for one in runs[EAGER_RUNS:]] == [4.0, 5.0, 6.0]


def test_the_graph_that_was_not_used_for_longest_goes_first() -> None:
    capture = RecordedCapture()
    graphs = ForwardGraphs(capture)
    for width in range(1, MAX_GRAPHS + 1):
        capture_of(graphs, width=width)
    assert graphs.run(doubled, inputs_of(1.0, width=1)) is not None

    capture_of(graphs, width=MAX_GRAPHS + 1)

    assert graphs.run(doubled, inputs_of(1.0, width=1)) is not None
    assert graphs.run(doubled, inputs_of(1.0, width=2)) is None
    assert capture.num_captures == MAX_GRAPHS + 1


def test_dropped_graphs_give_their_memory_back_and_are_captured_again() -> None:
    capture = RecordedCapture()
    graphs = ForwardGraphs(capture)
    assert not graphs.drop()
    capture_of(graphs)
    assert graphs.num_bytes > 0

    assert graphs.drop()

    assert (graphs.num_bytes, capture.num_releases) == (0, 1)
    assert graphs.run(doubled, inputs_of(1.0)) is None
    capture_of(graphs)


def test_a_capture_without_memory_is_not_tried_again_for_its_shape(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    capture = FailingCapture(lambda: torch.OutOfMemoryError("no room"))
    graphs = ForwardGraphs(capture)

    runs = [graphs.run(doubled, inputs_of(1.0)) for _ in range(9)]
    graphs._capture = RecordedCapture()
    capture_of(graphs, width=5)

    # It had run before it was captured.
    assert [one is not None for one in runs] == [number == EAGER_RUNS for number in range(9)]
    assert capture.num_releases == 1
    events = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert [event.getMessage() for event in events] == ["no memory to capture a forward: it runs eagerly"]


def lost_behind_another() -> Exception:
    error = RuntimeError("capture was invalidated")
    error.__context__ = torch.OutOfMemoryError("no room")
    return error


def test_a_lack_of_memory_is_known_behind_the_error_of_ending_the_capture() -> None:
    graphs = ForwardGraphs(FailingCapture(lost_behind_another))
    for _ in range(EAGER_RUNS + 1):
        graphs.run(doubled, inputs_of(1.0))

    graphs._capture = RecordedCapture()

    capture_of(graphs, width=5)


def test_any_other_failure_ends_capturing_for_good_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    graphs = ForwardGraphs(FailingCapture(lambda: RuntimeError("operation not permitted")))

    runs = [graphs.run(doubled, inputs_of(1.0)) for _ in range(9)]
    others = [graphs.run(doubled, inputs_of(1.0, width=5)) for _ in range(9)]

    assert [one is not None for one in runs] == [number == EAGER_RUNS for number in range(9)]
    assert others == [None] * 9
    (event,) = caplog.records
    assert event.getMessage() == "capture failed: forwards run without CUDA graphs"
    assert event.__dict__["fields"] == {"error": "RuntimeError: operation not permitted"}


def test_a_forward_that_waits_for_the_device_cannot_be_captured(caplog: pytest.LogCaptureFixture) -> None:
    graphs = ForwardGraphs(RecordedCapture())
    for _ in range(EAGER_RUNS + 2):
        graphs.run(lambda inputs: inputs.by_row["x"] * inputs.by_row["x"].sum().item(), inputs_of(1.0))

    assert [record.getMessage() for record in caplog.records] == ["capture failed: forwards run without CUDA graphs"]
