"""Identify a checkpoint by its index or the names of its tensors. Free of torch."""

from dataclasses import dataclass, replace
from enum import Enum, auto
from pathlib import Path

from inference.checkpoints.hub import HUB_ID, find_on_hub
from inference.checkpoints.own_vae import OwnVae, identify_vae
from inference.checkpoints.prediction import Prediction, check_scheduler, prediction_of
from inference.checkpoints.safety_checker import require_checker
from inference.checkpoints.single_files.layouts import family_of, split
from inference.checkpoints.weight_files import (
    PICKLE_SUFFIXES,
    SAFETENSORS,
    read_header,
    read_json,
)
from inference.errors import EngineStartFailed

INDEX = "model_index.json"

# The components with weights of each kind of pipeline; a safety checker may be added.
COMPONENTS = {
    "StableDiffusionPipeline": ("text_encoder", "unet", "vae"),
    "StableDiffusionXLPipeline": ("text_encoder", "text_encoder_2", "unet", "vae"),
    "ZImagePipeline": ("text_encoder", "transformer", "vae"),
    "FluxPipeline": ("text_encoder", "text_encoder_2", "transformer", "vae"),
    "ChromaPipeline": ("text_encoder", "transformer", "vae"),
    "QwenImagePipeline": ("text_encoder", "transformer", "vae"),
    "Flux2KleinPipeline": ("text_encoder", "transformer", "vae"),
    "Krea2Pipeline": ("text_encoder", "transformer", "vae"),
}
# The same models around a UNet that also reads a mask: the UNet's channels decide that, not the name.
LOADED_AS = {
    "StableDiffusionInpaintPipeline": "StableDiffusionPipeline",
    "StableDiffusionXLInpaintPipeline": "StableDiffusionXLPipeline",
}


class Location(Enum):
    """Location of a checkpoint."""

    FOLDER = auto()
    HUB = auto()  # its path is the cached snapshot
    FILE = auto()


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint of a supported kind.

    `config`: folder or hub id with a single file's configs and tokenizers, and the weights that it lacks. Until
    `is_fetched`, a hub id's weights may be missing. With `has_checker` its safety checker is loaded too. `prediction`:
    what a single file says of it. `vae` takes the place of its own.
    """

    model_id: str
    pipeline_class: str
    where: Location
    path: Path
    config: str | None = None
    is_fetched: bool = True
    has_checker: bool = False
    prediction: Prediction = Prediction.UNMARKED
    vae: OwnVae | None = None

    @property
    def public_name(self) -> str:
        """The hub id, or the last part of a path: the operator's folders are private."""
        return self.model_id if self.where is Location.HUB else self.path.resolve().name.removesuffix(SAFETENSORS)

    @property
    def is_vae_left_out(self) -> bool:
        """True where the weights of its own VAE are neither downloaded nor read."""
        return self.vae is not None and self.where is not Location.FILE

    @property
    def components(self) -> tuple[str, ...]:
        """The components whose weights are read."""
        names = COMPONENTS[self.pipeline_class]
        return tuple(name for name in names if name != "vae") if self.is_vae_left_out else names


def identify(model_id: str, config: str | None, *, has_checker: bool = False, vae_id: str | None = None) -> Checkpoint:
    """Identify MODEL_ID, and VAE_ID, by index, config or tensors' names alone. A hub id costs one small download.

    EngineStartFailed where one is not supported, or lacks the safety checker that `has_checker` requires.
    """
    path = Path(model_id).expanduser()
    if path.suffix in PICKLE_SUFFIXES:
        raise EngineStartFailed(f"MODEL_ID {model_id!r} is a pickle, which is never opened: convert it to safetensors")
    if path.is_file():
        found = _identify_file(model_id, path, config)
    else:
        folder = _find_index(model_id, "MODEL_ID").parent
        name = _class_in(folder / INDEX)
        if name not in COMPONENTS:
            raise EngineStartFailed(f"MODEL_ID {model_id!r} holds a {name}; this version runs {', '.join(COMPONENTS)}")
        check_scheduler(read_json(folder / INDEX), f"MODEL_ID {model_id!r}")
        where = Location.FOLDER if path.is_dir() else Location.HUB
        found = Checkpoint(model_id, name, where, folder, is_fetched=where is Location.FOLDER)
    if has_checker:
        index = None if found.where is Location.FILE else read_json(found.path / INDEX)
        require_checker(f"MODEL_ID {model_id!r}", found.pipeline_class, index)
    vae = None if vae_id is None else identify_vae(vae_id, found.pipeline_class)
    return replace(found, has_checker=has_checker, vae=vae)


def _identify_file(model_id: str, path: Path, config: str | None) -> Checkpoint:
    if path.suffix != SAFETENSORS:
        raise EngineStartFailed(f"MODEL_ID {model_id!r} is neither a folder nor a {SAFETENSORS} file")
    header, subject = read_header(path), f"MODEL_ID {model_id!r}"
    found = family_of(header.shapes, subject)
    is_whole = all(split(header.shapes, found).values())
    if config is not None:
        index = _find_index(config, "MODEL_CONFIG")
        if (other := _class_in(index)) != found:
            raise EngineStartFailed(f"MODEL_CONFIG {config!r} holds a {other}, but {subject} is a {found}")
        check_scheduler(read_json(index), f"MODEL_CONFIG {config!r}")
    elif not is_whole:
        raise EngineStartFailed(
            f"{subject} is a Z-Image transformer without text encoder or VAE: set MODEL_CONFIG to a diffusers folder or"
            " hub id that has them"
        )
    # The rest of a transformer comes from there, and may have to be downloaded.
    is_fetched = is_whole or Path(config or "").expanduser().is_dir()
    prediction = prediction_of(header, subject)
    return Checkpoint(model_id, found, Location.FILE, path, config, is_fetched=is_fetched, prediction=prediction)


def _class_in(index: Path) -> str:
    """Return the pipeline class that runs an index; a list's text where it has its own code, which is never run."""
    found = str(read_json(index).get("_class_name", "pipeline without a _class_name"))
    return LOADED_AS.get(found, found)


def _find_index(source: str, setting: str) -> Path:
    """Return the index of a folder, or of a hub id, of which only that file is downloaded."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / INDEX).is_file():
            raise EngineStartFailed(f"{setting} {source!r} is a folder without {INDEX}: name a diffusers folder")
        return folder / INDEX
    if not HUB_ID.fullmatch(source):
        raise EngineStartFailed(f"{setting} {source!r} is no folder or file here, and no hub id like owner/name")
    return find_on_hub(source, INDEX, setting)
