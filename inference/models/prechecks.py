"""Checks of a request before the model is loaded, by the checkpoint's index and configs, and by adapter files.

The engine checks again. A model is gigabytes; these checks read kilobytes and the adapters.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from config.model import ModelSettings
from inference.checkpoints.checkpoint import Location, identify
from inference.checkpoints.weight_files import read_json
from inference.errors import RequestFailed
from inference.lora.adapter import check_rank, read_adapter
from inference.lora.errors import AdapterError
from inference.lora.names.key_names import KeyNaming
from inference.models.families.unet import UNetFamily
from inference.models.loader import FAMILIES
from inference.request import AdapterFile
from inference.sampling.schedulers import SchedulerTable


@dataclass(frozen=True, slots=True)
class ModelPrecheck:
    """Facts of the model of MODEL_ID before it is loaded. `kinds` and `controls` are as in `ModelFacts`."""

    model: str
    kinds: tuple[str, ...]
    controls: tuple[str, ...]
    schedulers: SchedulerTable
    naming: KeyNaming
    max_rank: int

    def check(self, scheduler: str | None, adapters: Sequence[AdapterFile]) -> None:
        """Raise `RequestFailed` for a scheduler that the model does not support, or an adapter of another model."""
        self.schedulers.check(scheduler)
        for file in adapters:
            try:
                check_rank(read_adapter(file.weights, file.config, self.naming), self.max_rank)
            except AdapterError as error:
                raise RequestFailed(error.code, f"the adapter {file.weights}: {error}") from error


def precheck_model(settings: ModelSettings) -> ModelPrecheck:
    """Read the checkpoint's index. `EngineStartFailed` where MODEL_ID is not supported."""
    checkpoint = identify(
        settings.model_id, settings.config_source, has_checker=settings.safety_checker, vae_id=settings.vae_id
    )
    family = FAMILIES[checkpoint.pipeline_class]
    path = checkpoint.path / "unet" / "config.json"
    # Empty where the UNet's config is not on this machine.
    has_config = issubclass(family, UNetFamily) and checkpoint.where is not Location.FILE and path.is_file()
    unet = read_json(path) if has_config else {}
    is_inpainting = "in_channels" in unet and unet["in_channels"] != unet.get("out_channels", 4)
    return ModelPrecheck(
        model=checkpoint.public_name,
        kinds=("inpaint",) if is_inpainting else family.kinds,
        controls=tuple(settings.controlnet_sources),
        schedulers=family.schedulers,
        naming=family.naming_of(unet),
        max_rank=settings.adapter_max_rank,
    )
