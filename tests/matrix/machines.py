"""The machines that people have: a release of a distribution, or a part of one, and what is run there."""

import os
from typing import NamedTuple

DEBIAN = os.environ.get("DEBIAN_MIRROR") or "http://deb.debian.org/debian"
UBUNTU = os.environ.get("UBUNTU_MIRROR") or "http://archive.ubuntu.com/ubuntu"
# What the README asks for before its two commands.
PREREQUISITES = ("make", "ca-certificates", "python3", "python3-venv")
PYTEST = "OMP_NUM_THREADS=1 .venv/bin/pytest -n 2 --dist loadfile --no-loadscope-reorder"


class Step(NamedTuple):
    """A shell's command in a checkout. It is done where it exits with 0."""

    name: str
    command: str


INSTALL = Step("install", "make install")
DEMO = Step("demo", "make demo")
TEST = Step("test", "make test")
BROKER = Step(
    "broker",
    f"LONG=1 {PYTEST} tests/examples/test_parts.py tests/live/test_returns.py tests/live/drawing/test_jobs.py"
    " tests/live/test_queues.py tests/live/test_leases.py tests/live/test_cancelling.py tests/worker/amqp"
    " tests/worker/cli/check tests/worker/cli/test_dead_letters.py tests/worker/monitoring/test_prometheus.py",
)
FAULTS = Step("faults", f"{PYTEST} tests/faults tests/live/test_faults*.py tests/live/test_effect.py")
CAMPAIGNS = Step("campaigns", f"{PYTEST} tests/campaigns")

WHOLE = (DEMO, INSTALL, TEST, BROKER)  # the demo alone needs less than the tests
OF_A_BROKER = (BROKER, FAULTS, CAMPAIGNS)


class Machine(NamedTuple):
    """A root folder to make by debootstrap, without a `suite` this machine with a Python of another version."""

    name: str
    suite: str
    mirror: str
    packages: tuple[str, ...]
    steps: tuple[Step, ...]


MACHINES = (
    Machine("debian-13", "trixie", DEBIAN, PREREQUISITES, WHOLE),
    Machine("ubuntu-24.04", "noble", UBUNTU, PREREQUISITES, WHOLE),
    # The newest RabbitMQ of any distribution, for the tests in this checkout: its Python, 3.14, is not supported.
    Machine("debian-forky", "forky", DEBIAN, ("rabbitmq-server",), OF_A_BROKER),
)
# In the place of Ubuntu, where its archive is not reached.
PYTHON312 = Machine("python-3.12", "", "", (), WHOLE)
