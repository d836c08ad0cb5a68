"""The VAE of VAE_ID, in place of the checkpoint's: its files and checks, free of torch, and its loading."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from config.logs import log_event
from inference.checkpoints.config_repair import FAMILY_VALUES, check_counts, fill_in_component
from inference.checkpoints.hub import HUB_ID, find_on_hub, one_line
from inference.checkpoints.weight_files import (
    PICKLE_SUFFIXES,
    PREFERRED_VARIANT,
    SAFETENSORS,
    STEMS,
    Shapes,
    Weights,
    count_parameters,
    find_weights,
    read_json,
    read_shapes,
)
from inference.errors import EngineStartFailed

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

SETTING = "VAE_ID"
CONFIG = "config.json"
CLASS_NAME = "AutoencoderKL"
# A VAE's folder is one component of a pipeline's.
ITSELF = "."
WHOLE = f"{STEMS[0]}{SAFETENSORS}"
# Of each kind of pipeline that takes another VAE; all shrink an image by 8, with 4 blocks.
LATENT_CHANNELS = {
    "StableDiffusionPipeline": 4,
    "StableDiffusionXLPipeline": 4,
    "ZImagePipeline": 16,
    "FluxPipeline": 16,
    "ChromaPipeline": 16,
}
NUM_BLOCKS = 4
# The names of both layouts, behind the prefix that a whole checkpoint has.
PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
FIRST_OF_DECODER = "decoder.conv_in.weight"
FIRST_OF_ENCODER = "encoder.conv_in.weight"
MARK_OF_ORIGINAL_LAYOUT = "decoder.mid.block_1.conv1.weight"


@dataclass(frozen=True, slots=True)
class OwnVae:
    """A VAE in a folder with its config, or in one file without. Until a hub id `is_fetched`, its weights may be
    missing.
    """

    vae_id: str
    path: Path
    is_fetched: bool = True

    @property
    def subject(self) -> str:
        """The first words of an error about it."""
        return f"{SETTING} {self.vae_id!r}"

    @property
    def has_config(self) -> bool:
        return self.path.is_dir()


def identify_vae(vae_id: str, pipeline_class: str) -> OwnVae:
    """Identify VAE_ID by its config or its tensors' names. A hub id costs one small download.

    EngineStartFailed where it is no VAE for such a pipeline.
    """
    if pipeline_class not in LATENT_CHANNELS:
        raise EngineStartFailed(f"{SETTING} {vae_id!r}: this version takes no VAE for a {pipeline_class}: unset it")
    path = Path(vae_id).expanduser()
    if path.suffix in PICKLE_SUFFIXES:
        raise EngineStartFailed(f"{SETTING} {vae_id!r} is a pickle, which is never opened: convert it to safetensors")
    if path.is_file():
        found = OwnVae(vae_id, path)
        num_channels = _shapes_in(found)[FIRST_OF_DECODER][1]
    else:
        found = _find_folder(vae_id, path)
        config = read_json(found.path / CONFIG)
        _check_config(found, config)
        num_channels = config.get("latent_channels", 4)
    wanted = LATENT_CHANNELS[pipeline_class]
    if num_channels != wanted:
        reason = f"has latents of {num_channels} channels, and those of a {pipeline_class} have {wanted}"
        raise EngineStartFailed(f"{found.subject} {reason}: name a VAE of that family, or unset it")
    return found


def download_vae(vae: OwnVae) -> OwnVae:
    """Return the VAE with its weights on this machine; EngineStartFailed where the hub refuses."""
    if vae.is_fetched:
        return vae
    try:
        find_on_hub(vae.vae_id, WHOLE, SETTING)
    except EngineStartFailed as error:
        # Some repositories have 16-bit files only, under that name.
        try:
            find_on_hub(vae.vae_id, f"{STEMS[0]}.{PREFERRED_VARIANT}{SAFETENSORS}", SETTING)
        except EngineStartFailed:
            raise error from None
    return replace(vae, is_fetched=True)


def count_vae_parameters(vae: OwnVae) -> int:
    """Return the number of parameters in its files; EngineStartFailed where one is missing or damaged."""
    if not vae.has_config:
        return count_parameters(_shapes_in(vae))
    return sum(count_parameters(read_shapes(path)) for path in _weights_of(vae).files[ITSELF])


def replace_vae(pipeline: Any, vae: OwnVae, pipeline_class: str, dtype: "torch.dtype") -> None:
    """Load the VAE on the CPU in `dtype`, in place of the pipeline's. A single file's config is the one replaced."""
    # Reads every header, and so names a damaged file before the libraries fail on it.
    count, replaced = count_vae_parameters(vae), pipeline.vae
    try:
        loaded = _load(vae, replaced, dtype)
    except EngineStartFailed:
        raise
    except Exception as error:
        # A config may say anything; the libraries take it at its word, and then fail in every way there is.
        raise EngineStartFailed(
            f"{vae.subject} could not be loaded ({type(error).__name__}: {one_line(error)}): look at its config and at"
            " whether it is a VAE of MODEL_ID's family"
        ) from error
    pipeline.register_modules(vae=loaded)
    check_counts(pipeline, {"vae": count}, vae.subject, may_have_more=True)
    if vae.has_config:
        values = FAMILY_VALUES[pipeline_class].get("vae", {})
        fill_in_component(loaded, "vae", values, read_json(vae.path / CONFIG))
    # Of the model and not of its VAE: Z-Image's base size is read from it.
    loaded.register_to_config(sample_size=replaced.config.sample_size)
    scales = {"own": loaded.config.scaling_factor, "checkpoint": replaced.config.scaling_factor}
    if scales["own"] != scales["checkpoint"]:
        advice = "a VAE of another family draws wrong colours: look at VAE_ID"
        log_event(logger, "the VAE scales latents otherwise", logging.WARNING, **scales, advice=advice)


def _find_folder(vae_id: str, path: Path) -> OwnVae:
    if path.is_dir():
        if not (path / CONFIG).is_file():
            remedy = "name the folder of a VAE, which in a diffusers folder is its vae"
            raise EngineStartFailed(f"{SETTING} {vae_id!r} is a folder without {CONFIG}: {remedy}")
        return OwnVae(vae_id, path)
    if not HUB_ID.fullmatch(vae_id):
        raise EngineStartFailed(f"{SETTING} {vae_id!r} is no folder or file here, and no hub id like owner/name")
    return OwnVae(vae_id, find_on_hub(vae_id, CONFIG, SETTING).parent, is_fetched=False)


def _check_config(vae: OwnVae, config: Mapping[str, Any]) -> None:
    name = str(config.get("_class_name", "model without a _class_name"))
    if name != CLASS_NAME:
        raise EngineStartFailed(f"{vae.subject} holds {name}, and this version takes {CLASS_NAME}")
    num_blocks = len(config.get("block_out_channels", ()))
    if num_blocks != NUM_BLOCKS:
        raise EngineStartFailed(f"{vae.subject} has {num_blocks} blocks, and a model's VAE {NUM_BLOCKS}: unset it")


def _shapes_in(vae: OwnVae) -> Shapes:
    """Return the VAE's tensors in a single file, by their names without a prefix."""
    if vae.path.suffix != SAFETENSORS:
        raise EngineStartFailed(f"{vae.subject} is neither a folder nor a {SAFETENSORS} file")
    shapes = read_shapes(vae.path)
    prefix = next((name.removesuffix(FIRST_OF_DECODER) for name in shapes if name.endswith(FIRST_OF_DECODER)), "")
    found = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
    found = {name: shape for name, shape in found.items() if name.startswith(PARTS)}
    # A prefix is one of the original layout. A video's convolutions have five dimensions.
    is_image_vae = all(len(found.get(name, ())) == 4 for name in (FIRST_OF_DECODER, FIRST_OF_ENCODER))
    if not is_image_vae or (prefix and MARK_OF_ORIGINAL_LAYOUT not in found):
        raise EngineStartFailed(
            f"{vae.subject} is no VAE of images with encoder and decoder, in diffusers' names or the original ones"
        )
    return found


def _weights_of(vae: OwnVae) -> Weights:
    try:
        return find_weights(vae.path, (ITSELF,))
    except EngineStartFailed as error:
        raise EngineStartFailed(f"{vae.subject}: {error}") from error


def _load(vae: OwnVae, replaced: Any, dtype: "torch.dtype") -> Any:
    from diffusers import AutoencoderKL  # noqa: PLC0415 - brings torch, which the supervisor never imports

    usual = {"dtype": dtype, "use_safetensors": True, "local_files_only": True}
    if vae.has_config:
        return AutoencoderKL.from_pretrained(vae.path, variant=_weights_of(vae).variant, **usual)
    with TemporaryDirectory() as folder:
        replaced.save_config(folder)
        if MARK_OF_ORIGINAL_LAYOUT in _shapes_in(vae):
            return AutoencoderKL.from_single_file(str(vae.path), config=folder, dtype=dtype)
        # As a folder: old names of diffusers' own layers are read only there.
        (Path(folder) / WHOLE).symlink_to(vae.path.resolve())
        return AutoencoderKL.from_pretrained(folder, **usual)
