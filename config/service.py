"""Settings of the process: HTTP port, logs, shutdown, fonts."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator
from pydantic_settings import NoDecode

from config.logs import LogFormat
from config.section import Section, split_commas


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
        description="Show prompts, finished images with their addresses, and errors that may quote a prompt, on the "
        "status page, which has no password",
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
