"""A copy of the checkout."""

import shutil
import subprocess
from pathlib import Path

from tests.support.paths import ROOT


def copy_checkout(folder: Path) -> None:
    """Copy what git has or would have of this checkout."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout
    for name in filter(None, listed.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
