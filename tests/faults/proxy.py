"""A TCP proxy between a worker and one of its servers: it passes bytes on, and misbehaves on command.

Everything happens on the proxy's own thread, an event loop; its public methods may be called from any thread and have
taken effect when they return. What a trigger does runs on that thread too.
"""

import asyncio
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from types import TracebackType
from typing import NamedTuple, Self

from examples.parts.ports import free_port

CHUNK_BYTES = 65536
CALL_SECONDS = 120.0
NO_LINGER = struct.pack("ii", 1, 0)  # close then sends RST


class Direction(Enum):
    """Which way bytes go."""

    UP = "to the server"
    DOWN = "to the client"


UP, DOWN = Direction.UP, Direction.DOWN


class Sign(NamedTuple):
    """Bytes that pass in one direction; of an empty pattern the first that come."""

    direction: Direction
    pattern: bytes = b""


@dataclass(frozen=True)
class _Flow:
    """How the bytes of one direction go on: each chunk, or each single byte, after a wait."""

    seconds: float = 0.0
    is_drip: bool = False


class Link:
    """One client's connection and the proxy's own to the server. What acts on it runs on the proxy's thread."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self._client = client
        self._server = server
        self.tasks: list[asyncio.Task[None]] = []
        self.is_swallowed = False
        self.is_answered = False
        self.is_closed = False

    def ends(self, direction: Direction) -> tuple[socket.socket, socket.socket]:
        """Return the source and the sink of a direction's bytes."""
        return (self._client, self._server) if direction is UP else (self._server, self._client)

    def swallow(self) -> None:
        """Pass nothing on any more, not even an end. There is no way back: the stream has a hole."""
        self.is_swallowed = True

    def reset(self) -> None:
        """Send RST to both ends."""
        if not self.is_closed:
            for end in (self._client, self._server):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
            self.close()

    def close(self) -> None:
        """Send FIN to both ends."""
        if self.is_closed:
            return
        self.is_closed = True
        for task in self.tasks:
            task.cancel()
        # Behind the cancelled calls' own callbacks, which still take the descriptors out of the selector.
        loop = asyncio.get_running_loop()
        for end in (self._client, self._server):
            loop.call_soon(end.close)

    def answer(self, content: bytes) -> None:
        """Answer in the server's place, which receives nothing; what the client still sends is dropped."""
        self.is_swallowed = self.is_answered = True
        self._client.send(content)
        self._client.shutdown(socket.SHUT_WR)


@dataclass(eq=False)
class Trigger:
    """Does something, at most `times` times, once a link has shown all signs in their order.

    That is `after_bytes` bytes behind the start of the last sign: what comes before has been passed on by then, and
    what comes after has not.
    """

    signs: tuple[Sign, ...]
    action: Callable[[Link], None]
    after_bytes: int
    times: int | None
    num_fired: int = 0
    fired: threading.Event = field(default_factory=threading.Event)
    _num_seen: dict[Link, int] = field(default_factory=dict)
    _tails: dict[Link, bytes] = field(default_factory=dict)
    _remaining: dict[Link, int] = field(default_factory=dict)

    def place_in(self, link: Link, direction: Direction, chunk: bytes) -> int | None:
        """Return the offset in the chunk at which to fire, if it is there."""
        self._look(link, direction, chunk)
        remaining = self._remaining.get(link)
        if remaining is None or self.signs[-1].direction is not direction:
            return None
        if remaining > len(chunk):
            self._remaining[link] = remaining - len(chunk)
            return None
        del self._remaining[link]
        self._num_seen[link] = 0
        return remaining

    def fire(self, link: Link) -> None:
        if self.times is None or self.num_fired < self.times:
            self.num_fired += 1
            self.action(link)
            self.fired.set()

    def _look(self, link: Link, direction: Direction, chunk: bytes) -> None:
        number = self._num_seen.get(link, 0)
        if number == len(self.signs) or self.signs[number].direction is not direction:
            return
        pattern, tail = self.signs[number].pattern, self._tails.pop(link, b"")
        place = (tail + chunk).find(pattern)
        if place < 0:
            self._tails[link] = (tail + chunk)[-(len(pattern) - 1) :] if len(pattern) > 1 else b""
            return
        self._num_seen[link] = number + 1
        if number + 1 == len(self.signs):
            self._remaining[link] = max(0, place - len(tail)) + self.after_bytes


