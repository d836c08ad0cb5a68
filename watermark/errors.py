"""What can be wrong with a signature. Each message is for the person whose signature it is."""


class WatermarkError(Exception):
    """The signature cannot be put on a picture."""


class SignatureInvalid(WatermarkError):
    """The signature image or text is not one we draw: wrong format, too large, broken, or nothing would be seen."""


class FontMissing(WatermarkError):
    """No installed font has every character of the signature text."""
