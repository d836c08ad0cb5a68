"""Where the steps of a machine are taken: in its root, here on its broker, or here with another Python."""

import os
import shutil
from pathlib import Path
from typing import Protocol

from examples.parts.installation import ROOT_VARIABLE
from tests.matrix.machines import INSTALL, Machine
from tests.matrix.roots import NAMESPACES, Run, enter, make_root
from tests.support.checkout import copy_checkout
from tests.support.paths import ROOT

PYTHON312 = os.environ.get("PYTHON312") or "python3.12"
CHECKOUT = "darkroom"
ASK_RABBITMQ = "dpkg-query --show --showformat '${Version}' rabbitmq-server"
ASK_PYTHON = ".venv/bin/python -c 'import platform; print(platform.python_version())'"


class Place(Protocol):
    """Knows how to run a shell's command for a machine."""

    def make(self, run: Run) -> None:
        """Make it from nothing. Raises `OSError`, `ValueError` or what `run` raises."""

    def refresh(self) -> None:
        """Bring today's checkout there; what was made in it stays."""

    def command(self, line: str) -> list[str]:
        """Build the argument list that runs `line` in the checkout."""

    def ask_python(self) -> list[str]:
        """Build the argument list that prints the version of Python."""

    def ask_rabbitmq(self) -> list[str]:
        """Build the argument list that prints the version of RabbitMQ."""


class WholeRoot:
    """Everything is in the root: the checkout, its environment, the broker."""

    def __init__(self, machine: Machine, folder: Path) -> None:
        self._machine, self._root = machine, folder / "root"

    def make(self, run: Run) -> None:
        make_root(self._machine, self._root, run)

    def refresh(self) -> None:
        _refresh(self._root / CHECKOUT)

    def command(self, line: str) -> list[str]:
        return enter(self._root, f"cd /{CHECKOUT}; {line}")

    def ask_python(self) -> list[str]:
        return self.command(ASK_PYTHON)

    def ask_rabbitmq(self) -> list[str]:
        return enter(self._root, ASK_RABBITMQ)


class BrokersRoot:
    """The root has a broker; the checkout is this one, with its environment."""

    def __init__(self, machine: Machine, folder: Path) -> None:
        self._machine, self._root = machine, folder / "root"

    def make(self, run: Run) -> None:
        make_root(self._machine, self._root, run)

    def refresh(self) -> None:
        """Leave this checkout as it is."""

    def command(self, line: str) -> list[str]:
        return _here(ROOT, f"export {ROOT_VARIABLE}={self._root}; {line}")

    def ask_python(self) -> list[str]:
        return self.command(ASK_PYTHON)

    def ask_rabbitmq(self) -> list[str]:
        return enter(self._root, ASK_RABBITMQ)


class OtherPython:
    """This machine, with another Python in a checkout of its own."""

    def __init__(self, folder: Path) -> None:
        self._checkout = folder / CHECKOUT

    def make(self, run: Run) -> None:
        shutil.rmtree(self._checkout, ignore_errors=True)
        run([PYTHON312, "--version"])

    def refresh(self) -> None:
        _refresh(self._checkout)

    def command(self, line: str) -> list[str]:
        return _here(self._checkout, f"export PYTHON={PYTHON312}; {line}")

    def ask_python(self) -> list[str]:
        return self.command(ASK_PYTHON)

    def ask_rabbitmq(self) -> list[str]:
        return _here(self._checkout, ASK_RABBITMQ)


def place_of(machine: Machine, folder: Path) -> Place:
    """Choose where the machine's steps are taken; what they need is made in `folder`."""
    if not machine.suite:
        return OtherPython(folder)
    return WholeRoot(machine, folder) if INSTALL in machine.steps else BrokersRoot(machine, folder)


def _here(folder: Path, line: str) -> list[str]:
    return [*NAMESPACES, "--mount-proc", "/bin/sh", "-ec", f"cd {folder}; {line}"]


def _refresh(checkout: Path) -> None:
    checkout.mkdir(parents=True, exist_ok=True)
    for child in checkout.iterdir():
        if child.name not in (".venv", "out"):
            shutil.rmtree(child) if child.is_dir() else child.unlink()
    copy_checkout(checkout)
