"""Settings of the S3 store, its buckets and the download cache."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, SecretStr, ValidationInfo, field_validator
from pydantic_settings import NoDecode

from config.section import Section, check_bucket_name, check_http_url, split_commas


class StoreSettings(Section):
    """S3 or a compatible store: adapters and signatures in, images and job records out."""

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
        return None if name is None else check_bucket_name(name)

    @field_validator("other_allowed_buckets")
    @classmethod
    def _are_bucket_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(check_bucket_name(name) for name in names)

    @field_validator("endpoint_url", "result_url_base")
    @classmethod
    def _is_http_url(cls, url: str | None) -> str | None:
        return None if url is None else check_http_url(url)

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
    def allowed_buckets(self) -> frozenset[str]:
        return frozenset(self.other_allowed_buckets) or frozenset((self.bucket, self.results_bucket))

    @property
    def cache_max_bytes(self) -> int:
        return int(self.cache_max_gb * 1e9)
