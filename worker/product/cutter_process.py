"""The process that cuts products out: `python -m worker.product.cutter_process MODEL PARENT`. `Cutter` starts it.

It reads a PNG from its standard input, writes the RGBA PNG of the cut-out to its standard output, and ends. So a
model's memory is taken for one image only, and a crash in a native library costs that image only.
"""

import contextlib
import io
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import rembg
from PIL import Image
from scipy.ndimage import gaussian_filter

from inference.process.parent_death import die_with_parent

# rembg's sessions for a model file, by the side in px of the model's input; they differ in how they scale colours:
# U2-Net and IS-Net (DIS).
SESSIONS = {320: "u2net_custom", 1024: "dis_custom"}
# Below it a mask is noise.
VISIBLE = 16
# How far the colours of opaque pixels reach into a soft edge, as a part of the shorter side.
REACH = 0.005

_Pixels = Any  # numpy's arrays of float32: height, width, channels


def main() -> None:
    """Cut one image out; the last line on standard error is the reason of a failure."""
    model, parent_pid = Path(sys.argv[1]), int(sys.argv[2])
    die_with_parent(parent_pid)
    # Standard output is for the answer alone: what libraries print goes to standard error from now on.
    answer = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    image = Image.open(io.BytesIO(sys.stdin.buffer.read()), formats=("PNG",)).convert("RGB")
    with answer:
        cut_out(image, mask_of(image, model)).save(answer, "PNG", compress_level=1)


def mask_of(image: Image.Image, model: Path) -> Image.Image:
    """Return the model's mask of the product, mode L."""
    # rembg opens only models below its home.
    os.environ["REMBG_HOME"] = str(model.resolve().parent)
    session = rembg.new_session(
        _session_name(model), model_path=str(model.resolve()), providers=["CPUExecutionProvider"]
    )
    mask: Image.Image = session.predict(image)[0]
    return mask


def cut_out(image: Image.Image, mask: Image.Image) -> Image.Image:
    """Return the RGB image with the mask, of its size, as alpha, and the product's own colours in the soft edge.

    Blur fusion (Forte, "Approximate Fast Foreground Colour Estimation", 2021): foreground and background are smooth, so
    that blurred estimates of both leave F + alpha (I - alpha F - (1 - alpha) B).
    """
    alpha = np.asarray(mask)
    alpha = np.where(alpha < VISIBLE, 0, alpha).astype(np.uint8)
    radius = max(1.5, REACH * min(image.size))
    seen, share = np.asarray(image, np.float32), alpha.astype(np.float32)[..., None] / 255
    front, back = _spread(seen, share, radius), _spread(seen, 1 - share, radius)
    unmixed = front + share * (seen - share * front - (1 - share) * back)
    colours = np.where(share == 1, seen, unmixed)
    return Image.fromarray(np.dstack((np.rint(colours).clip(0, 255).astype(np.uint8), alpha)))


def _spread(seen: _Pixels, weight: _Pixels, radius: float) -> _Pixels:
    """Return the colours blurred, each pixel's by its weight; the image's own where no pixel near has a weight."""
    amount = gaussian_filter(weight, (radius, radius, 0))
    return np.where(amount > 1e-3, gaussian_filter(seen * weight, (radius, radius, 0)) / np.maximum(amount, 1e-3), seen)


def _session_name(model: Path) -> str:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    side = session.get_inputs()[0].shape[-1]
    # A side that the file leaves open is a name or nothing.
    name = SESSIONS.get(side if isinstance(side, int) else 320)
    if name is None:
        raise SystemExit(f"takes pictures of {side} px; known are {' and '.join(map(str, SESSIONS))}")
    return name


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
