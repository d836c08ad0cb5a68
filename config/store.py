"""Settings of the S3 store, its buckets and the download cache."""

import re
from pathlib import Path
from typing import Annotated

from pydantic import Field, SecretStr, ValidationInfo, field_validator
from pydantic_settings import NoDecode

from config.section import Section, check_bucket_name, check_http_url, split_commas

PLAIN = "plain"
PRESIGNED = re.compile(r"presigned:([0-9]{1,9})")
MAX_PRESIGNED_SECONDS = 604_800
# RFC 9111 5.2: tokens, each with an argument or none, which is a token or a quoted string.
_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # noqa: S105 - RFC 9110's word for a word
_DIRECTIVE = rf'{_TOKEN}(?:=(?:{_TOKEN}|"[\x20\x21\x23-\x5b\x5d-\x7e]*"))?'
CACHE_CONTROL = re.compile(rf"{_DIRECTIVE}(?:[ \t]*,[ \t]*{_DIRECTIVE})*")


class StoreSettings(Section):
    """S3 or a compatible store: adapters and signatures in, images and job records out."""

    access_key_id: str | None = Field(
        None, validation_alias="AWS_ACCESS_KEY_ID", description="Access key; unset uses the instance's role"
    )
    secret_access_key: SecretStr | None = Field(
        None, validation_alias="AWS_SECRET_ACCESS_KEY", description="Secret of the access key"
    )
    session_token: SecretStr | None = Field(
        None, validation_alias="AWS_SESSION_TOKEN", description="Session token of a temporary access key, sent with it"
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
    result_url_mode: str = Field(
        "plain",
        validation_alias="RESULT_URL_MODE",
        description="`plain`, or `presigned:SECONDS`: a private bucket's pictures open for so long",
    )
    result_cache_control: str = Field(
        "no-cache",
        validation_alias="RESULT_CACHE_CONTROL",
        description="`Cache-Control` of stored pictures; one that is drawn again has the key it had",
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
        return None if name is None else check_bucket_name(name)

    @field_validator("other_allowed_buckets")
    @classmethod
    def _are_bucket_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(check_bucket_name(name) for name in names)

    @field_validator("endpoint_url", "result_url_base")
    @classmethod
    def _is_http_url(cls, url: str | None) -> str | None:
        return None if url is None else check_http_url(url)

    @field_validator("result_url_mode")
    @classmethod
    def _is_url_mode(cls, mode: str) -> str:
        found = PRESIGNED.fullmatch(mode)
        if mode != PLAIN and found is None:
            raise ValueError("must be plain or presigned:SECONDS, like presigned:3600")
        if found is not None and not 1 <= int(found[1]) <= MAX_PRESIGNED_SECONDS:
            limit = f"presigned:1 to presigned:{MAX_PRESIGNED_SECONDS}"
            raise ValueError(f"must be {limit}: no signature of S3's is valid for more than seven days")
        return mode

    @field_validator("result_cache_control")
    @classmethod
    def _is_cache_control(cls, directives: str) -> str:
        if not CACHE_CONTROL.fullmatch(directives):
            raise ValueError("must be directives separated by commas, like public, max-age=31536000, immutable")
        return directives

    # On the field, not on the model: pydantic runs model validators only once all fields are valid.
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
    def presigned_seconds(self) -> int | None:
        """Validity of presigned result addresses; None where they are plain."""
        return None if self.result_url_mode == PLAIN else int(self.result_url_mode.partition(":")[2])

    @property
    def allowed_buckets(self) -> frozenset[str]:
        return frozenset(self.other_allowed_buckets) or frozenset((self.bucket, self.results_bucket))

    @property
    def cache_max_bytes(self) -> int:
        return int(self.cache_max_gb * 1e9)
