"""What can be wrong with a picture somebody sent or its manifest. Each message is for the person whose it is."""


class WatermarkError(Exception):
    """Base of what can be wrong."""


class SignatureInvalid(WatermarkError):
    """The signature image or text is not one we draw: wrong format, too large, broken, or nothing would be seen."""


class OverlayInvalid(WatermarkError):
    """The text of a headline is not one we draw: control characters, or nothing would be seen."""


class FontMissing(WatermarkError):
    """No installed font has every character of a text, or none has the name that is asked for."""


class ShapingMissing(FontMissing):
    """A text is in a script that this process cannot draw, whatever fonts are there."""


class PictureInvalid(WatermarkError):
    """A reference picture is not one we read: wrong format, broken, or an animation."""


class PictureTooLarge(WatermarkError):
    """A reference picture has more pixels than are decoded."""


class ManifestNotSigned(WatermarkError):
    """The picture's C2PA manifest cannot be signed, as with a certificate that ended while the worker ran."""
