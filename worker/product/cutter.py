"""Cut products out by rembg, in a process for each image."""

import io
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from inference.process.child_handle import path_variables
from watermark.product.cutout import (
    CutoutFailed,
    check_cutout,
    has_transparency,
    limit_size,
    trim,
)
from worker.errors import CuttingFailed, ErrorCode, JobFailed

# On one slow core; u2net.onnx takes some seconds there.
DEADLINE_SECONDS = 120
# Between two checks whether the job is still wanted.
POLL_SECONDS = 0.2
MAX_REASON_CHARS = 300
# What the libraries need; none of the worker's own, above all no secret.
INHERITED_VARIABLES = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "HOME", "TMPDIR", "LANG")


class Cutter:
    """Owner of the cut-out processes, one at a time: each takes as much memory as its model.

    `model` is an ONNX file with U2-Net's or IS-Net's interface; None: this worker has none.
    """

    def __init__(self, model: Path | None, *, deadline_seconds: int = DEADLINE_SECONDS) -> None:
        self._model = model
        self._deadline_seconds = deadline_seconds
        self._lock = threading.Lock()

    def cut(self, image: Image.Image, field: str, raise_if_unwanted: Callable[[], None]) -> Image.Image:
        """Return the product of the RGBA image in `field` of the message: RGBA, trimmed, cut out by its own alpha or by
        the model.

        `raise_if_unwanted` is polled. Raises `JobFailed` where there is no model or nothing to cut out, `CuttingFailed`
        where the process crashed or hung.
        """
        try:
            self.check(image, field)
            if self._model is None or has_transparency(image):
                return trim(image)
            return check_cutout(self._cut_by_model(self._model, limit_size(image.convert("RGB")), raise_if_unwanted))
        except CutoutFailed as error:
            raise JobFailed(
                ErrorCode.IMAGE_INVALID, f"{field}: {error}; send a cut-out as product.cutout_path"
            ) from error

    def check(self, image: Image.Image, field: str) -> None:
        """Raise `JobFailed` where the image has no alpha and there is no model."""
        if self._model is None and not has_transparency(image):
            raise JobFailed(
                ErrorCode.UNSUPPORTED_BY_MODEL,
                f"{field} has no alpha and this worker has no CUTOUT_MODEL: send a cut-out with alpha as"
                " product.cutout_path",
            )

    def _cut_by_model(self, model: Path, image: Image.Image, raise_if_unwanted: Callable[[], None]) -> Image.Image:
        while not self._lock.acquire(timeout=POLL_SECONDS):
            raise_if_unwanted()
        try:
            return self._run_process(model, image, raise_if_unwanted)
        finally:
            self._lock.release()

    def _run_process(self, model: Path, image: Image.Image, raise_if_unwanted: Callable[[], None]) -> Image.Image:
        content = io.BytesIO()
        image.save(content, "PNG", compress_level=1)
        command = [sys.executable, "-m", "worker.product.cutter_process", str(model), str(os.getpid())]
        pipe = subprocess.PIPE
        kept = {name: os.environ[name] for name in INHERITED_VARIABLES if name in os.environ}
        # rembg imports a library that compiles for a minute, and that the cutting does not call.
        env = kept | path_variables() | {"NUMBA_DISABLE_JIT": "1"}
        # In a session of its own, so that Ctrl-C in a terminal does not reach it.
        with subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, env=env, start_new_session=True
        ) as process:
            try:
                answer, said = self._answer_of(process, content.getvalue(), raise_if_unwanted)
            finally:
                process.kill()
        if process.returncode < 0:
            raise CuttingFailed(f"the process that cuts out was killed by signal {-process.returncode}")
        if process.returncode > 0:
            lines = said.decode(errors="replace").strip().splitlines() or [f"exit code {process.returncode}"]
            raise CuttingFailed(lines[-1][:MAX_REASON_CHARS])
        with Image.open(io.BytesIO(answer), formats=("PNG",)) as cut:
            return cut.convert("RGBA")

    def _answer_of(
        self, process: "subprocess.Popen[bytes]", content: bytes, raise_if_unwanted: Callable[[], None]
    ) -> tuple[bytes, bytes]:
        ends_at = time.monotonic() + self._deadline_seconds
        unsent: bytes | None = content
        while True:
            try:
                return process.communicate(unsent, timeout=POLL_SECONDS)
            except subprocess.TimeoutExpired:
                unsent = None  # communicate keeps what it was given
                raise_if_unwanted()
                if time.monotonic() > ends_at:
                    raise CuttingFailed(f"no answer within {self._deadline_seconds} s") from None
