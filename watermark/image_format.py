"""File formats of finished images."""

from enum import StrEnum


class ImageFormat(StrEnum):
    """A file format of finished images, by its MIME type."""

    PNG = "image/png"
    JPEG = "image/jpeg"
