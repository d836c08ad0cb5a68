"""The model that cuts products out: is it there, and does it cut?"""

import time

from PIL import Image, ImageDraw

from config.images import PictureSettings
from worker.cli.check.checks import CheckFailed
from worker.errors import CuttingFailed, JobFailed
from worker.product.cutter import Cutter, is_installed

SIDE_PX = 256


def check_cutout(settings: PictureSettings) -> str:
    """Cut a drawn disc out of a white picture, as of a product that has no alpha."""
    model = settings.cutout_model
    if model is None:
        return "no CUTOUT_MODEL: products need alpha of their own"
    if not is_installed():
        raise CheckFailed("CUTOUT_MODEL is set, but rembg is not installed: pip install 'darkroom[cutout]'")
    began_at = time.monotonic()
    try:
        Cutter(model).cut(_disc(), "the picture of this check", lambda: None)
    except CuttingFailed as error:
        raise CheckFailed(f"{model} cannot be used: {error}. Look at CUTOUT_MODEL") from error
    except JobFailed:
        return f"{model} answers in {time.monotonic() - began_at:.1f} s, but sees no product in a drawn disc"
    return f"{model} cuts out, in {time.monotonic() - began_at:.1f} s"


def _disc() -> Image.Image:
    picture = Image.new("RGBA", (SIDE_PX, SIDE_PX), "white")
    ImageDraw.Draw(picture).ellipse((64, 64, 192, 192), fill=(120, 40, 30))
    return picture
