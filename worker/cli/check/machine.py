"""The machine's own parts: fonts and disk."""

import shutil
import tempfile
from pathlib import Path

from PIL import features

from config.store import StoreSettings
from inference.checkpoints.weight_files import GB
from watermark.errors import FontMissing
from watermark.text.fonts import find_font
from watermark.text.shaping import is_shaping_here
from worker.cli.check.checks import CheckFailed

SAMPLE = "서울 Seoul"
PROBE_BYTES = bytes(4096)


def check_fonts(font_dirs: tuple[Path, ...]) -> str:
    """Is there a font for signatures, with Hangul?"""
    try:
        return f"signatures are written in {find_font(SAMPLE, font_dirs).name}"
    except FontMissing as error:
        remedy = "install a font with Hangul, like Debian's fonts-nanum, or name its folder in FONT_DIRS"
        raise CheckFailed(f"{error}: {remedy}") from error


def check_shaping() -> str:
    """Are letters joined, and drawn from right to left, where the script wants it?"""
    if not is_shaping_here():
        raise CheckFailed(
            "libfribidi is missing: texts in Arabic, Hebrew, Devanagari, Thai and their like are refused with "
            "FONT_MISSING; install Debian's libfribidi0 or what the system calls it"
        )
    versions = ", ".join(f"{library} {features.version(library)}" for library in ("raqm", "harfbuzz", "fribidi"))
    return f"letters are joined, and drawn from right to left, by {versions}"


def check_disk(settings: StoreSettings) -> str:
    """Can the download cache be written, and grow as large as it may? Makes no folder."""
    folder = settings.cache_dir.expanduser()
    place = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=place) as probe:
            probe.write(PROBE_BYTES)
            probe.flush()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise CheckFailed(f"CACHE_DIR {folder} cannot be written ({reason}: {place}): name another folder") from error
    return _compare(settings, folder, shutil.disk_usage(place).free)


def _compare(settings: StoreSettings, folder: Path, free: int) -> str:
    """What the cache holds counts as free: it gives way to what is wanted."""
    cached = sum(path.stat().st_size for path in folder.glob("*") if path.is_file())
    room = f"{(free + cached) / GB:.1f} GB"
    if free + cached < settings.cache_max_bytes:
        remedy = f"free space, set CACHE_MAX_GB below {(free + cached) / GB:.1f}, or name another CACHE_DIR"
        raise CheckFailed(f"CACHE_MAX_GB is {settings.cache_max_gb:g}, but {folder} has room for {room}: {remedy}")
    return f"{folder} has room for {room}; the cache takes {settings.cache_max_gb:g} GB at most"
