"""Root folders of other distributions: made by debootstrap, entered in namespaces of their own."""

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import requests

from tests.matrix.machines import UBUNTU, Machine

Run = Callable[[Sequence[str]], object]

ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"}
# What a person may set for `make install`.
HANDED_DOWN = ("TORCH_INDEX_URL",)
# Mounts and processes end with the first process in here, and that one with us, whatever ends us.
NAMESPACES = ("unshare", "--mount", "--pid", "--fork", "--kill-child")
ENTER = """
root=$1 command=$2; shift 2
mount -t proc proc "$root/proc"
for folder in /dev /sys; do mount --rbind "$folder" "$root$folder"; done
for pair; do
    inside=$root/${pair#*:}
    mkdir -p "$(dirname "$inside")"
    if [ -d "${pair%%:*}" ]; then mkdir -p "$inside"; else touch "$inside"; fi
    mount --bind "${pair%%:*}" "$inside"
done
exec chroot "$root" /bin/sh -ec "$command"
"""
# RUNLEVEL=1 keeps Debian from starting servers.
APT_INSTALL = "RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends"
# Older debootstraps do not know newer releases: a distribution's are all made by one script.
DEBIAN_SCRIPT, UBUNTU_SCRIPT = "/usr/share/debootstrap/scripts/sid", "/usr/share/debootstrap/scripts/gutsy"
# Debian 12 has no package of Ubuntu's keys. This is Ubuntu's own, known by its hash.
UBUNTU_KEYS = f"{UBUNTU}/pool/main/u/ubuntu-keyring/ubuntu-keyring_2023.11.28.1_all.deb"
UBUNTU_KEYS_SHA256 = "36de43b15853ccae0028e9a767613770c704833f82586f28eb262f0311adb8a8"
UBUNTU_KEYRING = "usr/share/keyrings/ubuntu-archive-keyring.gpg"


def is_reached(machine: Machine) -> bool:
    """Ask the machine's archive for its release."""
    try:
        return requests.head(f"{machine.mirror}/dists/{machine.suite}/InRelease", timeout=30).ok
    except requests.RequestException:
        return False


def make_root(machine: Machine, root: Path, run: Run) -> None:
    """Make the root from nothing, with the machine's packages in it."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    is_ubuntu = machine.mirror == UBUNTU
    options = ["--components=main,universe", f"--keyring={fetch_ubuntu_keyring(root.parent, run)}"] if is_ubuntu else []
    script = UBUNTU_SCRIPT if is_ubuntu else DEBIAN_SCRIPT
    run(["debootstrap", "--variant=minbase", *options, machine.suite, str(root), machine.mirror, script])
    for name in ("hosts", "resolv.conf"):  # debootstrap writes no hosts, and not every release knows localhost without
        shutil.copy(f"/etc/{name}", root / "etc" / name)
    run(enter(root, f"apt-get update -qq; {APT_INSTALL} {' '.join(machine.packages)}"))


def fetch_ubuntu_keyring(folder: Path, run: Run) -> Path:
    """Fetch what Ubuntu signs its archive with. Raises `ValueError` for another content."""
    answer = requests.get(UBUNTU_KEYS, timeout=60)
    answer.raise_for_status()
    if (found := hashlib.sha256(answer.content).hexdigest()) != UBUNTU_KEYS_SHA256:
        raise ValueError(f"{UBUNTU_KEYS} has the SHA-256 {found}, not {UBUNTU_KEYS_SHA256}")
    package = folder / "ubuntu-keyring.deb"
    package.write_bytes(answer.content)
    run(["dpkg-deb", "--extract", str(package), str(folder / "keyring")])
    return folder / "keyring" / UBUNTU_KEYRING


def enter(root: Path, command: str) -> list[str]:
    """Build the argument list that runs a shell's command in the root, which sees `MATRIX_MOUNTS` (here:there, …)."""
    mounts = filter(None, os.environ.get("MATRIX_MOUNTS", "").split(","))
    handed_down = {name: os.environ[name] for name in HANDED_DOWN if name in os.environ}
    environment = [f"{name}={value}" for name, value in (ENVIRONMENT | handed_down).items()]
    return ["env", "-i", *environment, *NAMESPACES, "/bin/sh", "-ec", ENTER, "enter", str(root), command, *mounts]
