"""Download files from the model hub, or find them in its cache on this machine.

The hub's libraries are imported on use: diffusers brings torch, which the supervisor never imports.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inference.errors import EngineStartFailed

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
MAX_REASON_CHARS = 400


def find_on_hub(repo_id: str, name: str, setting: str) -> Path:
    """Return one small file of a repository; EngineStartFailed names the `setting` and the remedy."""
    from huggingface_hub import hf_hub_download  # noqa: PLC0415
    from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError  # noqa: PLC0415

    try:
        return Path(hf_hub_download(repo_id, name))
    except LocalEntryNotFoundError as error:
        raise EngineStartFailed(
            f"{setting} {repo_id!r} is no folder here and not in the hub's cache, and the hub cannot be reached: name a"
            f" folder, or download it first (`hf download {repo_id}`)"
        ) from error
    except RemoteEntryNotFoundError as error:
        raise EngineStartFailed(
            f"{setting} {repo_id!r} has no {name}: name a diffusers repository or folder"
        ) from error
    except Exception as error:
        # The client's transport raises errors of its own, from a library that has changed its name before.
        raise EngineStartFailed(
            f"{setting} {repo_id!r} is no folder here, and the hub does not give it ({one_line(error)}): look at the"
            " name, and set HF_TOKEN where the repository is private"
        ) from error


def download_pipeline(repo_id: str, setting: str, *, variant: str | None, unused: Mapping[str, Any]) -> Path:
    """Download what the pipeline needs, without the `unused` components. Returns its folder in the cache.

    EngineStartFailed names the `setting`.
    """
    import diffusers  # noqa: PLC0415

    try:
        return Path(diffusers.DiffusionPipeline.download(repo_id, variant=variant, use_safetensors=True, **unused))
    except Exception as error:
        # The client's transport raises errors of its own, from a library that has changed its name before.
        if "necessary `safetensors` weights" in str(error):
            raise EngineStartFailed(
                f"{setting} {repo_id!r} has no safetensors weights, and pickles are never opened: convert them"
            ) from error
        raise EngineStartFailed(f"{setting} {repo_id!r} could not be downloaded: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """Return a library's message in one line of at most `MAX_REASON_CHARS`."""
    return " ".join(str(error).split())[:MAX_REASON_CHARS] or type(error).__name__
