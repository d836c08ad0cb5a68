"""Load a checkpoint's pipeline: the size of its weights, its download, and its models on the CPU.

Only `load_pipeline` imports torch. Errors that the headers of the files show are raised before gigabytes are read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inference.checkpoints.checkpoint import COMPONENTS, INDEX, Checkpoint, Location
from inference.checkpoints.config_repair import check_counts, fill_in, set_prediction
from inference.checkpoints.hub import download_pipeline, find_on_hub, one_line
from inference.checkpoints.own_vae import count_vae_parameters, download_vae, replace_vae
from inference.checkpoints.prediction import Prediction
from inference.checkpoints.quantization import Storage, bytes_of
from inference.checkpoints.safety_checker import CHECKER, EXTRACTOR, add_checker, find_checker
from inference.checkpoints.single_files.layouts import Z_IMAGE, split
from inference.checkpoints.weight_files import (
    PREFERRED_VARIANT,
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

VAE_CONFIG = "vae/config.json"

# Given as None, they are neither looked for nor loaded, whatever the index says of them.
UNUSED: dict[str, dict[str, Any]] = {
    "StableDiffusionPipeline": dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))
    | {"requires_safety_checker": False},
    "StableDiffusionXLPipeline": dict.fromkeys(("feature_extractor", "image_encoder")),
    "ZImagePipeline": {},
    "FluxPipeline": dict.fromkeys(("feature_extractor", "image_encoder")),
    "QwenImagePipeline": {},
    "ChromaPipeline": dict.fromkeys(("feature_extractor", "image_encoder")),
    "Flux2KleinPipeline": {},
    "Krea2Pipeline": {},
}


def weight_bytes(checkpoint: Checkpoint, bytes_each: int, storage: Storage = "auto") -> dict[str, int] | None:
    """Return the bytes of each component's weights in memory, at `bytes_each` a parameter, from the files' headers.

    An estimate of what `storage` keeps in fewer bits. None for a hub id whose weights are not in the cache yet.
    EngineStartFailed names a file that is damaged.
    """
    try:
        shapes = _read_shapes(checkpoint)
        found = {name: bytes_of(name, own, bytes_each, storage) for name, own in shapes.items()}
        if checkpoint.vae is not None:
            found["vae"] = count_vae_parameters(checkpoint.vae) * bytes_each
    except EngineStartFailed:
        if checkpoint.is_fetched and (checkpoint.vae is None or checkpoint.vae.is_fetched):
            raise
        return None
    return found


def download(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with all of its files on this machine; only a hub id may need a download.

    EngineStartFailed where the hub refuses.
    """
    if checkpoint.vae is not None:
        checkpoint = replace(checkpoint, vae=download_vae(checkpoint.vae))
    if checkpoint.is_fetched:
        return checkpoint
    if checkpoint.where is Location.FILE:
        return replace(checkpoint, config=str(_download_rest(checkpoint)), is_fetched=True)
    needed = (CHECKER, EXTRACTOR) if checkpoint.has_checker else ()
    unused = {name: value for name, value in UNUSED[checkpoint.pipeline_class].items() if name not in needed}
    if checkpoint.is_vae_left_out:
        unused["vae"] = None
        # Left out with the weights.
        find_on_hub(checkpoint.model_id, VAE_CONFIG, "MODEL_ID")
    try:
        path = download_pipeline(checkpoint.model_id, "MODEL_ID", variant=None, unused=unused)
        found = replace(checkpoint, path=path, is_fetched=True)
        _weights(found)
    except EngineStartFailed as error:
        # Some repositories have 16-bit files only, under that name.
        try:
            path = download_pipeline(checkpoint.model_id, "MODEL_ID", variant=PREFERRED_VARIANT, unused=unused)
        except EngineStartFailed:
            raise error from None
        found = replace(checkpoint, path=path, is_fetched=True)
    return found


def _download_rest(checkpoint: Checkpoint) -> Path:
    """Download what a single file lacks, from the hub id of MODEL_CONFIG. Returns its folder in the cache."""
    source, parts = str(checkpoint.config), _parts_in_file(checkpoint)
    folder = download_pipeline(source, "MODEL_CONFIG", variant=None, unused=dict.fromkeys(parts))
    for component in parts:
        # Left out with the weights.
        find_on_hub(source, f"{component}/config.json", "MODEL_CONFIG")
    return folder


def load_pipeline(checkpoint: Checkpoint, dtype: "torch.dtype") -> Any:
    """Load the pipeline on the CPU in `dtype`.

    Weights whose files have that dtype stay mapped from them, others are converted tensor by tensor: neither makes a
    second copy. EngineStartFailed names the fault and the remedy.
    """
    checkpoint = download(checkpoint)
    # Reads every header, and so names a damaged file before the libraries fail on it.
    counts = {name: count_parameters(shapes) for name, shapes in _read_shapes(checkpoint).items()}
    subject = f"MODEL_ID {checkpoint.model_id!r}"
    try:
        pipeline = (_load_file if checkpoint.where is Location.FILE else _load_folder)(checkpoint, dtype)
        if checkpoint.prediction is not Prediction.UNMARKED:
            set_prediction(pipeline, checkpoint.prediction)
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
    # A single file's configs are those of MODEL_CONFIG, if that is a local folder.
    folder = checkpoint.path if checkpoint.where is not Location.FILE else Path(checkpoint.config or "").expanduser()
    paths = {name: folder / name / "config.json" for name in COMPONENTS[checkpoint.pipeline_class]}
    configs = {name: read_json(path) for name, path in paths.items() if path.is_file()}
    fill_in(pipeline, checkpoint.pipeline_class, configs)
    if checkpoint.vae is not None:
        replace_vae(pipeline, checkpoint.vae, checkpoint.pipeline_class, dtype)
    return pipeline


