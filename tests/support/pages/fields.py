"""`python -m tests.support.pages.fields`: write docs/fields.md, the table of all fields, from docs/schemas."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from tests.support.pages.field_examples import DEFAULTS, EXAMPLES, KINDS
from tests.support.paths import ROOT
from watermark.geometry import Position
from worker.messages.generation_id import TEXT
from worker.messages.json_schemas import NOT_GIVEN, UUID_PATTERN
from worker.messages.schema import ASPECT, COLOUR_OR_AUTO, NO_NUL, NO_NUL_NOT_BLANK, SEED_TEXT

PAGE = ROOT / "docs" / "fields.md"
SCHEMAS = ROOT / "docs" / "schemas"
# Patterns in words; any other is shown as it is.
WORDS = {
    NO_NUL["pattern"]: "no U+0000",
    NO_NUL_NOT_BLANK["pattern"]: "not only blanks, no U+0000",
    f"^{TEXT}$": "1 to 128 letters, digits, `.`, `_` and `-`",
    f"^({ASPECT})?$": "`W:H`",
    f"^$|^{SEED_TEXT}$": "as text: digits",
    f"^$|{COLOUR_OR_AUTO}": "`auto` or `#rrggbb`",
    f"^$|^(auto|{'|'.join(Position)})$": "`auto` or a place as in `signature_config.position`",
    UUID_PATTERN: "a UUID",
}
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
INTRO = """# All fields

<!-- Written by `python -m tests.support.pages.fields` from docs/schemas. -->

Of every message in and out, from the [JSON Schemas](schemas). What a field does is told in
[messages](messages.md), [kinds](kinds.md), [products](product.md) and [presets](presets.md).

- A dot leads into an object, `[]` into each item of a list.
- `null` and `""` count as "not given" in a job, at every depth.
- **required**: wherever the object is that holds it.
- Limits are inclusive unless they say otherwise.
- An example is the field's value as JSON.
"""
TITLES = {
    "job": "Job: what a backend publishes",
    "cancel": "Cancel order",
    "progress": "Progress webhook",
    "complete": "Complete webhook",
    "failed": "Failed webhook",
}


class Field(NamedTuple):
    """A field by its path, with its schema."""

    path: str
    schema: dict[str, Any]
    is_required: bool


def fields_of(name: str) -> list[Field]:
    """Return the fields of a message, each but those that only hold others, in the schema's order."""
    return list(_walk(json.loads((SCHEMAS / f"{name}.json").read_text(encoding="utf-8")), ""))


def _walk(schema: dict[str, Any], prefix: str) -> Iterator[Field]:
    required = set(schema.get("required", ()))
    for name, inner in sorted(schema["properties"].items(), key=lambda item: item[0] not in required):
        path = f"{prefix}{name}"
        held = next((one for one in _choices(inner) if "properties" in one), None)
        listed = next((one["items"] for one in _choices(inner) if "properties" in one.get("items", {})), None)
        if held:
            yield from _walk(held, f"{path}.")
        elif listed:
            yield from _walk(listed, f"{path}[].")
        else:
            yield Field(path, inner, name in required)


def _choices(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the schemas of which one is to fit, without those of "not given"."""
    if "anyOf" not in schema:
        return [] if schema in (NOT_GIVEN, {"type": "null"}) else [schema]
    return [choice for one in schema["anyOf"] for choice in _choices(one)]


def type_of(schema: dict[str, Any]) -> str:
    """Return the JSON types of a field in words."""
    names = []
    for choice in _choices(schema):
        given = choice.get("type", "any")
        types = [given] if isinstance(given, str) else [one for one in given if one != "null"]
        # A schema lets "" pass where no text is meant.
        names += [one for one in types if not (one == "string" and choice.get("maxLength") == 0)]
    return " or ".join(dict.fromkeys(names))


def limits_of(schema: dict[str, Any]) -> str:
    """Return what a value has to keep to, in words."""
    return "; or ".join(filter(None, (_limits(choice) for choice in _choices(schema))))


def _limits(schema: dict[str, Any]) -> str:
    words = []
    if "enum" in schema:
        words.append(", ".join(f"`{value}`" for value in schema["enum"] if value))
    if "const" in schema:
        words.append(f"`{schema['const']}`")
    if "minimum" in schema and "maximum" in schema:
        words.append(f"{schema['minimum']} to {schema['maximum']}")
    else:
        words += [f"{sign} {schema[key]}" for key, sign in BOUNDS.items() if key in schema]
    if schema.get("maxLength"):
        words.append(f"{schema.get('minLength', 'up')} to {schema['maxLength']} characters")
    if "maxItems" in schema:
        words.append(f"up to {schema['maxItems']} items")
    if "pattern" in schema:
        words.append(WORDS.get(schema["pattern"]) or f"`{schema['pattern']}`")
    items = schema.get("items")
    return ", ".join(words) + (f"; each {_limits(items)}" if items and _limits(items) else "")


def default_of(name: str, field: Field) -> str:
    """Return what holds where a message's field is not given."""
    if field.is_required:
        return "**required**"
    known = DEFAULTS.get(field.path) if name == "job" else None
    return known or (f"`{json.dumps(field.schema['default'])}`" if "default" in field.schema else "")


def row(cells: list[str]) -> str:
    """Write a row of a table."""
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def table(name: str) -> str:
    """Write the table of one message."""
    columns = ["field", "is", "type", "limits", "default", *(["kinds"] if name == "job" else []), "example"]
    lines = [row(columns), "|---" * len(columns) + "|"]
    for field in fields_of(name):
        cells = [f"`{field.path}`", field.schema.get("description", ""), type_of(field.schema)]
        cells += [limits_of(field.schema), default_of(name, field)]
        if name == "job":
            cells.append(KINDS.get(field.path.removeprefix("data.").split(".")[0], "all"))
        example = EXAMPLES.get((name, field.path), EXAMPLES.get(("", field.path)))
        lines.append(row([*cells, f"`{json.dumps(example, ensure_ascii=False)}`"]))
    return "\n".join(lines)


def render() -> str:
    """Write the page."""
    return INTRO + "".join(f"\n## {title}\n\n{table(name)}\n" for name, title in TITLES.items())


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
