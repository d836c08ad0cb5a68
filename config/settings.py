"""Every setting of the worker, one frozen section a consumer, read from the environment and from `.env`.

`load_settings` is the only way in: it builds all sections, collects every problem of all of them, and raises one
`SettingsError` that names each variable. Secrets are `SecretStr`, so that a printed section never shows them.
"""

import base64
import binascii
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import SplitResult, quote, urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from config.presets import load_presets

DEFAULT_MODEL_ID = "stable-diffusion-v1-5/stable-diffusion-v1-5"


class SettingsError(Exception):
    """One or more settings are missing or wrong; the message lists all of them, one a line."""


def _split_commas(value: object) -> object:
    """Turn `"a, b"` into `("a", "b")`, and leave what is no string for pydantic to judge."""
    if not isinstance(value, str):
        return value
    return tuple(part.strip() for part in value.split(",") if part.strip())


class _Section(BaseSettings):
    # An empty variable means "not set": compose files and RunPod templates pass every name, filled in or not.
    model_config = SettingsConfigDict(
        env_file=".env",
        extra="ignore",
        frozen=True,
        env_ignore_empty=True,
        hide_input_in_errors=True,
        allow_inf_nan=False,
    )


S = TypeVar("S", bound=_Section)


class BrokerSettings(_Section):
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
        if url is not None and _parts(url.get_secret_value()).scheme not in ("amqp", "amqps"):
            raise ValueError("must begin with amqp:// or amqps://")
        return url

    @property
    def amqp_url(self) -> str:
        """The connection URL with the password in it. Never log it."""
        if self.url is not None:
            return self.url.get_secret_value()
        password = quote(self.password.get_secret_value(), safe="")
        return f"amqp://{quote(self.user, safe='')}:{password}@{self.host}:{self.port}/{quote(self.vhost, safe='')}"


class StoreSettings(_Section):
    """S3 or a store that speaks it: adapters and signatures in, pictures and job records out."""

    access_key_id: str | None = Field(
        None, validation_alias="AWS_ACCESS_KEY_ID", description="Access key; unset uses the instance's role"
    )
    secret_access_key: SecretStr | None = Field(
        None, validation_alias="AWS_SECRET_ACCESS_KEY", description="Secret of the access key"
    )
    bucket: str = Field(
        validation_alias="AWS_STORAGE_BUCKET_NAME",
        min_length=3,
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

    _split = field_validator("other_allowed_buckets", mode="before")(_split_commas)

    @field_validator("endpoint_url", "result_url_base")
    @classmethod
    def _is_http_url(cls, url: str | None) -> str | None:
        return None if url is None else _http_url(url)

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


class BackendSettings(_Section):
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

    _split = field_validator("progress_milestones", mode="before")(_split_commas)

    @field_validator("base_url")
    @classmethod
    def _is_http_url(cls, url: str) -> str:
        return _http_url(url)

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


class ModelSettings(_Section):
    """The resident model and how it runs."""

    model_id: str = Field(
        DEFAULT_MODEL_ID,
        validation_alias="MODEL_ID",
        min_length=1,
        description="Folder, hub id or single `.safetensors` file of the model",
    )
    config_source: str | None = Field(
        None,
        validation_alias="MODEL_CONFIG",
        description="Folder or hub id of a single file's configs and tokenizers; unset asks the hub",
    )
    cuda_visible_devices: str | None = Field(
        None, validation_alias="CUDA_VISIBLE_DEVICES", description="The GPU to use, as CUDA reads it"
    )
    device: str = Field(
        "auto",
        validation_alias="DEVICE",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="`auto`, `cpu`, `cuda` or `cuda:N`",
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto", validation_alias="DTYPE", description="`auto` is float32 on a CPU, bfloat16 or float16 on a GPU"
    )
    max_concurrent_generations: int = Field(
        10, validation_alias="MAX_CONCURRENT_GENERATIONS", ge=1, le=256, description="Pictures denoised at once"
    )
    adapter_slots: int = Field(
        16, validation_alias="ADAPTER_SLOTS", ge=4, le=1024, description="Adapters kept in the model at once"
    )
    adapter_max_rank: int = Field(
        256,
        validation_alias="ADAPTER_MAX_RANK",
        ge=8,
        le=512,
        multiple_of=8,
        description="Highest rank of an adapter; memory is taken as adapters of high rank come",
    )
    inference_steps: int | None = Field(
        None,
        validation_alias="INFERENCE_STEPS",
        ge=1,
        le=150,
        description="Denoise steps where a job names none; unset is 50, for Z-Image 8",
    )
    guidance_scale: float | None = Field(
        None,
        validation_alias="GUIDANCE_SCALE",
        ge=0,
        le=50,
        description="Guidance where a job names none; unset is 7.5, for Z-Image 0",
    )
    controlnets: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        validation_alias="CONTROLNETS",
        description="ControlNets that jobs may name, comma-separated: `name=folder` or `name=hub id`",
    )
    controlnet_memory_gb: float = Field(
        4.0,
        validation_alias="CONTROLNET_MEMORY_GB",
        gt=0,
        description="Memory the resident ControlNets are kept under, GB; the least recently used goes first",
    )
    preview_every: int = Field(
        0, validation_alias="PREVIEW_EVERY", ge=0, le=150, description="Steps between two previews; 0 makes none"
    )
    safety_checker: bool = Field(
        False,
        validation_alias="SAFETY_CHECKER",
        description="`on` fails jobs whose pictures the checkpoint's own safety checker flags",
    )

    _split = field_validator("controlnets", mode="before")(_split_commas)

    @field_validator("controlnets")
    @classmethod
    def _are_named(cls, controlnets: tuple[str, ...]) -> tuple[str, ...]:
        names = [one.partition("=")[0] for one in controlnets]
        if not all(re.fullmatch(r"[\w.-]{1,100}=.+", one) for one in controlnets) or len(set(names)) < len(names):
            raise ValueError("must be name=folder or name=owner/hub-id, comma-separated, each name once")
        return controlnets

    @field_validator("safety_checker")
    @classmethod
    def _goes_without_previews(cls, is_on: bool, found: ValidationInfo) -> bool:
        if is_on and found.data.get("preview_every"):
            raise ValueError("cannot be on with PREVIEW_EVERY: a preview is stored before the picture can be checked")
        return is_on

    @property
    def controlnet_max_bytes(self) -> int:
        return int(self.controlnet_memory_gb * 1e9)

    @property
    def controlnet_sources(self) -> dict[str, str]:
        """Folder or hub id of each ControlNet by its name."""
        pairs = (one.partition("=") for one in self.controlnets)
        return {name: source for name, _, source in pairs}


