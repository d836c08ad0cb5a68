"""`make image`: build a target of the Dockerfile without a Docker engine, and run `darkroom check` in what comes out.

Debian's buildah takes each step in a chroot, on a base that debootstrap makes: neither an engine nor a registry of
images is needed, but root is. `IMAGE_MOUNTS` (host:container, comma-separated) are shown to the steps read-only: a
/etc/pip.conf, say, or the certificates of a mirror. The target `cuda` takes 25 GB of the disk while it is made, and its
check is of the CPU where there is no GPU.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from examples.parts.backend import Backend
from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS
from tests.support.paths import ROOT

BASE, SUITE = "docker.io/library/debian:trixie-slim", "trixie"
MODEL = ROOT / "examples" / "demo_model" / "checkpoint"
MODEL_INSIDE = "/models/demo"
BUCKET = "media"
# As the steps of an image are taken by an engine, but in a chroot and on this machine's network.
CHROOT = ("--isolation", "chroot", "--network", "host")


def main(target: str) -> int:
    tag = f"darkroom:{target}"
    if not _said("buildah", "images", "--quiet", "--filter", f"reference={BASE}"):
        make_base()
    mounts = [f"--volume={mount}:ro" for mount in os.environ.get("IMAGE_MOUNTS", "").split(",") if mount]
    index = os.environ.get("TORCH_INDEX_URL")
    arguments = [] if index is None else [f"--build-arg=TORCH_INDEX_URL={index}"]
    options = ["--format=docker", "--layers", f"--target={target}", f"--tag={tag}", *arguments, *mounts]
    _run("buildah", "build", *CHROOT, *options, str(ROOT))
    return check(tag)


def make_base() -> None:
    """Build what the Dockerfile begins with out of Debian's own packages."""
    with tempfile.TemporaryDirectory(prefix="darkroom-image-") as folder:
        _run("debootstrap", "--variant=minbase", SUITE, folder)
        with _container("scratch") as container:
            _run("buildah", "add", "--quiet", container, folder, "/")
            _run("buildah", "commit", "--quiet", container, BASE)


def check(tag: str) -> int:
    """Run `darkroom check` as the image's own user, beside private real parts; return the exit code."""
    with (
        tempfile.TemporaryDirectory(prefix="darkroom-") as folder,
        RabbitMQ(Path(folder) / "rabbitmq") as rabbitmq,
        SeaweedFS(Path(folder) / "seaweedfs") as store,
        Backend() as backend,
        _container(tag) as container,
    ):
        store.make_bucket(BUCKET)
        settings = rabbitmq.env() | store.env(BUCKET) | backend.env()
        settings |= {"MODEL_ID": MODEL_INSIDE, "CACHE_MAX_GB": "1", "HF_HUB_OFFLINE": "1"}
        environment = [f"--env={name}={value}" for name, value in settings.items()]
        mount = f"--volume={MODEL}:{MODEL_INSIDE}:ro"
        command = ["buildah", "run", *CHROOT, *environment, mount, container, "darkroom", "check"]
        return subprocess.run(command, check=False).returncode


@contextmanager
def _container(image: str) -> Iterator[str]:
    name = _said("buildah", "from", image)
    try:
        yield name
    finally:
        _said("buildah", "rm", name)


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


def _said(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
