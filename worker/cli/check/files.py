"""The certificate that C2PA manifests are signed with: signs it, and for how long yet?"""

from config.images import PictureSettings
from config.section import SettingsError
from worker.cli.check.checks import CheckFailed
from worker.results.image_metadata import load_signer


def check_certificate(settings: PictureSettings) -> str:
    """Sign a picture of one pixel, as every worker does before its first job."""
    try:
        signer = load_signer(settings)
    except SettingsError as error:
        raise CheckFailed(str(error)) from error
    if signer is None:
        return "none is configured: pictures carry no C2PA manifest"
    credentials = signer.credentials
    return f"{credentials.subject} signs by {credentials.algorithm}, for {credentials.days_left} days yet"
