"""Every setting of the worker, one frozen section a consumer, read from the environment and from `.env`.

`load_settings` is the only way in: it builds all sections, collects every problem of all of them, and raises one
`SettingsError` that names each variable. Secrets are `SecretStr`, so that a printed section never shows them.
"""

import base64
import binascii
import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationInfo, field_validator
from pydantic_settings import NoDecode

from config.images import PictureSettings
from config.logs import LogFormat
from config.model import ModelSettings
from config.near_names import near_names
from config.section import (
    Section,
    SettingsError,
    bucket_name,
    given_names,
    http_url,
    load_section,
    split_commas,
    url_parts,
)

# The larger sections have files of their own; whoever reads settings finds all of them here.
__all__ = [
    "SECTIONS",
    "BackendSettings",
    "BrokerSettings",
    "ModelSettings",
    "PictureSettings",
    "ServiceSettings",
    "Settings",
    "SettingsError",
    "StoreSettings",
    "doubtful_names",
    "load_section",
    "load_settings",
]


class BrokerSettings(Section):
    """RabbitMQ: where it is and the queue the jobs come from."""

    url: SecretStr | None = Field(
        None, validation_alias="RABBITMQ_URL", description="amqp:// or amqps:// URL; wins over the five names below"
    )
    host: str = Field("localhost", validation_alias="RABBITMQ_HOST", description="Broker host")
    port: int = Field(5672, validation_alias="RABBITMQ_PORT", ge=1, le=65535, description="Broker port")
    user: str = Field("guest", validation_alias="RABBITMQ_USER", description="Broker user")
    password: SecretStr = Field(SecretStr("guest"), validation_alias="RABBITMQ_PASS", description="Broker password")
    vhost: str = Field("/", validation_alias="RABBITMQ_VHOST", description="Virtual host")
    queue: str = Field(
        "image_generation",
        validation_alias="RABBITMQ_QUEUE",
        pattern=r"^[A-Za-z0-9_.\-]{1,100}$",
        description="Queue of the jobs; the worker's own queues are named after it",
    )
    heartbeat_seconds: int = Field(
        20, validation_alias="RABBITMQ_HEARTBEAT_SECONDS", ge=2, le=600, description="AMQP heartbeat"
    )

    consumer_timeout_seconds: float = Field(
        1800.0,
        validation_alias="RABBITMQ_CONSUMER_TIMEOUT_SECONDS",
        ge=6,
        description="The broker's own `consumer_timeout`; jobs at work for a third of it go on lease",
    )

    @field_validator("url")
    @classmethod
    def _is_amqp_url(cls, url: SecretStr | None) -> SecretStr | None:
        if url is not None and url_parts(url.get_secret_value()).scheme not in ("amqp", "amqps"):
            raise ValueError("must begin with amqp:// or amqps://")
        return url

    @property
    def amqp_url(self) -> str:
        """The connection URL with the password in it. Never log it."""
        if self.url is not None:
            return self.url.get_secret_value()
        password = quote(self.password.get_secret_value(), safe="")
        return f"amqp://{quote(self.user, safe='')}:{password}@{self.host}:{self.port}/{quote(self.vhost, safe='')}"


class StoreSettings(Section):
    """S3 or a store that speaks it: adapters and signatures in, pictures and job records out."""

    access_key_id: str | None = Field(
        None, validation_alias="AWS_ACCESS_KEY_ID", description="Access key; unset uses the instance's role"
    )
    secret_access_key: SecretStr | None = Field(
        None, validation_alias="AWS_SECRET_ACCESS_KEY", description="Secret of the access key"
    )
    bucket: str = Field(
        validation_alias="AWS_STORAGE_BUCKET_NAME",
        description="Private bucket: adapters, signatures, job records, products' stages",
    )
    results_bucket_name: str | None = Field(
        None, validation_alias="AWS_RESULTS_BUCKET_NAME", description="Bucket of the pictures, where it is another one"
    )
    region: str = Field("us-east-1", validation_alias="AWS_S3_REGION_NAME", description="Region of the buckets")
    endpoint_url: str | None = Field(
        None, validation_alias="AWS_S3_ENDPOINT_URL", description="Endpoint of an S3-compatible store; unset is AWS"
    )
    other_allowed_buckets: Annotated[tuple[str, ...], NoDecode] = Field(
        (), validation_alias="ALLOWED_BUCKETS", description="Buckets a job may read, comma-separated; default: its own"
    )
    result_url_base: str | None = Field(
        None, validation_alias="RESULT_URL_BASE", description="Public URL in front of the key in `result_url`"
    )
    cache_dir: Path = Field(
        Path("~/.cache/darkroom"), validation_alias="CACHE_DIR", description="Folder of downloaded adapters"
    )
    cache_max_gb: float = Field(
        20.0, validation_alias="CACHE_MAX_GB", gt=0, description="Size the download cache is kept under, GB"
    )

    _split = field_validator("other_allowed_buckets", mode="before")(split_commas)

    @field_validator("bucket", "results_bucket_name")
    @classmethod
    def _is_bucket_name(cls, name: str | None) -> str | None:
        return None if name is None else bucket_name(name)

    @field_validator("other_allowed_buckets")
    @classmethod
    def _are_bucket_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(bucket_name(name) for name in names)

    @field_validator("endpoint_url", "result_url_base")
    @classmethod
    def _is_http_url(cls, url: str | None) -> str | None:
        return None if url is None else http_url(url)

    # On the field, not on the model: a model is judged only once all of its fields are right.
    @field_validator("secret_access_key")
    @classmethod
    def _has_its_id(cls, secret: SecretStr | None, found: ValidationInfo) -> SecretStr | None:
        if (found.data.get("access_key_id") is None) != (secret is None):
            raise ValueError("AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY belong together: set both or neither")
        return secret

    @property
    def results_bucket(self) -> str:
        return self.results_bucket_name or self.bucket

    @property
    def allowed_buckets(self) -> frozenset[str]:
        return frozenset(self.other_allowed_buckets) or frozenset((self.bucket, self.results_bucket))

    @property
    def cache_max_bytes(self) -> int:
        return int(self.cache_max_gb * 1e9)


