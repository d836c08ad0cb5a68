"""The tests' own proxy does what the tests of faults believe it does."""

import socket
import time
from collections.abc import Iterator

import pytest

from tests.faults.proxy import DOWN, NO_LINGER, UP, Link, Proxy, Sign
from tests.support.servers.clients_servers import Server
from tests.support.world import eventually


class EchoingServer(Server):
    """Sends back what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.peers: list[socket.socket] = []

    def converse(self, peer: socket.socket) -> None:
        self.peers.append(peer)
        while chunk := peer.recv(65536):
            self.requests.append(chunk)
            peer.sendall(chunk)

    @property
    def heard(self) -> bytes:
        return b"".join(self.requests)


@pytest.fixture
def server() -> Iterator[EchoingServer]:
    with EchoingServer() as made:
        yield made


@pytest.fixture
def proxy(server: EchoingServer) -> Iterator[Proxy]:
    with Proxy(server.port) as made:
        yield made


def connect(proxy: Proxy) -> socket.socket:
    return socket.create_connection((proxy.host, proxy.port), timeout=120)


def receive(client: socket.socket, num_bytes: int) -> bytes:
    found = b""
    while len(found) < num_bytes and (chunk := client.recv(65536)):
        found += chunk
    return found


def test_bytes_and_ends_pass_and_are_counted(proxy: Proxy) -> None:
    content = bytes(range(256)) * 4000
    with connect(proxy) as client:
        for start in range(0, len(content), 50_000):
            client.sendall(content[start : start + 50_000])
            assert receive(client, len(content[start : start + 50_000])) == content[start : start + 50_000]
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""

    assert proxy.num_connections == 1
    assert proxy.num_bytes == {UP: len(content), DOWN: len(content)}
    eventually(lambda: proxy.num_open == 0)


def test_delay_slows_one_direction_until_it_is_lifted(proxy: Proxy, server: EchoingServer) -> None:
    with connect(proxy) as client:
        proxy.delay(2.0, DOWN)
        started_at = time.monotonic()
        client.sendall(b"a")
        eventually(lambda: server.heard == b"a", within_seconds=1.9)
        assert client.recv(1) == b"a"
        assert time.monotonic() - started_at >= 2

        proxy.pass_on()
        client.sendall(b"b")
        assert client.recv(1) == b"b"
        assert time.monotonic() - started_at < 4


def test_a_drip_sends_single_bytes_until_it_ends(proxy: Proxy, server: EchoingServer) -> None:
    with connect(proxy) as client:
        proxy.drip(0.05, UP)
        client.sendall(b"x" * 1000)
        eventually(lambda: len(server.heard) >= 3)
        assert len(server.heard) < 100

        proxy.pass_on()
        assert len(receive(client, 1000)) == 1000


def test_a_black_hole_takes_everything_and_lets_no_end_out(proxy: Proxy, server: EchoingServer) -> None:
    with connect(proxy) as known:
        known.sendall(b"a")
        assert known.recv(1) == b"a"
        proxy.black_hole()
        with connect(proxy) as stranger:
            for client in (known, stranger):
                client.sendall(b"lost")
                client.settimeout(0.2)
                with pytest.raises(TimeoutError):
                    client.recv(1)
        assert server.heard == b"a"
        known.shutdown(socket.SHUT_WR)

        # What was in the hole stays there; new connections are sound.
        proxy.pass_on()
        known.settimeout(0.2)
        with pytest.raises(TimeoutError):
            known.recv(1)
        with connect(proxy) as client:
            client.sendall(b"b")
            assert client.recv(1) == b"b"


def test_a_black_hole_hides_that_the_server_gave_up(proxy: Proxy, server: EchoingServer) -> None:
    with connect(proxy) as client:
        client.sendall(b"a")
        assert client.recv(1) == b"a"
        proxy.black_hole()
        for peer in server.peers:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
            peer.shutdown(socket.SHUT_RD)  # its thread ends then, and closes it

        client.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.recv(1)


def test_a_reset_is_one_at_both_ends_and_new_connections_are_welcome(proxy: Proxy) -> None:
    with connect(proxy) as client:
        client.sendall(b"a")
        assert client.recv(1) == b"a"
        proxy.reset()
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    with connect(proxy) as client:
        client.sendall(b"b")
        assert client.recv(1) == b"b"


def test_proxy_refuses_connections_and_accepts_them_again(proxy: Proxy) -> None:
    with connect(proxy) as client:
        client.sendall(b"a")
        assert client.recv(1) == b"a"
        proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            connect(proxy)
        client.sendall(b"b")
        assert client.recv(1) == b"b"

    proxy.listen()
    with connect(proxy) as client:
        client.sendall(b"c")
        assert client.recv(1) == b"c"


def test_client_of_a_closed_port_is_reset(server: EchoingServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with Proxy(port) as proxy, pytest.raises(ConnectionResetError), connect(proxy) as client:
        client.recv(1)


def test_a_cut_comes_behind_exactly_so_many_bytes_of_each_connection(proxy: Proxy, server: EchoingServer) -> None:
    proxy.cut_after(1000, UP)
    for number in range(2):
        with connect(proxy) as client:
            client.sendall(b"x" * 5000)
            receive(client, 5000)
        eventually(lambda wanted=1000 * (number + 1): len(server.heard) == wanted)  # type: ignore[misc]


def test_a_trigger_fires_once_between_what_was_passed_on_and_what_was_not(proxy: Proxy, server: EchoingServer) -> None:
    trigger = proxy.when(Sign(UP, b"needle"), do=Link.reset, after_bytes=7)
    with connect(proxy) as client:
        client.sendall(b"hay nee")
        assert receive(client, 7) == b"hay nee"
        client.sendall(b"dle, hay")
        with pytest.raises(ConnectionResetError):
            receive(client, 8)

    assert trigger.fired.is_set()
    with connect(proxy) as client:
        client.sendall(b"needle, again")
        assert receive(client, 13) == b"needle, again"
    assert trigger.num_fired == 1


def test_a_trigger_of_two_signs_waits_for_the_answer(proxy: Proxy, server: EchoingServer) -> None:
    proxy.when(Sign(UP, b"ask"), Sign(DOWN, b"ask"), do=Link.reset)
    with connect(proxy) as client:
        client.sendall(b"ask")
        with pytest.raises(ConnectionResetError):
            client.recv(1)

    assert server.heard == b"ask"


def test_a_trigger_may_answer_in_the_server_s_place(proxy: Proxy, server: EchoingServer) -> None:
    proxy.when(Sign(UP, b"ask"), do=lambda link: link.answer(b"no"))
    with connect(proxy) as client:
        client.sendall(b"ask")
        assert receive(client, 3) == b"no"

    assert server.heard == b""
    eventually(lambda: proxy.num_open == 0)
