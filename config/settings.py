"""All sections of the settings together, each frozen and for one consumer, read from the environment and `.env`."""

from typing import Any

from pydantic import BaseModel, ConfigDict

from config.backend import BackendSettings
from config.broker import BrokerSettings
from config.images import ImageSettings
from config.model import ModelSettings
from config.near_names import near_names
from config.section import Section, SettingsError, load_section, nonempty_variables
from config.service import ServiceSettings
from config.store import StoreSettings


class Settings(BaseModel):
    """All sections. Secrets are `SecretStr`, so that a printed section never shows them."""

    model_config = ConfigDict(frozen=True)

    broker: BrokerSettings
    store: StoreSettings
    backend: BackendSettings
    model: ModelSettings
    images: ImageSettings
    service: ServiceSettings


SECTIONS: dict[str, type[Section]] = {
    "broker": BrokerSettings,
    "store": StoreSettings,
    "backend": BackendSettings,
    "model": ModelSettings,
    "images": ImageSettings,
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
        # A problem of `.env` itself comes up once for each section.
        raise SettingsError("\n".join(dict.fromkeys(problems)))
    return Settings(**sections)


def misspelled_names() -> list[str]:
    """Return a sentence for each variable that is set and no setting, but close to the name of one that is unset."""
    known = [str(field.validation_alias) for section in SECTIONS.values() for field in section.model_fields.values()]
    near = near_names(nonempty_variables(), known)
    return [f"{name} is set and is no setting of Darkroom: is {meant} meant?" for name, meant in near.items()]
