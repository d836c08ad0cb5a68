"""One way in, every problem at once, no secret out; and `.env.example` says the same as the settings."""

import os
import re
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from config.backend import BackendSettings
from config.broker import BrokerSettings
from config.images import ImageSettings
from config.model import ModelSettings
from config.redacting import redacted
from config.section import SettingsError, load_section
from config.service import ServiceSettings
from config.settings import SECTIONS, Settings, load_settings
from config.store import StoreSettings
from tests.support.paths import ROOT

DARKROOM = Path(sys.executable).with_name("darkroom")

CANARY = "canary-5f1e"
REQUIRED = {
    "AWS_STORAGE_BUCKET_NAME": "media",
    "BACKEND_API_URL": "https://backend.example",
    "INTERNAL_API_TOKEN": CANARY,
}
SECRETS = {
    "RABBITMQ_URL": f"amqp://worker:{CANARY}@broker/",
    "RABBITMQ_PASS": CANARY,
    "AWS_ACCESS_KEY_ID": "AKIA0",
    "AWS_SECRET_ACCESS_KEY": CANARY,
    "AWS_SESSION_TOKEN": CANARY,
    "INTERNAL_API_TOKEN": CANARY,
    "WEBHOOK_SIGNING_SECRET": CANARY,
    "WEBHOOK_URL": f"https://hooks.example/{CANARY}?code={CANARY}",
    "WEBHOOK_PROGRESS_URL": f"/progress?code={CANARY}",
    "WEBHOOK_COMPLETE_URL": f"/complete?code={CANARY}",
    "WEBHOOK_FAILED_URL": f"/failed?code={CANARY}",
}
FIELDS: dict[str, tuple[str, str, FieldInfo]] = {
    str(field.validation_alias): (section, name, field)
    for section, cls in SECTIONS.items()
    for name, field in cls.model_fields.items()
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Set the required settings in the environment and no other of ours."""
    for variable in FIELDS:
        monkeypatch.delenv(variable, raising=False)
    return set_all(monkeypatch, REQUIRED)


def set_all(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> pytest.MonkeyPatch:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def problems_of_all() -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load_settings()
    return str(caught.value).splitlines()


def value_of(settings: Settings, variable: str) -> Any:
    section, name, _ = FIELDS[variable]
    return getattr(getattr(settings, section), name)


# --- Loading


def test_three_variables_are_enough(environment: pytest.MonkeyPatch) -> None:
    settings = load_settings()

    assert settings.store.bucket == "media"
    assert settings.backend.base_url == "https://backend.example"
    assert settings.backend.token.get_secret_value() == CANARY


def test_the_defaults_are_those_of_the_contract(environment: pytest.MonkeyPatch) -> None:
    settings = load_settings()

    assert settings.broker.queue == "image_generation"
    assert settings.broker.consumed == (("image_generation", 1),)
    assert settings.model.model_id == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert (settings.model.device, settings.model.dtype) == ("auto", "auto")
    assert settings.model.max_concurrent_generations == 10
    # 50 and 7.5 for Stable Diffusion: each family has its own.
    assert settings.model.inference_steps is None
    assert settings.model.guidance_scale is None
    assert settings.service.metrics_port == 9464
    assert settings.backend.progress_milestones == (0, 25, 50, 75, 90)


def test_several_queues_are_read_with_their_weights(environment: pytest.MonkeyPatch) -> None:
    set_all(environment, {"RABBITMQ_QUEUE": "plain", "RABBITMQ_QUEUES": "plain.express:3, plain:1"})

    assert load_settings().broker.consumed == (("plain.express", 3), ("plain", 1))


def test_the_required_variables_are_exactly_these() -> None:
    assert {name for name, (_, _, field) in FIELDS.items() if field.is_required()} == set(REQUIRED)


@pytest.mark.parametrize("variable", sorted(FIELDS.keys() - REQUIRED.keys() - {"CUDA_VISIBLE_DEVICES"}))
def test_an_empty_variable_counts_as_not_set(environment: pytest.MonkeyPatch, variable: str) -> None:
    without = load_settings()

    environment.setenv(variable, "")

    assert load_settings() == without


@pytest.mark.parametrize("variable", sorted(REQUIRED))
def test_a_required_variable_that_is_empty_is_reported_as_not_set(
    environment: pytest.MonkeyPatch, variable: str
) -> None:
    environment.setenv(variable, "")

    assert problems_of_all() == [f"{variable}: is not set and has no default"]


def test_lists_are_split_at_commas(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("ALLOWED_BUCKETS", " media, styles ,,")
    environment.setenv("PROGRESS_MILESTONES", "10,50")
    environment.setenv("FONT_DIRS", "/usr/share/fonts, /opt/my fonts")

    settings = load_settings()

    assert settings.store.allowed_buckets == {"media", "styles"}
    assert settings.backend.progress_milestones == (10, 50)
    assert settings.service.font_dirs == (Path("/usr/share/fonts"), Path("/opt/my fonts"))


def test_allowed_buckets_default_to_the_configured_ones(environment: pytest.MonkeyPatch) -> None:
    assert load_settings().store.allowed_buckets == {"media"}

    environment.setenv("AWS_RESULTS_BUCKET_NAME", "pictures")

    assert load_settings().store.results_bucket == "pictures"
    assert load_settings().store.allowed_buckets == {"media", "pictures"}


def test_result_addresses_are_plain_unless_seconds_are_given(environment: pytest.MonkeyPatch) -> None:
    assert load_settings().store.presigned_seconds is None

    environment.setenv("RESULT_URL_MODE", "presigned:604800")

    assert load_settings().store.presigned_seconds == 604800


@pytest.mark.parametrize(
    "directives", ["no-cache", "public, max-age=31536000,immutable", 'private="x-a, b", max-age=1']
)
def test_cache_control_of_any_directives_is_accepted(environment: pytest.MonkeyPatch, directives: str) -> None:
    environment.setenv("RESULT_CACHE_CONTROL", directives)

    assert load_settings().store.result_cache_control == directives


def test_the_broker_url_is_built_of_its_parts_with_every_special_sign_escaped(environment: pytest.MonkeyPatch) -> None:
    parts = {"HOST": "broker", "PORT": "5673", "USER": "a b", "PASS": "p@ss/w:rd", "VHOST": "/jobs"}
    set_all(environment, {f"RABBITMQ_{name}": value for name, value in parts.items()})

    assert load_settings().broker.amqp_url == "amqp://a%20b:p%40ss%2Fw%3Ard@broker:5673/%2Fjobs"


def test_the_broker_url_wins_over_its_parts(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("RABBITMQ_HOST", "elsewhere")
    environment.setenv("RABBITMQ_URL", "amqps://worker:secret@broker/jobs")

    assert load_settings().broker.amqp_url == "amqps://worker:secret@broker/jobs"


def test_a_section_cannot_be_changed_once_it_is_read(environment: pytest.MonkeyPatch) -> None:
    settings = load_settings()

    with pytest.raises(ValueError, match="frozen"):
        settings.model.inference_steps = 1


# --- Problems


def test_problems_of_all_sections_are_reported_together(environment: pytest.MonkeyPatch) -> None:
    # Given one or two mistakes in every section
    wrong = {
        "RABBITMQ_PORT": "70000",
        "RABBITMQ_QUEUE": "two words",
        "AWS_STORAGE_BUCKET_NAME": "",
        "CACHE_MAX_GB": "-1",
        "BACKEND_API_URL": "backend.example",
        "INTERNAL_API_TOKEN": "",
        "DTYPE": "fp16",
        "LOG_LEVEL": "LOUD",
    }
    set_all(environment, wrong)

    # When the settings are read
    problems = problems_of_all()

    # Then each mistake has its line, which begins with its variable
    assert {problem.split(":")[0] for problem in problems} == set(wrong)
    assert len(problems) == len(wrong)


@pytest.mark.parametrize(
    ("variable", "value", "right"),
    [
        ("RABBITMQ_URL", "http://broker/", "amqp://"),
        ("RABBITMQ_PORT", "x", "integer"),
        ("RABBITMQ_PORT", "0", "1"),
        ("RABBITMQ_QUEUE", "a b", "A-Za-z0-9"),
        ("RABBITMQ_QUEUES", "express,image_generation:1", "'express' is no queue with its weight, like express:3"),
        ("RABBITMQ_QUEUES", "express:0,image_generation:1", "an integer from 1 to 100"),
        ("RABBITMQ_QUEUES", "express:101,image_generation:1", "an integer from 1 to 100"),
        ("RABBITMQ_QUEUES", "two words:3,image_generation:1", "dashes and underscores"),
        ("RABBITMQ_QUEUES", "image_generation:3,image_generation:1", "has image_generation twice"),
        ("RABBITMQ_QUEUES", "image_generation.dead:3,image_generation:1", "a queue of the worker's own"),
        ("RABBITMQ_QUEUES", "express:3,ordinary:1", "must hold image_generation"),
        ("AWS_STORAGE_BUCKET_NAME", "my bucket", "underscores"),
        ("AWS_RESULTS_BUCKET_NAME", "arn:aws:s3:::media", "arn:aws:s3:::media"),
        ("ALLOWED_BUCKETS", "media,styles/neon", "styles/neon"),
        ("RABBITMQ_HEARTBEAT_SECONDS", "0", "2"),
        ("AWS_STORAGE_BUCKET_NAME", "ab", "3"),
        ("AWS_S3_ENDPOINT_URL", "minio:9000", "http://"),
        ("AWS_S3_ENDPOINT_URL", "http://minio:99999", ""),
        ("RESULT_URL_BASE", "ftp://cdn.example", "http://"),
        ("RESULT_URL_MODE", "presigned", "plain or presigned:SECONDS, like presigned:3600"),
        ("RESULT_URL_MODE", "presigned:1h", "presigned:SECONDS"),
        ("RESULT_URL_MODE", "presigned:0", "presigned:1 to presigned:604800"),
        ("RESULT_URL_MODE", "presigned:604801", "valid for more than seven days"),
        ("RESULT_CACHE_CONTROL", "public max-age=60", "commas, like public, max-age=31536000"),
        ("RESULT_CACHE_CONTROL", "public,\nX-Evil: 1", "commas"),
        ("CACHE_MAX_GB", "0", "0"),
        ("CACHE_MAX_GB", "nan", ""),
        ("CACHE_MAX_GB", "inf", "finite"),
        ("BACKEND_API_URL", "backend", "http://"),
        ("BACKEND_API_URL", "http://", "host"),
        ("BACKEND_API_URL", "http://backend:port", ""),
        ("BACKEND_API_URL", "http://user:pw@backend", "user"),
        ("BACKEND_API_URL", "http://backend/?a=1", "query"),
        ("INTERNAL_API_TOKEN", "token\n", "newline"),
        ("WEBHOOK_SIGNING_SECRET", "whsec_***", "base64"),
        ("WEBHOOK_URL", "backend/hook", "a path that begins with a slash"),
        ("WEBHOOK_URL", "//evil.example/hook", "a path that begins with a slash"),
        ("WEBHOOK_URL", "/hook\r\nX: y", "ASCII"),
        ("WEBHOOK_COMPLETE_URL", "https://user:pw@backend/hook", "user"),
        ("WEBHOOK_FAILED_URL", "ftp://backend/hook", "http://"),
        ("WEBHOOK_PROGRESS_URL", "/hook#end", "fragment"),
        ("WEBHOOK_PROGRESS_METHOD", "PUT", "PATCH or POST"),
        ("PROGRESS_MILESTONES", "0,half", "integer"),
        ("PROGRESS_MILESTONES", "50,25", "rise"),
        ("PROGRESS_MILESTONES", "0,100", "below 100"),
        ("DEVICE", "gpu", "cuda"),
        ("DTYPE", "half", "float16"),
        ("MAX_CONCURRENT_GENERATIONS", "0", "1"),
        ("INFERENCE_STEPS", "151", "150"),
        ("GUIDANCE_SCALE", "nan", ""),
        ("GUIDANCE_SCALE", "-1", "0"),
        ("METRICS_PORT", "65536", "65535"),
        ("LOG_LEVEL", "trace", "DEBUG"),
        ("SHUTDOWN_GRACE_SECONDS", "-1", "0"),
    ],
)
def test_a_wrong_value_is_one_problem_that_names_the_variable_and_what_is_right(
    environment: pytest.MonkeyPatch, variable: str, value: str, right: str
) -> None:
    environment.setenv(variable, value)

    problems = problems_of_all()

    assert len(problems) == 1
    assert problems[0].startswith(f"{variable}: ")
    assert right in problems[0]
    # In our own words, not pydantic's, and with the value unless it is a secret.
    assert "nput should" not in problems[0]
    assert "tring should" not in problems[0]
    is_secret = variable in SECRETS or "@" in value
    shown = redacted(value)
    assert is_secret or f"; it is {shown!r}" in problems[0] or shown.rpartition(",")[2] in problems[0]


def test_port_variable_set_by_kubernetes_is_not_taken_for_a_mistake(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("RABBITMQ_PORT", "tcp://10.0.0.1:5672")

    (problem,) = problems_of_all()

    assert "must be an integer; it is 'tcp://10.0.0.1:5672', as Kubernetes sets it" in problem


def test_every_error_type_of_a_setting_has_its_own_sentence(
    environment: pytest.MonkeyPatch,
) -> None:
    for value in ("x", "-1", "0", "1e9", "1.5", "nan", "9" * 5000, " ", "tr\u00fce", "9, 9"):
        for variable in FIELDS:
            environment.setenv(variable, value)
        text = "\n".join(problems_of_all())
        assert not re.search(r"[Ii]nput should|[Ss]tring should|Value error", text), text
        assert all(len(line) <= 500 for line in text.splitlines())


@pytest.mark.parametrize("lonely", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_half_a_key_is_a_problem_that_names_both_variables(environment: pytest.MonkeyPatch, lonely: str) -> None:
    environment.setenv(lonely, CANARY)

    (problem,) = problems_of_all()

    assert "AWS_ACCESS_KEY_ID" in problem
    assert "AWS_SECRET_ACCESS_KEY" in problem


def test_half_a_key_is_reported_together_with_the_other_problems_of_its_section(
    environment: pytest.MonkeyPatch,
) -> None:
    environment.setenv("AWS_ACCESS_KEY_ID", "AKIA0")
    environment.setenv("AWS_STORAGE_BUCKET_NAME", "")

    text = "\n".join(problems_of_all())

    assert "AWS_STORAGE_BUCKET_NAME" in text
    assert "AWS_SECRET_ACCESS_KEY" in text


# --- Secrets


@pytest.mark.parametrize("variable", sorted(SECRETS.keys() - {"AWS_ACCESS_KEY_ID"}))
def test_a_secret_is_a_secret_str(variable: str) -> None:
    _, _, field = FIELDS[variable]

    assert SecretStr in (field.annotation, *getattr(field.annotation, "__args__", ()))


def test_printed_settings_show_no_secret(environment: pytest.MonkeyPatch) -> None:
    set_all(environment, SECRETS)

    settings = load_settings()

    assert settings.backend.token.get_secret_value() == CANARY  # it is there
    for part in (settings, *(getattr(settings, name) for name in SECTIONS)):
        assert CANARY not in repr(part)
        assert CANARY not in str(part)
        assert CANARY not in part.model_dump_json()


WRONG_SECRETS = [
    ("RABBITMQ_URL", f"http://worker:{CANARY}@broker/"),
    ("RABBITMQ_URL", f"amqp://worker:{CANARY}[@broker/"),
    # urlsplit's own complaint about this sign, which becomes a slash under NFKC, repeats user and password.
    ("RABBITMQ_URL", f"amqp://worker:{CANARY}\u2100@broker/"),
    ("INTERNAL_API_TOKEN", f"{CANARY}\n"),
    ("INTERNAL_API_TOKEN", f"{CANARY} {CANARY}"),
    ("WEBHOOK_SIGNING_SECRET", f"whsec_{CANARY}!!"),
    ("WEBHOOK_URL", f"https://hooks.example/{CANARY}#{CANARY}"),
    ("WEBHOOK_URL", f"hooks.example/{CANARY}"),
    ("BACKEND_API_URL", f"https://user:{CANARY}@backend.example"),
    ("BACKEND_API_URL", f"https://user:{CANARY}\u2100@backend.example"),
    ("AWS_S3_ENDPOINT_URL", f"https://user:{CANARY}@minio.example"),
    ("AWS_SECRET_ACCESS_KEY", CANARY),
]


@pytest.mark.parametrize(("variable", "value"), WRONG_SECRETS)
def test_an_error_about_a_secret_does_not_repeat_it(environment: pytest.MonkeyPatch, variable: str, value: str) -> None:
    environment.setenv(variable, value)

    text = "\n".join(problems_of_all())

    assert variable in text
    assert CANARY not in text


@pytest.mark.parametrize(("variable", "value"), WRONG_SECRETS)
def test_even_the_traceback_of_a_settings_error_holds_no_secret(
    environment: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    environment.setenv(variable, value)
    _, _, field = FIELDS[variable]
    section = next(cls for cls in SECTIONS.values() if field in cls.model_fields.values())

    with pytest.raises(SettingsError) as caught:
        load_section(section)

    assert CANARY not in "".join(traceback.format_exception(caught.value))


# --- .env.example


def example_lines() -> list[tuple[bool, str, str]]:
    """Yield for each line of `.env.example` that sets a variable whether it is commented out, its name and value."""
    text = (ROOT / ".env.example").read_text()
    found = re.findall(r"^(#?)([A-Z][A-Z0-9_]*)=(.*)$", text, re.MULTILINE)
    return [(bool(hash_sign), name, value) for hash_sign, name, value in found]


def test_the_example_names_every_variable_once_and_no_other() -> None:
    assert sorted(name for _, name, _ in example_lines()) == sorted(FIELDS)


def test_the_example_leaves_to_be_filled_in_what_is_required_and_comments_out_the_rest() -> None:
    assert {name: is_comment for is_comment, name, _ in example_lines()} == {
        name: not field.is_required() for name, (_, _, field) in FIELDS.items()
    }


def test_the_example_shows_each_default_as_the_worker_reads_it(environment: pytest.MonkeyPatch) -> None:
    defaults = load_settings()

    shown_defaults = {name: value for is_comment, name, value in example_lines() if is_comment}
    # In the environment an empty one hides every GPU.
    del shown_defaults["CUDA_VISIBLE_DEVICES"]
    set_all(environment, shown_defaults)

    assert load_settings() == defaults
    for name, (_, _, field) in FIELDS.items():
        shown = next(value for _, variable, value in example_lines() if variable == name)
        assert bool(shown) == (field.default is not None and field.default != () and not field.is_required())


def test_the_example_explains_each_variable_in_the_words_of_the_settings() -> None:
    words = " ".join(re.sub(r"^# ?", "", line) for line in (ROOT / ".env.example").read_text().splitlines())

    for variable, (_, _, field) in FIELDS.items():
        assert f"{field.description} {variable}=" in words.replace("  ", " ")


def test_a_copied_and_filled_in_example_is_a_working_env_file(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Given a copy of the example with the three gaps filled in, and an empty environment
    text = (ROOT / ".env.example").read_text()
    for variable, value in REQUIRED.items():
        environment.delenv(variable)
        text = text.replace(f"\n{variable}=\n", f"\n{variable}={value}\n")
    (tmp_path / ".env").write_text(text)
    environment.chdir(tmp_path)

    # When the sections read it
    store = StoreSettings(_env_file=".env")  # type: ignore[call-arg]
    backend = BackendSettings(_env_file=".env")  # type: ignore[call-arg]

    # Then what was filled in is there
    assert (store.bucket, backend.base_url) == ("media", "https://backend.example")
    assert backend.token.get_secret_value() == CANARY


# --- The command


def darkroom_run(folder: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return subprocess.run(
        [DARKROOM, "run"],
        cwd=folder,
        env=kept | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_worker_refuses_to_start_with_missing_settings_and_prints_all_of_them(tmp_path: Path) -> None:
    ended = darkroom_run(tmp_path, RABBITMQ_PORT="x", INTERNAL_API_TOKEN=f"{CANARY}\n")

    assert ended.returncode == 2
    for variable in ("AWS_STORAGE_BUCKET_NAME", "BACKEND_API_URL", "INTERNAL_API_TOKEN", "RABBITMQ_PORT"):
        assert f"{variable}: " in ended.stderr
    assert "Traceback" not in ended.stderr
    assert CANARY not in ended.stdout + ended.stderr


def test_every_section_is_loaded() -> None:
    classes = {BrokerSettings, StoreSettings, BackendSettings, ModelSettings, ImageSettings, ServiceSettings}

    assert set(SECTIONS.values()) == classes
    assert set(SECTIONS) == set(Settings.model_fields)


def default_in_words(default: object) -> str:
    if default is PydanticUndefined:
        return "**required**"
    if default is None or default == ():
        return ""
    if isinstance(default, SecretStr):
        return f"`{default.get_secret_value()}`"
    if isinstance(default, tuple):
        return "`" + ",".join(map(str, default)) + "`"
    return f"`{default:g}`" if isinstance(default, float) else f"`{default}`"


def test_the_table_of_settings_has_a_row_for_every_setting_and_no_other() -> None:
    page = (ROOT / "docs" / "settings.md").read_text()
    wanted = [
        f"| `{field.validation_alias}` | {default_in_words(field.default)} | {field.description} |"
        for section in SECTIONS.values()
        for field in section.model_fields.values()
    ]

    found = [line for line in page.splitlines() if line.startswith("| `")]

    assert found == wanted
