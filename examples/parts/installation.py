"""Where RabbitMQ is installed: on this machine, or in the root folder of another Debian (`RABBITMQ_ROOT`)."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from examples.parts.processes import ServerError

ROOT_VARIABLE = "RABBITMQ_ROOT"

# Debian's /usr/sbin/rabbitmq-server is a wrapper that insists on the user `rabbitmq`; the script below lib does not.
SCRIPT_FOLDERS = (
    "/usr/lib/rabbitmq/bin",
    "/opt/rabbitmq/sbin",
    "/usr/local/opt/rabbitmq/sbin",
    "/opt/homebrew/opt/rabbitmq/sbin",
)
EPMD_PATTERN = "lib/erlang/erts-*/bin/epmd"

# The mounts are in a namespace of the command's own: they are gone with it. `exec` all the way keeps the process id.
ENTER = """
root=$1 folder=$2; shift 2
mkdir -p "$root$folder"
mount --bind "$folder" "$root$folder"
mount --rbind /dev "$root/dev"
mount --rbind /proc "$root/proc"
exec chroot "$root" env --chdir="$folder" "$@"
"""


class Installation:
    """A RabbitMQ and its Erlang. Running one in another root takes the superuser (mounts, chroot)."""

    def __init__(self, root: Path | None = None) -> None:
        """`root`: as debootstrap makes it. None: the folder named by `RABBITMQ_ROOT`, else this machine."""
        given = os.environ.get(ROOT_VARIABLE)
        self._root = root or (Path(given).resolve() if given else None)

    def command(self, command: Sequence[str], *, folder: Path) -> list[str]:
        """Build the argument list that runs `command` of this installation in `folder`, seen there by the same path."""
        if self._root is None:
            return list(command)
        return ["unshare", "--mount", "/bin/sh", "-ec", ENTER, "enter", str(self._root), str(folder), *command]

    def script(self, name: str) -> str:
        """Find the path of a RabbitMQ script, as the installation sees it. Raises `ServerError`."""
        for folder in SCRIPT_FOLDERS:
            if self._here(f"{folder}/{name}").exists():
                return f"{folder}/{name}"
        where = f" in {self._root}" if self._root else ""
        raise ServerError(f"{name} is in none of {', '.join(SCRIPT_FOLDERS)}{where}: install rabbitmq-server")

    def epmd(self) -> str:
        """Find the path of Erlang's name daemon, as the installation sees it. Raises `ServerError`."""
        found = shutil.which("epmd") if self._root is None else None
        for prefix in ("/usr", "/usr/local"):
            found = found or next((f"{prefix}/{path}" for path in self._relative(prefix, EPMD_PATTERN)), None)
        if found is None:
            raise ServerError("epmd is not on the PATH: install rabbitmq-server (make install)")
        return found

    def _here(self, path: str) -> Path:
        return Path(f"{self._root or ''}{path}")

    def _relative(self, prefix: str, pattern: str) -> list[Path]:
        here = self._here(prefix)
        return [path.relative_to(here) for path in here.glob(pattern)]
