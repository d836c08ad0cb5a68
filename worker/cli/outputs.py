"""The output files of `darkroom generate`: their names, their format, and whether they can be written."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from watermark.image_format import ImageFormat

FORMATS = {".png": ImageFormat.PNG, ".jpg": ImageFormat.JPEG, ".jpeg": ImageFormat.JPEG}
KNOWN = ", ".join(FORMATS)


class OutputRefused(Exception):
    """A picture cannot be written to that path; the message says why and what to name instead."""


@dataclass(frozen=True, slots=True)
class Output:
    """A picture's output file and format."""

    path: Path
    format: ImageFormat


def outputs_of(out: Path, num_images: int) -> list[Output]:
    """Return `out`, and for more pictures its name with -2, -3 …. An existing file is overwritten.

    Raises `OutputRefused` where one of them could not be written; leaves no trace.
    """
    if out.is_dir():
        raise OutputRefused(f"--out {out} is a folder: name a file in it, like {out / 'picture.png'}")
    image_format = FORMATS.get(out.suffix.lower())
    if image_format is None:
        named = f"ends with {out.suffix}" if out.suffix else "has no suffix"
        raise OutputRefused(f"--out {out} {named}: pictures are written as {KNOWN}, like {out.with_suffix('.png')}")
    folder = out.parent
    if not folder.is_dir():
        is_file = folder.exists()
        why = "is a file, not a folder" if is_file else f"does not exist: mkdir -p {folder}, or name another"
        raise OutputRefused(f"--out: the folder {folder} {why}")
    try:
        # Permissions alone are not enough: a file system may be read-only.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputRefused(f"--out: nothing can be written in the folder {folder} ({error.strerror})") from error
    paths = [out, *(out.with_stem(f"{out.stem}-{number}") for number in range(2, num_images + 1))]
    for path in paths:
        _check_file(path)
    return [Output(path, image_format) for path in paths]


def _check_file(path: Path) -> None:
    try:
        if path.exists():
            if not path.is_file():
                raise OutputRefused(f"--out {path} exists and is no file: name another")
            with path.open("r+b"):
                pass
    except OSError as error:
        raise OutputRefused(f"--out {path} cannot be written ({error.strerror})") from error
