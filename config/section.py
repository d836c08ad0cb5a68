"""What the sections of the settings are made of: where they are read, how values are judged, how problems are told."""

import re
from typing import Any, TypeVar
from urllib.parse import SplitResult, urlsplit

from pydantic import ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from config.redacting import redacted

# What S3, its older buckets and Google Cloud Storage take, so that settings and jobs agree. No colon and no slash: an
# ARN as bucket makes botocore dial another host.
BUCKET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,220}[A-Za-z0-9]")
BUCKET_RULE = "3 to 222 letters, digits, dots, dashes and underscores, a letter or digit at both ends"


class SettingsError(Exception):
    """One or more settings are missing or wrong; the message lists all of them, one a line."""


class Section(BaseSettings):
    """Some settings, from the environment and from `.env`."""

    # An empty variable means "not set": compose files and RunPod templates pass every name, filled in or not.
    model_config = SettingsConfigDict(
        env_file=".env",
        extra="ignore",
        frozen=True,
        env_ignore_empty=True,
        hide_input_in_errors=True,
        allow_inf_nan=False,
    )


S = TypeVar("S", bound=Section)


def load_section(section: type[S]) -> S:
    """Read one section alone, for commands that need no more; raise `SettingsError` with its problems."""
    try:
        return section()
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False)
        raise SettingsError("\n".join(_describe(problem) for problem in problems)) from error


def split_commas(value: object) -> object:
    """Turn `"a, b"` into `("a", "b")`, and leave what is no string for pydantic to judge."""
    if not isinstance(value, str):
        return value
    return tuple(part.strip() for part in value.split(",") if part.strip())


def bucket_name(name: str) -> str:
    """`name`; raises `ValueError` where no bucket can be called so."""
    if not BUCKET_NAME.fullmatch(name):
        raise ValueError(f"{name[:80]!r} is no bucket name: {BUCKET_RULE}")
    return name


def http_url(url: str) -> str:
    """`url` without a slash at its end; raises `ValueError` where it is none that a path can be put behind."""
    parts = url_parts(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be an http:// or https:// URL with a host")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError("must not carry a user, a password, a query or a fragment")
    return url.rstrip("/")


def url_parts(url: str) -> SplitResult:
    """What `url` consists of; raises `ValueError` that quotes nothing of it."""
    # urlsplit's own complaints may quote user and password.
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise ValueError("is not a URL: look at its host and port") from None
    return parts


def _describe(problem: Any) -> str:
    variable = str(problem["loc"][0]) if problem["loc"] else ""
    message = (
        "is not set and has no default"
        if problem["type"] == "missing"
        else problem["msg"].removeprefix("Value error, ")
    )
    return redacted(f"{variable}: {message}".removeprefix(": "))
