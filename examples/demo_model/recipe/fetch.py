"""The pictures' package, by the npm client: downloaded, compared with its published digest, unpacked."""

import base64
import hashlib
import io
import subprocess
import tarfile
import tempfile
from pathlib import Path

from examples.demo_model.recipe.settings import Workspace

PACKAGE = "@iconify-json/fluent-emoji-flat@1.2.6"
SHA512 = "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw=="
TIMEOUT_SECONDS = 300


class PackageAltered(Exception):
    """What came is not the package that this recipe was written for."""


def fetch(workspace: Workspace) -> dict[str, object]:
    """Leave the package's `icons.json` (a JSON object of SVG bodies) in the output folder."""
    archive = _download()
    workspace.icons.write_bytes(_member(archive, "package/icons.json"))
    return {"package": PACKAGE, "bytes": len(archive)}


def _download() -> bytes:
    """Download the package's archive. Raises `FileNotFoundError` without npm, `CalledProcessError` where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True, timeout=TIMEOUT_SECONDS)
        (archive,) = (path.read_bytes() for path in Path(folder).glob("*.tgz"))
    if base64.b64encode(hashlib.sha512(archive).digest()).decode() != SHA512:
        raise PackageAltered(f"{PACKAGE} has another digest than it had when this was written")
    return archive


def _member(archive: bytes, name: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive)) as package:
        member = package.extractfile(name)
        if member is None:
            raise PackageAltered(f"no {name} in the package")
        return member.read()
