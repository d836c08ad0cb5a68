"""Errors of images, texts, fonts and manifests; each message is written for the person who can correct the cause."""


class WatermarkError(Exception):
    """Base of the errors below."""


class SignatureInvalid(WatermarkError):
    """The signature image or text is not drawable: wrong format, too large, broken, or invisible."""


class OverlayInvalid(WatermarkError):
    """The text of a headline is not drawable: control characters, or nothing visible."""


class FontMissing(WatermarkError):
    """No installed font has every character of a text, or none has the requested name."""


class ShapingMissing(FontMissing):
    """A text needs shaping that this process lacks, whatever fonts are installed."""


class ImageInvalid(WatermarkError):
    """A reference image is not supported: wrong format, broken, or an animation."""


class ImageTooLarge(WatermarkError):
    """A reference image has more pixels than are decoded."""


class ManifestNotSigned(WatermarkError):
    """The image's C2PA manifest cannot be signed, as with a certificate that expired while the worker ran."""
