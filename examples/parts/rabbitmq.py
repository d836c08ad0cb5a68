"""A private RabbitMQ node on free ports, which touches no broker and no Erlang daemon of the machine."""

import hashlib
import os
import socket
import subprocess
from pathlib import Path

from examples.parts.erlang_console import ErlangConsole, QueueDepth
from examples.parts.installation import Installation
from examples.parts.part import Part
from examples.parts.ports import free_port
from examples.parts.processes import ServerError, ServerProcess

START_SECONDS = 180.0
STOP_SECONDS = 120.0
CTL_SECONDS = 180.0

AMQP_HEADER = b"AMQP\x00\x00\x09\x01"
METHOD_FRAME = b"\x01"


class RabbitMQ(Part):
    """One node, its data below `folder`. Owns a server process and its name daemon (epmd). Not thread-safe."""

    host = "127.0.0.1"

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self._installation = Installation()
        self._dist_port = free_port()
        self._epmd_port = free_port()
        # A node's data belongs to its name: the same folder gives the same name.
        self._node_name = f"darkroom-{hashlib.sha256(bytes(self.folder)).hexdigest()[:12]}@localhost"
        self._epmd: ServerProcess | None = None
        self._server: ServerProcess | None = None
        self._console: ErlangConsole | None = None

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@{self.host}:{self.port}/%2F"

    @property
    def pid(self) -> int:
        """The process of the running node, for signals. Raises `ServerError` while it is stopped."""
        return self._running().pid

    def env(self) -> dict[str, str]:
        """Return the variables that point a worker here."""
        return {"RABBITMQ_HOST": self.host, "RABBITMQ_PORT": str(self.port)}

    def start(self) -> None:
        """Start the node, on the data an earlier run left; return once it speaks AMQP, else raise `ServerError`."""
        if self._server is not None:
            raise ServerError("the node runs already")
        (self.folder / "plugins").write_text("[].\n")
        # Ours, in the foreground: a node that finds none starts a daemon that would stay behind.
        epmd = [self._installation.epmd(), "-port", str(self._epmd_port), "-address", "127.0.0.1"]
        self._epmd = self._launch(epmd, log=self.folder / "epmd.log")
        self._server = self._launch([self._installation.script("rabbitmq-server")], log=self.folder / "server.log")
        try:
            self._server.wait_until(self._speaks_amqp, timeout_seconds=START_SECONDS)
        except ServerError:
            self.kill()
            raise

    def _launch(self, command: list[str], *, log: Path) -> ServerProcess:
        command = self._installation.command(command, folder=self.folder)
        return ServerProcess(command, env=self._node_env(), log=log, cwd=self.folder)

    def stop(self) -> None:
        """Shut the node down in order; nothing of it runs afterwards. Harmless where it is stopped."""
        if self._server is not None:
            self._server.stop(STOP_SECONDS)
        self.kill()

    def kill(self) -> None:
        """End the node by SIGKILL, as a power cut would. `start` brings it back on the same port and data."""
        for process in (self._server, self._epmd):
            if process is not None:
                process.kill()
        self._server = self._epmd = None
        if self._console is not None:
            self._console.close()
            self._console = None

    def ctl(self, *args: str) -> str:
        """Run `rabbitmqctl args…` against the running node; return what it prints, raise `ServerError` if it fails."""
        self._running()
        done = subprocess.run(
            self._installation.command([self._installation.script("rabbitmqctl"), *args], folder=self.folder),
            env=self._node_env(),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=CTL_SECONDS,
            check=False,
        )
        if done.returncode != 0:
            raise ServerError(f"rabbitmqctl {' '.join(args)}: {done.stdout}{done.stderr}")
        return done.stdout

    def queues(self) -> dict[str, QueueDepth]:
        """Read the depth of every queue, within a millisecond but for the first time. Raises `ServerError`."""
        return self._opened_console().queues()

    def close_connections(self) -> None:
        """Close every client's connection, as `rabbitmqctl close_all_connections` does, but at once."""
        self._opened_console().close_connections()

    def evaluate(self, expression: str) -> None:
        """Evaluate Erlang on the node, as `rabbitmqctl eval` does, but at once. Raises `ServerError` where it fails."""
        self._opened_console().evaluate(expression)

    def _opened_console(self) -> ErlangConsole:
        self._running()
        if self._console is None:
            self._console = ErlangConsole(self._node_name, self._node_env(), self.folder, self._installation)
        return self._console

    def _running(self) -> ServerProcess:
        if self._server is None:
            raise ServerError("the node is stopped")
        return self._server

    def _node_env(self) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "LANG": "C.UTF-8",
            "HOME": str(self.folder),  # the Erlang cookie lies there
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": self._node_name,
            "RABBITMQ_NODE_IP_ADDRESS": self.host,
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self._dist_port),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "data"),
            "RABBITMQ_LOG_BASE": str(self.folder / "log"),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "plugins"),
            "RABBITMQ_CONFIG_FILE": str(self.folder / "rabbitmq"),
            "RABBITMQ_CONF_ENV_FILE": str(self.folder / "rabbitmq-env.conf"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            # The script then becomes the node by exec, so that a signal to our child reaches the node itself.
            "RUNNING_UNDER_SYSTEMD": "true",
        }

    def _speaks_amqp(self) -> bool:
        try:
            with socket.create_connection((self.host, self.port), timeout=10) as connection:
                connection.sendall(AMQP_HEADER)
                return connection.recv(1) == METHOD_FRAME
        except OSError:
            return False
