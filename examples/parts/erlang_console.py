"""Questions and orders to a running RabbitMQ node by an Erlang process that stays: rabbitmqctl starts one for each."""

import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from examples.parts.installation import Installation
from examples.parts.processes import ServerError

# Evaluated on the node. A quorum queue is asked itself: what RabbitMQ tells of it is counted every five seconds, and a
# node that counts more often, in a queue that was declared a moment ago, ends that queue's process on a busy machine.
DEPTHS = """
lists:map(
    fun(Queue) ->
        Name = element(4, amqqueue:get_name(Queue)),
        case amqqueue:get_type(Queue) of
            rabbit_quorum_queue ->
                case catch ra:local_query(amqqueue:get_pid(Queue), fun rabbit_fifo:overview/1) of
                    {ok, {_, #{num_ready_messages := Ready, num_checked_out := Unacked}}, _} -> {Name, Ready, Unacked};
                    _ -> {Name, unknown, unknown}
                end;
            _ ->
                case catch rabbit_amqqueue:info(Queue, [messages_ready, messages_unacknowledged]) of
                    [{_, Ready}, {_, Unacked}] -> {Name, Ready, Unacked};
                    _ -> {Name, unknown, unknown}
                end
        end
    end,
    rabbit_amqqueue:list(<<"/">>)).
"""
# For every line on standard input: what the node answers, in lines, then "end".
PROGRAM = """
Call = fun(Module, Function, Arguments) -> rpc:call('NODE', Module, Function, Arguments, 10000) end,
Parse = fun(Text) ->
    {ok, Tokens, _} = erl_scan:string(Text),
    {ok, Expressions} = erl_parse:parse_exprs(Tokens),
    Expressions
end,
Depths = Parse("DEPTHS"),
Answer = fun
    ("queues\\n") ->
        case Call(erl_eval, exprs, [Depths, []]) of
            {badrpc, Why} -> io:format("error ~0p~n", [Why]);
            {value, Rows, _} -> [io:format("~s ~p ~p~n", [Name, Ready, Unacked]) || {Name, Ready, Unacked} <- Rows]
        end;
    ("close\\n") ->
        case Call(rabbit_networking, local_connections, []) of
            {badrpc, Why} -> io:format("error ~0p~n", [Why]);
            Pids -> Call(rabbit_networking, close_connections, [Pids, "closed from the console"])
        end;
    ("evaluate " ++ Text) ->
        case Call(erl_eval, exprs, [Parse(Text), []]) of
            {badrpc, Why} -> io:format("error ~0p~n", [Why]);
            _ -> ok
        end
end,
Ask = fun(Ask) ->
    case io:get_line("") of
        eof -> halt(0);
        Line -> Answer(Line), io:format("end~n"), Ask(Ask)
    end
end,
Ask(Ask).
""".replace("DEPTHS", DEPTHS.replace('"', '\\"'))


# Of a quorum queue that is being declared or deleted.
UNKNOWN = -1


class QueueDepth(NamedTuple):
    """Messages of one queue: waiting, and delivered but not settled."""

    ready: int
    unacknowledged: int


class ErlangConsole:
    """Owner of the asking process. Not thread-safe; it outlives restarts of the node."""

    def __init__(self, node_name: str, env: Mapping[str, str], folder: Path, installation: Installation) -> None:
        """`env` as the node's: its name daemon and its cookie."""
        own_name = f"console-{node_name}"
        program = PROGRAM.replace("NODE", node_name)
        command = ["erl", "-noinput", "-noshell", "-hidden", "-sname", own_name, "-eval", program]
        self._process = subprocess.Popen(
            installation.command(command, folder=folder),
            env=dict(env),
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def queues(self) -> dict[str, QueueDepth]:
        """List every queue of the default virtual host. Raises `ServerError` where the node does not answer."""
        found = {}
        for line in self._ask("queues"):
            name, ready, unacknowledged = line.rsplit(" ", 2)
            counts = (int(count) if count.isdecimal() else UNKNOWN for count in (ready, unacknowledged))
            found[name] = QueueDepth(*counts)
        return found

    def close_connections(self) -> None:
        """Close every client's connection, as an operator may. Raises `ServerError` as above."""
        list(self._ask("close"))

    def evaluate(self, expression: str) -> None:
        """Have the node evaluate Erlang, in one line that ends in a dot. Raises `ServerError` where that fails."""
        list(self._ask(f"evaluate {expression}"))

    def _ask(self, question: str) -> Iterator[str]:
        """Evaluate an expression on the node; return the answer's lines."""
        if self._process.stdin is None or self._process.stdout is None:
            raise ServerError("the console was started without pipes")
        try:
            self._process.stdin.write(f"{question}\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise ServerError("the node's console ended") from error
        for line in self._process.stdout:
            if line.strip() == "end":
                return
            if line.startswith("error "):
                self._process.stdout.readline()  # its "end", which the next answer would seem to begin with
                raise ServerError(f"the node does not answer: {line.removeprefix('error ').strip()}")
            yield line.strip()
        raise ServerError("the node's console ended")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
