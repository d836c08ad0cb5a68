"""Check the machine: disk, GPU and memory."""

import shutil
import tempfile
from collections.abc import Mapping

from clients.gpu import GpuMonitor
from config.model import ModelSettings
from config.store import StoreSettings
from inference.checkpoints.checkpoint import identify
from inference.checkpoints.memory_plan import RESERVE_BYTES, Placement, free_host_bytes, most_adapter_bytes, plan
from inference.checkpoints.pipeline import weight_bytes
from inference.checkpoints.weight_files import GB
from inference.controlnet.files import find_controlnets, most_bytes
from inference.errors import EngineStartFailed
from worker.cli.check.checks import CheckFailed

PARAMETER_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
QUANTIZED_BITS = {"fp8": 8, "nf4": 4}

PROBE_BYTES = bytes(4096)


def check_disk(settings: StoreSettings) -> str:
    """Check that the download cache can be written and grow to its limit. Creates no folder."""
    folder = settings.cache_dir.expanduser()
    place = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=place) as probe:
            probe.write(PROBE_BYTES)
            probe.flush()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise CheckFailed(f"CACHE_DIR {folder} cannot be written ({reason}: {place}): name another folder") from error
    # What the cache holds counts as free: it is evicted for new files.
    free = shutil.disk_usage(place).free + sum(path.stat().st_size for path in folder.glob("*") if path.is_file())
    room = f"{free / GB:.1f} GB"
    if free < settings.cache_max_bytes:
        remedy = f"free space, set CACHE_MAX_GB below {free / GB:.1f}, or name another CACHE_DIR"
        raise CheckFailed(f"CACHE_MAX_GB is {settings.cache_max_gb:g}, but {folder} has room for {room}: {remedy}")
    return f"{folder} has room for {room}; the cache takes {settings.cache_max_gb:g} GB at most"


def check_gpu(settings: ModelSettings) -> str:
    """Check for the GPU that DEVICE names, by its driver alone: torch is used by the model's check."""
    if settings.device == "cpu":
        return "none is asked for: DEVICE is cpu"
    readings = GpuMonitor(settings.visible_gpu)
    reading = readings.read()
    if reading is None:
        visible = settings.cuda_visible_devices
        seen = "no NVIDIA GPU answers" + ("" if visible is None else f" to CUDA_VISIBLE_DEVICES={visible}")
        if settings.device == "auto":
            return f"{seen}: the CPU draws, as DEVICE is auto"
        remedy = "look at nvidia-smi, start a container with --gpus all, or set DEVICE=cpu"
        raise CheckFailed(f"DEVICE is {settings.device}, but {seen}: {remedy}")
    free, total = reading.memory_total_bytes - reading.memory_used_bytes, reading.memory_total_bytes
    return f"{readings.describe()}; {free / GB:.1f} of {total / GB:.1f} GB are free"


def check_memory(settings: ModelSettings) -> str:
    """Compare the size of the weights with the free memory, and name the placement."""
    gpu = None if settings.device == "cpu" else GpuMonitor(settings.visible_gpu).read()
    bytes_each = PARAMETER_BYTES.get(settings.dtype, 4 if gpu is None else 2)
    try:
        found = identify(
            settings.model_id, settings.config_source, has_checker=settings.safety_checker, vae_id=settings.vae_id
        )
        needed = weight_bytes(found, bytes_each, settings.weights)
        controlnets = find_controlnets(settings.controlnet_sources)
    except EngineStartFailed:
        needed = None
    free = free_host_bytes() if gpu is None else gpu.memory_total_bytes - gpu.memory_used_bytes
    if needed is None:
        return f"{free / GB:.1f} GB are free; what the weights take is known once they are here and whole"

    weights = f"{sum(needed.values()) / GB:.2f} GB of weights at {8 * bytes_each} bits"
    if settings.weights != "auto":
        weights += f", large layers at {QUANTIZED_BITS[settings.weights]}"
    kept = most_bytes(controlnets, bytes_each, settings.controlnet_max_bytes)
    if kept:
        weights += f", with {kept / GB:.2f} GB kept for ControlNets"
    free, chosen = free - kept, settings.adapter_max_bytes
    seen, placement = (_in_host if gpu is None else _on_gpu)(weights, needed, free, chosen)
    most = most_adapter_bytes(chosen, needed, free, placement)
    return f"{seen}, with up to {most / GB:.1f} GB for adapters (ADAPTER_MEMORY_GB){_others(settings, bytes_each)}"


def _others(settings: ModelSettings, bytes_each: int) -> str:
    """Describe the weights of MODELS, which host memory holds too; empty where there are none, or not yet here."""
    sizes = []
    for name in settings.model_names[1:]:
        try:
            needed = weight_bytes(identify(settings.of_model(name).model_id, None), bytes_each, settings.weights)
        except EngineStartFailed:
            needed = None
        if needed is not None:
            sizes.append(f"{name} {sum(needed.values()) / GB:.2f} GB")
    return f"; of MODELS {', '.join(sizes)}, in turns where they do not fit together" if sizes else ""


def _in_host(weights: str, needed: Mapping[str, int], free: int, chosen: int | None) -> tuple[str, Placement]:
    seen = f"{weights}, {free / GB:.1f} GB of the host's are free"
    if sum(needed.values()) + (chosen or 0) > free:
        remedy = "free memory, raise the container's limit, or name a smaller MODEL_ID"
        raise CheckFailed(f"{seen}: the machine would swap or kill the worker; {remedy}")
    return f"{seen}: they fit", Placement.RESIDENT


def _on_gpu(weights: str, needed: Mapping[str, int], free: int, chosen: int | None) -> tuple[str, Placement]:
    try:
        residence = plan(needed, free, chosen)
    except EngineStartFailed as error:
        raise CheckFailed(str(error)) from error
    is_resident = residence is Placement.RESIDENT
    lives = "the model stays on the GPU" if is_resident else "its parts take turns on the GPU, which is slower"
    seen = f"{weights} and {RESERVE_BYTES / GB:.1f} GB for a picture, {free / GB:.1f} GB of the GPU's are free"
    return f"{seen}: {lives}", residence
