"""Weights named by PEFT and the config beside them, as `generate --lora` takes them: by a folder or a file in it."""

from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.hostile.inputs import demo_adapter, peft_config, peft_weights
from worker.cli.file_source import FileSource, local_file
from worker.errors import JobFailed
from worker.jobs.inputs.fetcher import Fetcher
from worker.jobs.inputs.peft_folders import is_named_by_peft
from worker.messages.job import JobAdapter


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "adapter_config.json").write_bytes(peft_config())
    (tmp_path / "adapter_model.safetensors").write_bytes(peft_weights())
    (tmp_path / "renamed.safetensors").write_bytes(peft_weights())
    (tmp_path / "diffusers.safetensors").write_bytes(demo_adapter())
    return tmp_path


def files_of(path: Path) -> tuple[Path, Path | None]:
    fetcher = Fetcher(FileSource(), font_dirs=())
    found = fetcher.adapter(JobAdapter(local_file(str(path)), 1.0), ExitStack())
    return found.weights, found.config


@pytest.mark.parametrize("name", ["", "adapter_model.safetensors", "adapter_config.json"])
def test_a_peft_folder_goes_by_its_own_name_and_by_those_of_its_files(folder: Path, name: str) -> None:
    assert files_of(folder / name) == (folder / "adapter_model.safetensors", folder / "adapter_config.json")


def test_weights_of_another_name_take_the_config_beside_them_where_peft_named_them(folder: Path) -> None:
    assert files_of(folder / "renamed.safetensors") == (folder / "renamed.safetensors", folder / "adapter_config.json")
    assert files_of(folder / "diffusers.safetensors") == (folder / "diffusers.safetensors", None)


def test_weights_by_the_model_s_own_names_under_the_file_name_of_peft_take_the_config_beside_them(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(demo_adapter())

    assert files_of(weights) == (weights, folder / "adapter_config.json")
    (folder / "adapter_config.json").unlink()
    assert files_of(weights) == (weights, None)


def test_weights_of_peft_alone_are_refused_by_what_is_missing(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()

    with pytest.raises(JobFailed, match=r"adapter_config\.json: store that file beside it"):
        files_of(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("content", [b"", b"\x05", b"\xff" * 8, b"\xff" * 8 + b"{", b"PK\x03\x04" + b"x" * 100])
def test_other_file_names_are_not_peft_s(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)

    assert not is_named_by_peft(tmp_path / "a")