class Proxy:
    """Owner of a port of its own, of every connection made to it and of one to the target for each.

    `num_connections` counts all that were accepted, `num_bytes` what arrived in each direction.
    """

    host = "127.0.0.1"

    def __init__(self, target_port: int) -> None:
        self.port = free_port()
        self.num_connections = 0
        self.num_bytes = {UP: 0, DOWN: 0}
        self._target_port = target_port
        self._flows = {UP: _Flow(), DOWN: _Flow()}
        self._is_black_hole = False
        self._links: set[Link] = set()
        self._triggers: list[Trigger] = []
        self._accepting: asyncio.Task[None] | None = None
        self._socket: socket.socket | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self.listen()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.refuse()
        self.reset()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def num_open(self) -> int:
        return len(self._links)

    def pass_on(self) -> None:
        """Pass everything on again: no flow is slowed, no trigger waits. What was swallowed is lost."""
        self._do(self._pass_on)

    def delay(self, seconds: float, *directions: Direction) -> None:
        """Hold each chunk back that long, and those behind it with it."""
        self._do(partial(self._set_flows, _Flow(seconds), directions))

    def drip(self, seconds: float, *directions: Direction) -> None:
        """Send one byte at a time, each after a wait."""
        self._do(partial(self._set_flows, _Flow(seconds, is_drip=True), directions))

    def black_hole(self) -> None:
        """Take all bytes and connections, and let nothing out: no byte, no end."""
        self._do(self._begin_black_hole)

    def reset(self, *links: Link) -> None:
        """Send RST to these connections, or to all; new ones are accepted."""
        self._do(partial(self._reset_links, links))

    def refuse(self) -> None:
        """Refuse new connections; those that are open stay."""
        self._do(self._close_listener)

    def listen(self) -> None:
        """Accept connections again."""
        self._do(self._open_listener)

    def cut_after(self, num_bytes: int, direction: Direction, *, times: int | None = None) -> Trigger:
        """Close each connection, or the next `times`, behind that many more bytes."""
        return self.when(Sign(direction), do=Link.close, after_bytes=num_bytes, times=times)

    def when(self, *signs: Sign, do: Callable[[Link], None], after_bytes: int = 0, times: int | None = 1) -> Trigger:
        """Do something to the link that has shown `signs`; see `Trigger`."""
        trigger = Trigger(signs, do, after_bytes, times)
        self._do(partial(self._triggers.append, trigger))
        return trigger

    def _do(self, work: Callable[[], None]) -> None:
        if threading.current_thread() is self._thread:
            work()
            return

        async def call() -> None:
            work()
            await asyncio.sleep(0)  # sockets are closed behind this turn of the loop

        asyncio.run_coroutine_threadsafe(call(), self._loop).result(CALL_SECONDS)

    # Everything below runs on the loop's thread.

    def _pass_on(self) -> None:
        self._set_flows(_Flow(), ())
        self._is_black_hole = False
        self._triggers.clear()

    def _set_flows(self, flow: _Flow, directions: tuple[Direction, ...]) -> None:
        for direction in directions or Direction:
            self._flows[direction] = flow

    def _begin_black_hole(self) -> None:
        self._is_black_hole = True
        for link in self._links:
            link.swallow()

    def _reset_links(self, links: tuple[Link, ...]) -> None:
        for link in links or tuple(self._links):
            link.reset()

    def _open_listener(self) -> None:
        if self._socket is None:
            self._socket = socket.create_server((self.host, self.port), backlog=128)
            self._socket.setblocking(False)
            self._accepting = self._loop.create_task(self._accept(self._socket))

    def _close_listener(self) -> None:
        if self._socket is not None and self._accepting is not None:
            self._accepting.cancel()
            self._loop.call_soon(self._socket.close)
            self._socket = self._accepting = None

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            client, _ = await self._loop.sock_accept(listener)
            self.num_connections += 1
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._loop.create_task(self._connect(client))

    async def _connect(self, client: socket.socket) -> None:
        server = socket.socket()
        server.setblocking(False)
        link = Link(client, server)
        try:
            await self._loop.sock_connect(server, (self.host, self._target_port))
        except OSError:
            link.reset()  # nobody is there: as near to a refusal as it gets behind an open port
            return
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link.is_swallowed = self._is_black_hole
        self._links.add(link)
        link.tasks = [self._loop.create_task(self._pump(link, direction)) for direction in Direction]
        await asyncio.wait(link.tasks)
        link.close()
        self._links.discard(link)

    async def _pump(self, link: Link, direction: Direction) -> None:
        source, sink = link.ends(direction)
        try:
            while chunk := await self._loop.sock_recv(source, CHUNK_BYTES):
                self.num_bytes[direction] += len(chunk)
                await self._take(link, direction, chunk)
            if not link.is_swallowed:
                sink.shutdown(socket.SHUT_WR)
        except OSError:
            if not link.is_swallowed:
                link.reset()
        if link.is_answered:
            link.close()
        elif link.is_swallowed:
            await asyncio.Event().wait()  # an end is swallowed too: only a reset or our own end closes the link

    async def _take(self, link: Link, direction: Direction, chunk: bytes) -> None:
        """Pass the chunk on, and stop for the triggers where they are to fire."""
        places = [(trigger.place_in(link, direction, chunk), trigger) for trigger in self._triggers]
        done = 0
        for place, trigger in sorted(((p, t) for p, t in places if p is not None), key=lambda found: found[0]):
            await self._forward(link, direction, chunk[done:place])
            done = place
            trigger.fire(link)
        await self._forward(link, direction, chunk[done:])

    async def _forward(self, link: Link, direction: Direction, chunk: bytes) -> None:
        _, sink = link.ends(direction)
        left = memoryview(chunk)
        while left and not link.is_swallowed and not link.is_closed:
            flow = self._flows[direction]
            part = left[:1] if flow.is_drip else left
            await asyncio.sleep(flow.seconds)
            if not link.is_swallowed:
                await self._loop.sock_sendall(sink, part)
            left = left[len(part) :]
