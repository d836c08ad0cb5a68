"""Repair published configs: values that the family determines are filled in, mismatches with the weights refused."""

import logging
from collections.abc import Mapping
from typing import Any

from config.logs import log_event
from inference.checkpoints.prediction import SCHEDULER_VALUES, Prediction
from inference.errors import EngineStartFailed

logger = logging.getLogger(__name__)

# The defaults of diffusers are of another family, or missing. A UNet's size is in latent pixels of 8 px.
FAMILY_VALUES: dict[str, dict[str, dict[str, Any]]] = {
    "StableDiffusionPipeline": {"unet": {"sample_size": 64}},
    "StableDiffusionXLPipeline": {"unet": {"sample_size": 128}, "vae": {"scaling_factor": 0.13025}},
    "ZImagePipeline": {"vae": {"scaling_factor": 0.3611, "shift_factor": 0.1159, "sample_size": 1024}},
    # Z-Image took its VAE over.
    "FluxPipeline": {"vae": {"scaling_factor": 0.3611, "shift_factor": 0.1159, "sample_size": 1024}},
    "QwenImagePipeline": {},
    "ChromaPipeline": {"vae": {"scaling_factor": 0.3611, "shift_factor": 0.1159, "sample_size": 1024}},
    "Flux2KleinPipeline": {"vae": {"sample_size": 1024}},
    "Krea2Pipeline": {},
}
# Of these, every weight is needed; text encoders are published with heads that are for training.
DENOISERS = ("unet", "transformer")
MAX_UNUSED_SHARE = 0.01


def fill_in(pipeline: Any, pipeline_class: str, configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Set the family's values where a component's config.json lacks them, and the length of CLIP's tokenizers."""
    for component, values in FAMILY_VALUES[pipeline_class].items():
        fill_in_component(getattr(pipeline, component), component, values, configs.get(component, values))
    for component in ("text_encoder", "text_encoder_2"):
        encoder = getattr(pipeline, component, None)
        if encoder is not None and encoder.config.model_type.startswith("clip"):
            tokenizer = getattr(pipeline, component.replace("text_encoder", "tokenizer"))
            # A tokenizer without a length of its own has one that no machine integer holds.
            tokenizer.model_max_length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)


def fill_in_component(model: Any, component: str, values: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Set the values that the component's config.json lacks."""
    left_out = {key: value for key, value in values.items() if config.get(key) is None}
    if left_out:
        log_event(logger, "a config leaves out values", logging.WARNING, component=component, assumed=left_out)
        model.register_to_config(**left_out)


def set_prediction(pipeline: Any, prediction: Prediction) -> None:
    """Set what a single file says that its UNet predicts: its scheduler's config is another checkpoint's."""
    import diffusers  # noqa: PLC0415 - brings torch, which the supervisor never imports

    values = SCHEDULER_VALUES[prediction]
    # Of this class whatever the config's was: others drop the rescaling, and jobs' schedulers are made from it.
    pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipeline.scheduler.config, **values)
    log_event(logger, "the file says what its UNet predicts", **values)


def check_counts(pipeline: Any, counts: Mapping[str, int], subject: str, *, may_have_more: bool) -> None:
    """Raise EngineStartFailed where weights do not match configs: the libraries leave layers random or drop weights.

    `counts`: parameters on the disk of each component. `may_have_more`: a layer may be left out on purpose.
    """
    for name, count in counts.items():
        wanted = sum(parameter.numel() for parameter in getattr(pipeline, name).parameters())
        is_more = not may_have_more and count > wanted * (1 + MAX_UNUSED_SHARE)
        if count < wanted or (is_more and name in DENOISERS):
            raise EngineStartFailed(
                f"{subject}: the config of its {name} describes {wanted} parameters, its weights are {count}: they do"
                " not belong together, copy or download them again"
            )
        if is_more:
            log_event(logger, "weights left unused", logging.WARNING, component=name, unused=count - wanted)
