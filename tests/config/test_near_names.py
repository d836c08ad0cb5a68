"""Names that are nearly a setting's, and names that belong to others."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from config.near_names import ALIASES, near_names
from config.section import SettingsError, load_section
from config.settings import SECTIONS, misspelled_names
from config.store import StoreSettings

KNOWN = {str(field.validation_alias) for cls in SECTIONS.values() for field in cls.model_fields.values()}


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("RABITMQ_HOST", "RABBITMQ_HOST"),
        ("RABBITMQ_HSOT", "RABBITMQ_HOST"),
        ("RABBIT_MQ_HOST", "RABBITMQ_HOST"),
        ("RABBIT_HOST", "RABBITMQ_HOST"),
        ("rabitmq_host", "RABBITMQ_HOST"),
        ("RABBITMQ_PASSWORD", "RABBITMQ_PASS"),
        ("RABBITMQ_USERNAME", "RABBITMQ_USER"),
        ("RMQ_PASSWORD", "RABBITMQ_PASS"),
        ("RABITMQ_PASSWORD", "RABBITMQ_PASS"),
        ("RABBITMQ_PASWORD", "RABBITMQ_PASS"),
        ("RABBITMQ_USER_NAME", "RABBITMQ_USER"),
        ("BACKEND_BASEURL", "BACKEND_API_URL"),
        ("AWS_BUKET_NAME", "AWS_STORAGE_BUCKET_NAME"),
        ("AMQP_URL", "RABBITMQ_URL"),
        ("RABBITMQ_POST", "RABBITMQ_HOST or RABBITMQ_PORT"),
        ("BACKEND_URL", "BACKEND_API_URL"),
        ("BACKEND_API_URI", ""),
        ("AWS_BUCKET", "AWS_STORAGE_BUCKET_NAME"),
        ("AWS_STORGE_BUCKET_NAME", "AWS_STORAGE_BUCKET_NAME"),
        ("AWS_STORAGE_BUCKETNAME", "AWS_STORAGE_BUCKET_NAME"),
        ("AWS_REGION", "AWS_S3_REGION_NAME"),
        ("S3_ENDPOINT", "AWS_S3_ENDPOINT_URL"),
        ("AWS_SECRET_KEY", "AWS_SECRET_ACCESS_KEY"),
        ("INTERNAL_API_TOKENS", "INTERNAL_API_TOKEN"),
        ("DARKROOM_MODEL_ID", "MODEL_ID"),
        ("MODELID", "MODEL_ID"),
        ("FONT_DIR", "FONT_DIRS"),
        ("LOGLEVEL", "LOG_LEVEL"),
        ("CUDA_VISIBLE_DEVICE", "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_near_name_is_named_with_the_setting_it_means(name: str, meant: str) -> None:
    assert near_names([name], KNOWN) == ({name: meant} if meant else {})


@pytest.mark.parametrize(
    "name",
    [
        "RABBITMQ_NODENAME",
        "RABBITMQ_NODE_PORT",
        "RABBITMQ_HOME",
        "RABBITMQ_BASE",
        "RABBITMQ_LOGS",
        "RABBITMQ_CONFIG_FILE",
        "RABBITMQ_DIST_PORT",
        "RABBITMQ_DEFAULT_USER",
        "RABBITMQ_DEFAULT_PASS",
        "RABBITMQ_DEFAULT_VHOST",
        "RABBITMQ_ERLANG_COOKIE",
        "RABBITMQ_SERVICE_HOST",
        "RABBITMQ_SERVICE_PORT",
        "RABBITMQ_PORT_5672_TCP_ADDR",
        "AWS_PROFILE",
        "AWS_DEFAULT_REGION",
        "AWS_ROLE_ARN",
        "AWS_CONFIG_FILE",
        "AWS_CA_BUNDLE",
        "CUDA_HOME",
        "CUDA_VERSION",
        "CUDA_DEVICE_ORDER",
        "CUDA_LAUNCH_BLOCKING",
        "NVIDIA_VISIBLE_DEVICES",
        "HF_HOME",
        "HF_TOKEN",
        "HF_HUB_OFFLINE",
        "TORCH_HOME",
        "XDG_CACHE_HOME",
        "PIP_CACHE_DIR",
        "HOSTNAME",
        "HOST",
        "PORT",
        "TYPE",
        "USER",
        "PATH",
        "HOME",
        "SHELL",
        "LANG",
        "TERM",
        "TMPDIR",
        "LS_COLORS",
        "LOG_DIR",
        "DEVICE_ID",
        "POSTGRES_USER",
        "POSTGRES_PASSWORD",
        "REDIS_URL",
        "DATABASE_URL",
        "DJANGO_SECRET_KEY",
        "CELERY_BROKER_URL",
        "BROKER_URL",
        "SECRET_KEY",
        "ALLOWED_HOSTS",
        "API_TOKEN",
        "API_URL",
        "KUBERNETES_SERVICE_PORT",
        "PROMETHEUS_PORT",
        "RUNPOD_POD_ID",
        "GF_SECURITY_ADMIN_PASSWORD",
    ],
)
def test_name_of_another_program_s_variable_is_ignored(name: str) -> None:
    assert near_names([name], KNOWN) == {}


def test_near_name_beside_the_setting_it_could_mean_is_ignored() -> None:
    assert near_names(["RABBITMQ_PASSWORD", "RABBITMQ_PASS", "AWS_BUCKET", "aws_storage_bucket_name"], KNOWN) == {}
    assert near_names(["RABBITMQ_PASSWORD", "RABBITMQ_HOSTNAME", "RABBITMQ_URL"], KNOWN) == {}


def test_every_alias_names_a_setting_and_is_not_a_setting_itself() -> None:
    assert set(ALIASES.values()) <= KNOWN
    assert KNOWN.isdisjoint(ALIASES)


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in [one for one in os.environ if one in KNOWN or one in ALIASES]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(StoreSettings.model_config, "env_file", ".env")  # conftest.py takes it out of all
    return tmp_path


def test_names_in_the_env_file_and_in_the_environment_are_checked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / ".env").write_text("RABITMQ_HOST=mq\nAWS_PROFILE=media\nBACKEND_URL=\n")
    monkeypatch.setenv("AWS_BUCKET", "media")

    assert misspelled_names() == [
        "AWS_BUCKET is set and is no setting of Darkroom: is AWS_STORAGE_BUCKET_NAME meant?",
        "RABITMQ_HOST is set and is no setting of Darkroom: is RABBITMQ_HOST meant?",
    ]


def test_a_missing_setting_s_problem_names_what_was_set_in_its_place(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("S3_BUCKET", "media")

    with pytest.raises(SettingsError, match=r"^AWS_STORAGE_BUCKET_NAME: is not set .*S3_BUCKET is set"):
        load_section(StoreSettings)


def test_an_env_file_as_windows_editors_write_it_is_read_from_its_first_name_on(folder: Path) -> None:
    (folder / ".env").write_bytes("\ufeffAWS_STORAGE_BUCKET_NAME=media\r\nAWS_S3_REGION_NAME=eu-west-1\r\n".encode())

    store = load_section(StoreSettings)

    assert (store.bucket, store.region) == ("media", "eu-west-1")


def test_env_file_that_is_not_utf_8_is_a_problem_without_a_traceback(folder: Path) -> None:
    (folder / ".env").write_bytes("AWS_STORAGE_BUCKET_NAME=media\r\n".encode("utf-16"))

    with pytest.raises(SettingsError, match=r"\.env cannot be read as UTF-8"):
        load_section(StoreSettings)


def test_command_warns_once_of_each_near_name(folder: Path) -> None:
    env = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    (folder / ".env").write_text("RABITMQ_HOST=mq\nRABBITMQ_PORT=x\nBACKEND_URL=http://b\nAWS_BUCKET=media\n")
    command = [str(Path(sys.executable).parent / "darkroom"), "dead", "list"]

    ended = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False)

    assert ended.returncode == 2
    for name in ("RABITMQ_HOST", "BACKEND_URL is", "AWS_BUCKET"):
        assert ended.stderr.count(name) == 1
    assert "RABBITMQ_PORT: must be an integer; it is 'x'" in ended.stderr
