"""A checkpoint by the operator's name for it: what it is, what it takes, and loading it.

Only `load_pipeline` imports torch. What can be known to be wrong is said before gigabytes are read.
"""

import re
from dataclasses import dataclass, replace
from enum import Enum, auto
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inference.checkpoints.config_repair import check_counts, fill_in
from inference.checkpoints.hub import download_pipeline, find_on_hub, one_line
from inference.checkpoints.safety_checker import CHECKER, EXTRACTOR, add_checker, find_checker, require_checker
from inference.checkpoints.single_files import family_of, split
from inference.checkpoints.weight_files import (
    PICKLES,
    PREFERRED_VARIANT,
    SAFETENSORS,
    Weights,
    count_parameters,
    find_weights,
    read_json,
    read_shapes,
)
from inference.errors import EngineStartFailed

if TYPE_CHECKING:
    import torch

INDEX = "model_index.json"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

# What each kind of pipeline draws with and has weights. A safety checker may come on top.
COMPONENTS = {
    "StableDiffusionPipeline": ("text_encoder", "unet", "vae"),
    "StableDiffusionXLPipeline": ("text_encoder", "text_encoder_2", "unet", "vae"),
    "ZImagePipeline": ("text_encoder", "transformer", "vae"),
}
# The same models around a UNet that reads a mask too: what it has channels for is asked of the UNet, not of the name.
LOADED_AS = {
    "StableDiffusionInpaintPipeline": "StableDiffusionPipeline",
    "StableDiffusionXLInpaintPipeline": "StableDiffusionXLPipeline",
}
# Given as None, they are neither looked for nor loaded, whatever the index says of them.
UNUSED: dict[str, dict[str, Any]] = {
    "StableDiffusionPipeline": dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))
    | {"requires_safety_checker": False},
    "StableDiffusionXLPipeline": dict.fromkeys(("feature_extractor", "image_encoder")),
    "ZImagePipeline": {},
}


class Location(Enum):
    """Where a checkpoint lies."""

    FOLDER = auto()
    HUB = auto()  # its path is the cached snapshot
    FILE = auto()


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint of a kind we run. `config`: folder or hub id with a single file's configs and tokenizers.
    Until a hub id `is_fetched`, its weights may be missing. With `has_checker` its safety checker is loaded too."""

    model_id: str
    pipeline_class: str
    where: Location
    path: Path
    config: str | None = None
    is_fetched: bool = True
    has_checker: bool = False

    @property
    def public_name(self) -> str:
        """A hub id as it is, a path by its last part: the operator's folders are nobody else's business."""
        return self.model_id if self.where is Location.HUB else self.path.resolve().name.removesuffix(SAFETENSORS)


def identify(model_id: str, config: str | None, *, has_checker: bool = False) -> Checkpoint:
    """Tell what MODEL_ID is by its index or its tensors' names alone. A hub id costs one small download.

    EngineStartFailed where it is nothing we run, or `has_checker` asks for a safety checker that it has not.
    """
    found = _identify(model_id, config)
    if has_checker:
        index = None if found.where is Location.FILE else read_json(found.path / INDEX)
        require_checker(f"MODEL_ID {model_id!r}", found.pipeline_class, index)
    return replace(found, has_checker=has_checker)


def _identify(model_id: str, config: str | None) -> Checkpoint:
    path = Path(model_id).expanduser()
    if path.suffix in PICKLES:
        raise EngineStartFailed(f"MODEL_ID {model_id!r} is a pickle, which is never opened: convert it to safetensors")
    if path.is_file():
        return _identify_file(model_id, path, config)

    index = _find_index(model_id, "MODEL_ID")
    found = _class_in(index)
    if found not in COMPONENTS:
        raise EngineStartFailed(f"MODEL_ID {model_id!r} holds a {found}; this version runs {', '.join(COMPONENTS)}")
    where = Location.FOLDER if path.is_dir() else Location.HUB
    return Checkpoint(model_id, found, where, index.parent, is_fetched=where is Location.FOLDER)


def weight_bytes(checkpoint: Checkpoint, bytes_each: int) -> dict[str, int] | None:
    """Bytes of each component's weights in memory, with `bytes_each` for a parameter, by the files' headers.

    None for a hub id whose weights are not in the cache yet. EngineStartFailed names a file that is damaged.
    """
    try:
        counts = _parameters(checkpoint)
    except EngineStartFailed:
        if checkpoint.is_fetched:
            raise
        return None
    return {name: count * bytes_each for name, count in counts.items()}


def download(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with all of its files on this machine; nothing to do but for a hub id. EngineStartFailed where
    the hub does not give them."""
    if checkpoint.is_fetched:
        return checkpoint
    unused = _unused(checkpoint)
    try:
        path = download_pipeline(checkpoint.model_id, variant=None, unused=unused)
        found = replace(checkpoint, path=path, is_fetched=True)
        _weights(found)
    except EngineStartFailed as error:
        # Some repositories have 16-bit files only, under that name.
        try:
            path = download_pipeline(checkpoint.model_id, variant=PREFERRED_VARIANT, unused=unused)
        except EngineStartFailed:
            raise error from None
        found = replace(checkpoint, path=path, is_fetched=True)
    return found


