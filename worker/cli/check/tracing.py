"""Check that the collector takes traces, where jobs are traced."""

from collections.abc import Mapping
from functools import partial

from worker.cli.check.checks import Check, CheckFailed
from worker.tracing.switch import TracingUnavailable, endpoint_of, prepare, read_variables


def tracing_checks() -> tuple[Check, ...]:
    """Return the check of the collector; none where jobs are not traced."""
    variables = read_variables()
    return (Check("tracing", partial(check_collector, variables)),) if endpoint_of(variables) else ()


def check_collector(variables: Mapping[str, str]) -> str:
    """Send the collector an empty request, with the headers and certificates that the worker's have."""
    try:
        prepare(variables)
    except TracingUnavailable as error:
        raise CheckFailed(f"{error}; until then jobs are not traced") from error
    from worker.tracing.exporting import probe_collector  # noqa: PLC0415 - not for those who do not trace

    if reason := probe_collector():
        raise CheckFailed(f"{endpoint_of(variables)} takes no traces: {reason}. Jobs go on without them")
    return f"{endpoint_of(variables)} takes traces"
