"""What the denoiser takes the finished latents to be, halfway: the running latents less the noise that it sees in them.

Running latents are mostly noise until late in the course; this is a picture, blurred at first, from the first steps on.
It asks the prediction alone, not the scheduler that makes steps of it, and so holds for all of them: what they hand to
the denoiser is in one scale, whatever they keep it in themselves.
"""

import math
from typing import Any

import torch

TRAIN_TIMESTEPS = 1000


def predict_x0(
    model_input: torch.Tensor, timestep: float, prediction: torch.Tensor, checkpoint_scheduler: Any
) -> torch.Tensor:
    """The latents x0 that a prediction at `timestep` stands for; all of one shape, in the sampler's scale.

    `checkpoint_scheduler` is the checkpoint's own: it knows the noise that the model was trained with, and what the
    model predicts. A diffusion's input is sqrt(a) x0 + sqrt(1 - a) noise (Ho et al. 2020, eq. 4; the velocity as in
    Salimans and Ho 2022), a flow's (1 - s) x0 + s noise.
    """
    alphas = getattr(checkpoint_scheduler, "alphas_cumprod", None)
    if alphas is None:
        return model_input - timestep / TRAIN_TIMESTEPS * prediction
    alpha = float(alphas[round(timestep)])
    signal, noise = math.sqrt(alpha), math.sqrt(1 - alpha)
    match checkpoint_scheduler.config.get("prediction_type", "epsilon"):
        case "v_prediction":
            return signal * model_input - noise * prediction
        case "sample":
            return prediction
        case _:
            return (model_input - noise * prediction) / signal