def load_pipeline(checkpoint: Checkpoint, dtype: "torch.dtype") -> Any:
    """The pipeline on the CPU in `dtype`. Weights whose files have that dtype stay mapped from them, others are
    converted tensor by tensor: neither makes a second copy. EngineStartFailed says what is wrong and what to do."""
    checkpoint = download(checkpoint)
    # Reads every header, and so names a damaged file before the libraries stumble over it.
    counts = _parameters(checkpoint)
    subject = f"MODEL_ID {checkpoint.model_id!r}"
    try:
        pipeline = (_load_file if checkpoint.where is Location.FILE else _load_folder)(checkpoint, dtype)
        if checkpoint.has_checker:
            add_checker(pipeline, checkpoint.path, dtype)
    except EngineStartFailed:
        raise
    except Exception as error:
        # A config may say anything; the libraries take it at its word, and then fail in every way there is.
        raise EngineStartFailed(
            f"{subject} could not be loaded ({type(error).__name__}: {one_line(error)}): its weight files are whole,"
            " so look at its configs and tokenizers, or copy or download them again"
        ) from error
    check_counts(pipeline, counts, subject, may_have_more=checkpoint.where is Location.FILE)
    fill_in(pipeline, checkpoint.pipeline_class, _configs(checkpoint))
    return pipeline


def _load_folder(checkpoint: Checkpoint, dtype: "torch.dtype") -> Any:
    index = read_json(checkpoint.path / INDEX)
    for name in (*COMPONENTS[checkpoint.pipeline_class], *_other_folders(checkpoint)):
        if not any(index.get(name) or ()):
            raise EngineStartFailed(f"{checkpoint.path / INDEX} names no {name}: copy or download the whole checkpoint")
        if not (checkpoint.path / name).is_dir():
            raise EngineStartFailed(f"{checkpoint.path / name} is missing: copy or download the whole checkpoint")
    return _class(checkpoint).from_pretrained(
        checkpoint.path,
        # Never left to the files: transformers would keep their dtype for the text encoder, diffusers take fp32.
        dtype=dtype,
        use_safetensors=True,
        variant=_weights(checkpoint).variant,
        local_files_only=True,
        **UNUSED[checkpoint.pipeline_class],
    )


def _load_file(checkpoint: Checkpoint, dtype: "torch.dtype") -> Any:
    try:
        return _class(checkpoint).from_single_file(
            str(checkpoint.path), config=checkpoint.config, dtype=dtype, **UNUSED[checkpoint.pipeline_class]
        )
    except OSError as error:
        if checkpoint.config is not None:
            raise
        # The file itself was read by now: what failed is asking the hub for what a single file does not hold.
        raise EngineStartFailed(
            f"MODEL_ID {checkpoint.model_id!r} is a single file, without configs and tokenizers, and the hub gives none"
            f" ({one_line(error)}): set MODEL_CONFIG to a diffusers folder of a {checkpoint.pipeline_class}"
        ) from error


def _class(checkpoint: Checkpoint) -> Any:
    import diffusers  # noqa: PLC0415 - brings torch, which the supervisor never imports

    return getattr(diffusers, checkpoint.pipeline_class)


def _other_folders(checkpoint: Checkpoint) -> list[str]:
    """The folders without weights: a tokenizer for each text encoder, and the scheduler."""
    encoders = [name for name in COMPONENTS[checkpoint.pipeline_class] if name.startswith("text_encoder")]
    return [*(name.replace("text_encoder", "tokenizer") for name in encoders), "scheduler"]


def _weights(checkpoint: Checkpoint) -> Weights:
    return find_weights(checkpoint.path, COMPONENTS[checkpoint.pipeline_class])


def _parameters(checkpoint: Checkpoint) -> dict[str, int]:
    """How many parameters the files hold for each component."""
    if checkpoint.where is Location.FILE:
        parts = split(read_shapes(checkpoint.path), checkpoint.pipeline_class)
        return {name: count_parameters(shapes) for name, shapes in parts.items()}
    files = dict(_weights(checkpoint).files)
    if checkpoint.has_checker:
        files |= find_checker(checkpoint.path).files
    return {name: sum(count_parameters(read_shapes(path)) for path in paths) for name, paths in files.items()}


def _unused(checkpoint: Checkpoint) -> dict[str, Any]:
    needed = (CHECKER, EXTRACTOR) if checkpoint.has_checker else ()
    return {name: value for name, value in UNUSED[checkpoint.pipeline_class].items() if name not in needed}


def _configs(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """The components' own config.json; of a single file those of MODEL_CONFIG, where that is a folder here."""
    folder = checkpoint.path if checkpoint.where is not Location.FILE else Path(checkpoint.config or "").expanduser()
    paths = {name: folder / name / "config.json" for name in COMPONENTS[checkpoint.pipeline_class]}
    return {name: read_json(path) for name, path in paths.items() if path.is_file()}


def _identify_file(model_id: str, path: Path, config: str | None) -> Checkpoint:
    if path.suffix != SAFETENSORS:
        raise EngineStartFailed(f"MODEL_ID {model_id!r} is neither a folder nor a {SAFETENSORS} file")
    found = family_of(read_shapes(path), f"MODEL_ID {model_id!r}")
    if config is not None and (other := _class_in(_find_index(config, "MODEL_CONFIG"))) != found:
        raise EngineStartFailed(f"MODEL_CONFIG {config!r} holds a {other}, but MODEL_ID {model_id!r} is a {found}")
    return Checkpoint(model_id, found, Location.FILE, path, config)


def _class_in(index: Path) -> str:
    """The class that runs what the index names; a list where it brings code of its own, which is never run."""
    found = str(read_json(index).get("_class_name", "pipeline without a _class_name"))
    return LOADED_AS.get(found, found)


def _find_index(source: str, setting: str) -> Path:
    """The index of a folder, or of a hub id: the one file of it that is fetched here."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / INDEX).is_file():
            raise EngineStartFailed(f"{setting} {source!r} is a folder without {INDEX}: name a diffusers folder")
        return folder / INDEX
    if not HUB_ID.fullmatch(source):
        raise EngineStartFailed(f"{setting} {source!r} is no folder or file here, and no hub id like owner/name")
    return find_on_hub(source, INDEX, setting)
