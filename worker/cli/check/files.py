"""Check what is installed or named as files: fonts, the C2PA certificate, the presets with their adapters."""

from pathlib import Path

from PIL import features

from clients.storage.client import Storage
from clients.storage.errors import StorageError
from config.images import ImageSettings
from config.section import SettingsError
from config.settings import Settings
from watermark.errors import FontMissing
from watermark.text.fonts import find_font
from watermark.text.shaping import is_shaping_here
from worker.cli.check.checks import CheckFailed
from worker.jobs.inputs.peft_folders import PEFT_CONFIG, PEFT_WEIGHTS
from worker.messages.decoder import rules_from
from worker.results.image_metadata import load_signer

SAMPLE = "서울 Seoul"


def check_certificate(settings: ImageSettings) -> str:
    """Sign a picture of one pixel, as every worker does before its first job."""
    try:
        signer = load_signer(settings)
    except SettingsError as error:
        raise CheckFailed(str(error)) from error
    if signer is None:
        return "none is configured: pictures carry no C2PA manifest"
    credentials = signer.credentials
    return f"{credentials.subject} signs by {credentials.algorithm}, for {credentials.days_left} days yet"


def check_presets(settings: Settings) -> str:
    """Check that every adapter that a preset names is in the store."""
    rules = rules_from(settings.model, settings.store, settings.images)
    presets, storage = rules.presets(), Storage(settings.store)
    for place, adapter in presets.adapters.items():
        try:
            ref = rules.locate(adapter.path)
            if not ref.key.lower().endswith(".safetensors"):  # a PEFT folder, or its config
                ref = (ref.parent if ref.name == PEFT_CONFIG else ref).child(PEFT_WEIGHTS)
            storage.head(ref)
        except StorageError as error:
            raise CheckFailed(
                f"the adapter of {place}: {error}. Store the adapter there, or take it out of PRESETS_FILE"
            ) from error
    source = settings.images.presets_file or "the built-in file"
    return f"{len(presets.styles)} styles and {len(presets.industries)} industries in {source}"


def check_fonts(font_dirs: tuple[Path, ...]) -> str:
    """Find a font for signatures, with Hangul."""
    try:
        return f"signatures are written in {find_font(SAMPLE, font_dirs).name}"
    except FontMissing as error:
        remedy = "install a font with Hangul, like Debian's fonts-nanum, or name its folder in FONT_DIRS"
        raise CheckFailed(f"{error}: {remedy}") from error


def check_shaping() -> str:
    """Check that complex scripts are shaped: letters joined, and drawn from right to left."""
    if not is_shaping_here():
        raise CheckFailed(
            "libfribidi is missing: texts in Arabic, Hebrew, Devanagari, Thai and their like are refused with "
            "FONT_MISSING; install Debian's libfribidi0 or what the system calls it"
        )
    versions = ", ".join(f"{library} {features.version(library)}" for library in ("raqm", "harfbuzz", "fribidi"))
    return f"letters are joined, and drawn from right to left, by {versions}"
