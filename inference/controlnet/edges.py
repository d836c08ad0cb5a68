"""The edges of a picture, as Canny ControlNets were shown them in training."""

import numpy as np
from numpy.typing import NDArray

# Gradients below the first are no edge, above the second they are; between them, where they go on from one. The
# values of the ControlNets' own published examples, for gradients as OpenCV measures them.
LOW_THRESHOLD = 100
HIGH_THRESHOLD = 200


def find_edges(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """White lines on black, [height, width, 3], of a picture [height, width, 3]. Canny's algorithm (1986) by OpenCV."""
    import cv2  # noqa: PLC0415 - 60 MB that only jobs with edges need

    edges = cv2.Canny(rgb, LOW_THRESHOLD, HIGH_THRESHOLD)
    return np.repeat(np.asarray(edges, np.uint8)[:, :, None], 3, axis=2)
