"""Base class of the sections of the settings: reading, shared checks of values, reporting of problems."""

import os
import re
from typing import TypeVar
from urllib.parse import SplitResult, urlsplit

from dotenv import dotenv_values
from pydantic import ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from config.near_names import near_names
from config.problems import describe

ENV_FILE = ".env"
# Editors on Windows write a byte order mark, which would become part of the first name.
ENV_ENCODING = "utf-8-sig"

# What S3, its older buckets and Google Cloud Storage take, so that settings and jobs agree. No colon and no slash: an
# ARN as bucket makes botocore dial another host.
BUCKET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,220}[A-Za-z0-9]")
BUCKET_RULE = "3 to 222 letters, digits, dots, dashes and underscores, a letter or digit at both ends"


class SettingsError(Exception):
    """One or more settings are missing or wrong; the message lists all of them, one a line."""


class Section(BaseSettings):
    """Base of a section: settings of one consumer, from the environment and from `.env`."""

    # An empty variable means "not set": compose files and RunPod templates pass every name, filled in or not.
    model_config = SettingsConfigDict(
        env_file=ENV_FILE,
        env_file_encoding=ENV_ENCODING,
        extra="ignore",
        frozen=True,
        env_ignore_empty=True,
        hide_input_in_errors=True,
        allow_inf_nan=False,
    )


S = TypeVar("S", bound=Section)


def load_section(section: type[S]) -> S:
    """Read one section alone, for commands that need no other; raise `SettingsError` with all its problems."""
    names = nonempty_variables(section)
    try:
        return section()
    except ValidationError as error:
        problems = error.errors(include_url=False)
        fields = {str(field.validation_alias): field for field in section.model_fields.values()}
        meant_by = {meant: name for name, meant in near_names(names, fields).items()}
        raise SettingsError("\n".join(describe(problem, fields, meant_by) for problem in problems)) from error
    except OSError as error:
        # For example a file name that is too long.
        raise SettingsError(f"a file that a setting names cannot be used: {error.strerror}") from error


def nonempty_variables(section: type[Section] = Section) -> dict[str, str]:
    """Return all non-empty variables of the environment and of the section's file by name; the environment wins.

    Raises `SettingsError` where the file cannot be read.
    """
    file = section.model_config.get("env_file")
    try:
        in_file = dotenv_values(ENV_FILE, encoding=ENV_ENCODING) if file is not None else {}
    except (UnicodeDecodeError, OSError) as error:
        raise SettingsError(f"{ENV_FILE} cannot be read as UTF-8: {error}") from error
    pairs = {**in_file, **os.environ}
    return {name: value for name, value in pairs.items() if value}


def split_commas(value: object) -> object:
    """Turn `"a, b"` into `("a", "b")`, and leave other types for pydantic to validate."""
    if not isinstance(value, str):
        return value
    return tuple(part.strip() for part in value.split(",") if part.strip())


def check_bucket_name(name: str) -> str:
    """Return `name`; raise `ValueError` where it is no valid bucket name."""
    if not BUCKET_NAME.fullmatch(name):
        raise ValueError(f"{name[:80]!r} is no bucket name: {BUCKET_RULE}")
    return name


def check_http_url(url: str) -> str:
    """Return `url` without its trailing slash; raise `ValueError` where no path can be appended to it."""
    parts = split_url(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be an http:// or https:// URL with a host")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError("must not carry a user, a password, a query or a fragment")
    return url.rstrip("/")


def check_address(address: str) -> None:
    """Raise `ValueError`, without quoting it, where `address` is neither a URL nor a path; it may have a query."""
    if address.startswith("/") and not address.startswith("//"):
        # Appended to a host, which a user before an @ or a port would change; a space would end the request line.
        address = f"http://host{address}"
    parts = split_url(address)
    if parts.scheme not in ("http", "https") or not parts.hostname or not re.fullmatch(r"[\x21-\x7e]+", address):
        raise ValueError("must be an http:// or https:// URL of ASCII characters, or a path that begins with a slash")
    if parts.username or parts.password or parts.fragment:
        raise ValueError("must not carry a user, a password or a fragment")


def split_url(url: str) -> SplitResult:
    """Return the parts of `url`; raise a `ValueError` that quotes nothing of it."""
    # urlsplit's own messages may quote user and password.
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise ValueError("is not a URL: look at its host and port") from None
    return parts
