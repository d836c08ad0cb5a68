"""The hub's cache on this machine, as its client leaves it."""

import shutil
from pathlib import Path

import pytest


def write_to_hub_cache(cache: Path, repo_id: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy `folder` into a cache of its own as that repository, and return the copy."""
    repository = cache / f"models--{repo_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("c0ffee")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(cache), raising=False)
    return shutil.copytree(folder, repository / "snapshots" / "c0ffee")
