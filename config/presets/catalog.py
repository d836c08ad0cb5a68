"""Presets: prompt templates of styles and industries, and their defaults for fields that a job leaves out.

A file is accepted or refused as a whole: a preset that was silently left out would be noticed only in the images.
"""

from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from config.presets.plain_yaml import MAX_BYTES, YamlRefused, parse_yaml

PLACEHOLDER = "{prompt}"
BUILTIN_FILE = Path(__file__).with_name("presets.yaml")
# The limits of a job's own fields; a test holds them equal to the schema's.
MAX_STEPS = 150
MAX_GUIDANCE = 50
MAX_ADAPTER_SCALE = 4
MAX_LOCATION_CHARS = 2048
# A quarter of what a prompt may have: two templates leave the user half.
MAX_TEMPLATE_CHARS = 1000
MAX_SENTENCE_CHARS = 400


class PresetsInvalid(ValueError):
    """A file of presets cannot be used; one sentence with the file, the preset and the key."""


def _holds_the_prompt_once(template: str) -> str:
    if template.count(PLACEHOLDER) != 1:
        raise ValueError(f"must hold {PLACEHOLDER} exactly once, where the job's own prompt goes")
    return template


class _Entry(BaseModel):
    # Not strict: every value of plain YAML is text, 30 as well.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, str_strip_whitespace=True)


class PresetAdapter(_Entry):
    """The adapter of a preset; `path` is named as in a job."""

    path: Annotated[str, Field(min_length=1, max_length=MAX_LOCATION_CHARS)]
    scale: Annotated[float, Field(ge=-MAX_ADAPTER_SCALE, le=MAX_ADAPTER_SCALE)] = 1.0


class Preset(_Entry):
    """A style or an industry; None is no default."""

    positive: Annotated[str, Field(max_length=MAX_TEMPLATE_CHARS), AfterValidator(_holds_the_prompt_once)]
    negative: Annotated[str, Field(max_length=MAX_TEMPLATE_CHARS)] = ""
    guidance_scale: Annotated[float, Field(ge=0, le=MAX_GUIDANCE)] | None = None
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = None
    adapter: PresetAdapter | None = None


# Not stripped: "a" and "a " must not become one.
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]{1,40}\z", strip_whitespace=False)]


class Presets(_Entry):
    """All presets of a worker by name. Immutable: a new file is a new object."""

    styles: dict[Name, Preset] = {}
    industries: dict[Name, Preset] = {}

    @property
    def by_field(self) -> dict[str, dict[str, Preset]]:
        """The presets by the field of a job that names them."""
        return {"style": self.styles, "industry": self.industries}

    @property
    def adapters(self) -> dict[str, PresetAdapter]:
        """The adapters by the preset that has them."""
        return {
            f"{field} {name}": preset.adapter
            for field, known in self.by_field.items()
            for name, preset in known.items()
            if preset.adapter is not None
        }


def load_presets(path: Path) -> Presets:
    """Return the presets in the file at `path`; raise `PresetsInvalid`."""
    try:
        # Reading a device or a pipe may never end.
        if not path.is_file():
            raise PresetsInvalid(f"{path} is no file")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        return Presets.model_validate(parse_yaml(content))
    except OSError as error:
        raise PresetsInvalid(f"{path} cannot be read: {error.strerror or type(error).__name__}") from error
    except YamlRefused as error:
        raise PresetsInvalid(f"{path} {error}"[:MAX_SENTENCE_CHARS]) from error
    except ValidationError as error:
        raise PresetsInvalid(f"{path}: {_describe(error)}"[:MAX_SENTENCE_CHARS]) from error


@cache
def builtin_presets() -> Presets:
    """Return the presets that ship with the worker."""
    return load_presets(BUILTIN_FILE)


def _describe(error: ValidationError) -> str:
    """Return one clause for each problem with its key, without values."""
    sentences = []
    for problem in error.errors(include_url=False, include_input=False, include_context=False)[:5]:
        *holder, key = [str(part) for part in problem["loc"]] or ["the file"]
        match problem["type"]:
            case "extra_forbidden":
                sentences.append(f"{'.'.join(holder) or 'the file'} has an unknown key {key!r:.60}")
            case "string_pattern_mismatch":
                sentences.append(f"{'.'.join(holder)!r:.100} is no name: use a to z, 0 to 9 and _, at most 40")
            case "model_type" | "dict_type":
                sentences.append(f"{'.'.join([*holder, key])} must be a mapping of keys to values")
            case _:
                rule = problem["msg"].removeprefix("Value error, ")
                sentences.append(f"{'.'.join([*holder, key])}: {rule}")
    return "; ".join(sentences)