class BackendSettings(Section):
    """The backend that hears of progress and ends."""

    base_url: str = Field(validation_alias="BACKEND_API_URL", description="Base URL of the backend's webhooks")
    token: SecretStr = Field(validation_alias="INTERNAL_API_TOKEN", description="Bearer token the backend expects")
    signing_secret: SecretStr | None = Field(
        None,
        validation_alias="WEBHOOK_SIGNING_SECRET",
        description="Standard Webhooks secret (`whsec_…`); set, every webhook is signed",
    )
    progress_milestones: Annotated[tuple[int, ...], NoDecode] = Field(
        (0, 25, 50, 75, 90), validation_alias="PROGRESS_MILESTONES", description="Percentages reported, comma-separated"
    )

    _split = field_validator("progress_milestones", mode="before")(split_commas)

    @field_validator("base_url")
    @classmethod
    def _is_http_url(cls, url: str) -> str:
        return http_url(url)

    @field_validator("token")
    @classmethod
    def _fits_a_header(cls, token: SecretStr) -> SecretStr:
        if not re.fullmatch(r"[\x21-\x7e]+", token.get_secret_value()):
            raise ValueError("must be visible ASCII characters; perhaps it is empty or ends with a newline")
        return token

    @field_validator("signing_secret")
    @classmethod
    def _is_base64(cls, secret: SecretStr | None) -> SecretStr | None:
        text = "" if secret is None else secret.get_secret_value()
        if text.startswith("whsec_"):
            try:
                base64.b64decode(text.removeprefix("whsec_"), validate=True)
            except binascii.Error as error:
                raise ValueError("must be base64 behind its whsec_") from error
        return secret

    @field_validator("progress_milestones")
    @classmethod
    def _rises(cls, milestones: tuple[int, ...]) -> tuple[int, ...]:
        if list(milestones) != sorted(set(milestones)) or any(not 0 <= m < 100 for m in milestones):
            raise ValueError("must rise from 0 to below 100, like 0,25,50,75,90")
        return milestones


class ServiceSettings(Section):
    """The process itself: HTTP, logs, shutdown, fonts."""

    metrics_port: int = Field(
        9464,
        validation_alias="METRICS_PORT",
        ge=0,
        le=65535,
        description="Port of health and metrics; 0 takes a free one",
    )
    status_show_prompts: bool = Field(
        False,
        validation_alias="STATUS_SHOW_PROMPTS",
        description="Show prompts, and errors that may quote them, on the status page, which has no password",
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "INFO", validation_alias="LOG_LEVEL", description="DEBUG, INFO, WARNING or ERROR"
    )
    log_format: LogFormat = Field(
        "auto",
        validation_alias="LOG_FORMAT",
        description="`json` (on stdout), `text` (on stderr, for people) or `auto`: text where stderr is a terminal",
    )
    shutdown_grace_seconds: float = Field(
        120.0, validation_alias="SHUTDOWN_GRACE_SECONDS", ge=0, description="Time running jobs get after SIGTERM"
    )
    font_dirs: Annotated[tuple[Path, ...], NoDecode] = Field(
        (Path("/usr/share/fonts"), Path("/usr/local/share/fonts")),
        validation_alias="FONT_DIRS",
        description="Folders searched for the fonts of signatures and headlines, comma-separated",
    )

    _split = field_validator("font_dirs", mode="before")(split_commas)


class Settings(BaseModel):
    """All sections."""

    model_config = ConfigDict(frozen=True)

    broker: BrokerSettings
    store: StoreSettings
    backend: BackendSettings
    model: ModelSettings
    pictures: PictureSettings
    service: ServiceSettings


SECTIONS: dict[str, type[Section]] = {
    "broker": BrokerSettings,
    "store": StoreSettings,
    "backend": BackendSettings,
    "model": ModelSettings,
    "pictures": PictureSettings,
    "service": ServiceSettings,
}


def load_settings() -> Settings:
    """Read every section from the environment (and `.env`); raise one `SettingsError` that lists every problem."""
    sections: dict[str, Any] = {}
    problems: list[str] = []
    for name, section in SECTIONS.items():
        try:
            sections[name] = load_section(section)
        except SettingsError as error:
            problems.append(str(error))

    if problems:
        # What is wrong with `.env` itself is wrong with it for each section.
        raise SettingsError("\n".join(dict.fromkeys(problems)))
    return Settings(**sections)


def doubtful_names() -> list[str]:
    """A sentence on each variable that is set and is no setting, but nearly one that is not set."""
    known = [str(field.validation_alias) for section in SECTIONS.values() for field in section.model_fields.values()]
    near = near_names(given_names(), known)
    return [f"{name} is set and is no setting of Darkroom: is {meant} meant?" for name, meant in near.items()]