def _load_folder(checkpoint: Checkpoint, dtype: "torch.dtype") -> Any:
    index = read_json(checkpoint.path / INDEX)
    components = COMPONENTS[checkpoint.pipeline_class]
    # A tokenizer belongs to each text encoder.
    tokenizers = [name.replace("text_encoder", "tokenizer") for name in components if name.startswith("text_encoder")]
    for name in (*components, *tokenizers, "scheduler"):
        if not any(index.get(name) or ()):
            raise EngineStartFailed(f"{checkpoint.path / INDEX} names no {name}: copy or download the whole checkpoint")
        if not (checkpoint.path / name).is_dir():
            raise EngineStartFailed(f"{checkpoint.path / name} is missing: copy or download the whole checkpoint")
    # For its config, by which `replace_vae` reads a single file.
    stand_in = {"vae": _vae_without_weights(checkpoint.path / VAE_CONFIG)} if checkpoint.is_vae_left_out else {}
    return _pipeline_class(checkpoint).from_pretrained(
        checkpoint.path,
        # Never left to the files: transformers would keep their dtype for the text encoder, diffusers take fp32.
        dtype=dtype,
        use_safetensors=True,
        variant=_weights(checkpoint).variant,
        local_files_only=True,
        **UNUSED[checkpoint.pipeline_class],
        **stand_in,
    )


def _vae_without_weights(config: Path) -> Any:
    import torch  # noqa: PLC0415 - the supervisor never imports it
    from diffusers import AutoencoderKL  # noqa: PLC0415

    with torch.device("meta"):
        return AutoencoderKL.from_config(read_json(config))


def _load_file(checkpoint: Checkpoint, dtype: "torch.dtype") -> Any:
    try:
        if checkpoint.pipeline_class == Z_IMAGE:
            from inference.checkpoints.single_files.z_image import load_z_image_file  # noqa: PLC0415 - brings torch

            rest = _weights_of_rest(checkpoint)
            return load_z_image_file(checkpoint.path, checkpoint.config, dtype, rest and rest.variant)
        return _pipeline_class(checkpoint).from_single_file(
            str(checkpoint.path), config=checkpoint.config, dtype=dtype, **UNUSED[checkpoint.pipeline_class]
        )
    except OSError as error:
        if checkpoint.config is not None:
            raise
        # The file itself was read by now: what failed is the hub's download of what a single file does not hold.
        raise EngineStartFailed(
            f"MODEL_ID {checkpoint.model_id!r} is a single file, without configs and tokenizers, and the hub gives none"
            f" ({one_line(error)}): set MODEL_CONFIG to a diffusers folder of a {checkpoint.pipeline_class}"
        ) from error


def _pipeline_class(checkpoint: Checkpoint) -> Any:
    import diffusers  # noqa: PLC0415 - brings torch, which the supervisor never imports

    return getattr(diffusers, checkpoint.pipeline_class)


def _weights(checkpoint: Checkpoint) -> Weights:
    return find_weights(checkpoint.path, checkpoint.components)


def _read_shapes(checkpoint: Checkpoint) -> dict[str, Shapes]:
    """Read the shapes in the files of each component."""
    if checkpoint.where is Location.FILE:
        rest = _weights_of_rest(checkpoint)
        return dict(_parts_in_file(checkpoint)) | ({} if rest is None else _read_all(rest.files))
    files = dict(_weights(checkpoint).files)
    if checkpoint.has_checker:
        files |= find_checker(checkpoint.path).files
    return _read_all(files)


def _read_all(files: Mapping[str, Sequence[Path]]) -> dict[str, Shapes]:
    return {
        name: {tensor: shape for path in paths for tensor, shape in read_shapes(path).items()}
        for name, paths in files.items()
    }


def _parts_in_file(checkpoint: Checkpoint) -> Mapping[str, Shapes]:
    """Return the shapes of each component that a single file has."""
    parts = split(read_shapes(checkpoint.path), checkpoint.pipeline_class)
    return {name: shapes for name, shapes in parts.items() if shapes}


def _weights_of_rest(checkpoint: Checkpoint) -> Weights | None:
    """Find the weights of the components that a single file lacks; None where it has all."""
    lacking = [name for name in COMPONENTS[checkpoint.pipeline_class] if name not in _parts_in_file(checkpoint)]
    return find_weights(Path(checkpoint.config or "").expanduser(), lacking) if lacking else None