class ServiceSettings(_Section):
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
    shutdown_grace_seconds: float = Field(
        120.0, validation_alias="SHUTDOWN_GRACE_SECONDS", ge=0, description="Time running jobs get after SIGTERM"
    )
    font_dirs: Annotated[tuple[Path, ...], NoDecode] = Field(
        (Path("/usr/share/fonts"), Path("/usr/local/share/fonts")),
        validation_alias="FONT_DIRS",
        description="Folders searched for the fonts of signatures and headlines, comma-separated",
    )

    _split = field_validator("font_dirs", mode="before")(_split_commas)


class PictureSettings(_Section):
    """What pictures are made of beside the model, and what they carry."""

    embed_metadata: Literal["none", "provenance", "full"] = Field(
        "provenance",
        validation_alias="EMBED_METADATA",
        description="`provenance` says in the file that a model drew it, `full` the prompts too, `none` nothing",
    )
    c2pa_certificate: Path | None = Field(
        None,
        validation_alias="C2PA_CERTIFICATE",
        description="PEM chain; set, every picture has a signed C2PA manifest",
    )
    c2pa_private_key: Path | None = Field(
        None, validation_alias="C2PA_PRIVATE_KEY", description="PEM key of the certificate, PKCS #8"
    )
    presets_file: Path | None = Field(
        None, validation_alias="PRESETS_FILE", description="YAML of styles and industries in place of the built-in one"
    )
    cutout_model: Path | None = Field(
        None,
        validation_alias="CUTOUT_MODEL",
        description="ONNX file (U2-Net's or IS-Net's interface) that cuts products out; unset, they need alpha "
        "of their own",
    )

    @field_validator("presets_file")
    @classmethod
    def _holds_presets(cls, path: Path | None) -> Path | None:
        if path is not None:
            load_presets(path)
        return path

    @field_validator("c2pa_certificate")
    @classmethod
    def _has_what_to_sign(cls, certificate: Path | None, found: ValidationInfo) -> Path | None:
        if certificate is not None and found.data.get("embed_metadata") == "none":
            raise ValueError("cannot be used with EMBED_METADATA=none, which writes nothing: change one of the two")
        return certificate

    @field_validator("cutout_model")
    @classmethod
    def _is_there(cls, model: Path | None) -> Path | None:
        if model is not None and not model.is_file():
            raise ValueError(f"{model} is no file")
        return model

    @field_validator("c2pa_private_key")
    @classmethod
    def _has_its_certificate(cls, key: Path | None, found: ValidationInfo) -> Path | None:
        if (found.data.get("c2pa_certificate") is None) != (key is None):
            raise ValueError("C2PA_CERTIFICATE and C2PA_PRIVATE_KEY belong together: set both or neither")
        return key


class Settings(BaseModel):
    """All sections."""

    model_config = ConfigDict(frozen=True)

    broker: BrokerSettings
    store: StoreSettings
    backend: BackendSettings
    model: ModelSettings
    pictures: PictureSettings
    service: ServiceSettings


SECTIONS: dict[str, type[_Section]] = {
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
        raise SettingsError("\n".join(problems))
    return Settings(**sections)


def load_section(section: type[S]) -> S:
    """Read one section alone, for commands that need no more; raise `SettingsError` with its problems."""
    try:
        return section()
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False)
        raise SettingsError("\n".join(_describe(problem) for problem in problems)) from error


def _describe(problem: Any) -> str:
    variable = str(problem["loc"][0]) if problem["loc"] else ""
    message = (
        "is not set and has no default"
        if problem["type"] == "missing"
        else problem["msg"].removeprefix("Value error, ")
    )
    return f"{variable}: {message}".removeprefix(": ")


def _parts(url: str) -> SplitResult:
    # urlsplit's own complaints may quote user and password.
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise ValueError("is not a URL: look at its host and port") from None
    return parts


def _http_url(url: str) -> str:
    parts = _parts(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be an http:// or https:// URL with a host")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError("must not carry a user, a password, a query or a fragment")
    return url.rstrip("/")
