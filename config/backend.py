"""Settings of the backend that receives the webhooks."""

import base64
import binascii
import re
from typing import Annotated, Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import NoDecode

from config.section import Section, check_address, check_http_url, split_commas


class BackendSettings(Section):
    """The backend that receives progress and results."""

    base_url: str = Field(validation_alias="BACKEND_API_URL", description="Base URL of the backend's webhooks")
    token: SecretStr = Field(validation_alias="INTERNAL_API_TOKEN", description="Bearer token the backend expects")
    signing_secret: SecretStr | None = Field(
        None,
        validation_alias="WEBHOOK_SIGNING_SECRET",
        description="Standard Webhooks secret (`whsec_…`); set, every webhook is signed",
    )
    webhook_url: SecretStr | None = Field(
        None,
        validation_alias="WEBHOOK_URL",
        description="One address for all webhooks: a URL, or a path on BACKEND_API_URL. Each body then has a `type`",
    )
    progress_url: SecretStr | None = Field(
        None,
        validation_alias="WEBHOOK_PROGRESS_URL",
        description="Address of progress alone: a URL, or a path on BACKEND_API_URL",
    )
    complete_url: SecretStr | None = Field(
        None, validation_alias="WEBHOOK_COMPLETE_URL", description="The same for jobs that are complete"
    )
    failed_url: SecretStr | None = Field(
        None, validation_alias="WEBHOOK_FAILED_URL", description="The same for jobs that failed or were cancelled"
    )
    progress_method: Literal["PATCH", "POST"] | None = Field(
        None,
        validation_alias="WEBHOOK_PROGRESS_METHOD",
        description="`PATCH` or `POST`, for a gateway that passes no PATCH; unset is PATCH, to WEBHOOK_URL POST",
    )
    progress_milestones: Annotated[tuple[int, ...], NoDecode] = Field(
        (0, 25, 50, 75, 90), validation_alias="PROGRESS_MILESTONES", description="Percentages reported, comma-separated"
    )

    _split = field_validator("progress_milestones", mode="before")(split_commas)
    _is_http_url = field_validator("base_url")(check_http_url)

    # Secret, as gateways have keys in the query or the path.
    @field_validator("webhook_url", "progress_url", "complete_url", "failed_url")
    @classmethod
    def _is_address(cls, address: SecretStr | None) -> SecretStr | None:
        if address is not None:
            check_address(address.get_secret_value())
        return address

    def address_of(self, address: SecretStr) -> str:
        """Return the URL of one of the addresses; never log it whole."""
        text = address.get_secret_value()
        return self.base_url + text if text.startswith("/") else text

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
