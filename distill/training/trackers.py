"""Pictures for TensorBoard and Weights & Biases."""

from collections.abc import Sequence

import numpy as np
from accelerate.tracking import GeneralTracker
from PIL import Image

NAME = "validation"


def log_picture(trackers: Sequence[GeneralTracker], picture: Image.Image, step: int) -> None:
    """Sends one RGB picture to every tracker."""
    array = np.asarray(picture)[None]  # (1, H, W, 3)
    for tracker in trackers:
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({NAME: array}, step=step, **layout)
