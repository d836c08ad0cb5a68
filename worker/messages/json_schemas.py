"""Write the JSON Schemas of every message in and out from the models: `python -m worker.messages.json_schemas`.

They are draft 7 and without references of their own, which is what AsyncAPI reads. Whatever a schema accepts is
accepted, but for what no schema can say: sizes in bytes, repeated keys, half surrogate pairs, 5.0 where 5 is asked
for, a seed in text beyond 2^63-1, and the rules that compare fields or look into a location.
`tests/worker/messages/test_contract.py` holds that.
"""

import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core.core_schema import NullableSchema

from worker.messages.envelope import MESSAGE_TYPE
from worker.messages.generation_id import MAX_NUMBER, TEXT
from worker.messages.schema import WireData
from worker.messages.webhook_bodies import CompleteBody, FailedBody, ProgressBody

FOLDER = Path(__file__).parents[2] / "docs" / "schemas"
DIALECT = "http://json-schema.org/draft-07/schema#"
UUID_PATTERN = r"^([0-9A-Fa-f]{8}-([0-9A-Fa-f]{4}-){3}[0-9A-Fa-f]{12})?$"
NOT_GIVEN = {"enum": [None, ""]}

_GenerationId = Annotated[
    Annotated[int, Field(ge=1, le=MAX_NUMBER)] | Annotated[str, Field(pattern=f"^{TEXT}$")],
    Field(description="The backend's own id of the generation, told back as it came"),
]
_Type = Annotated[str, Field(json_schema_extra={"const": MESSAGE_TYPE})]
_UuidOrNothing = Annotated[str, Field(json_schema_extra={"pattern": UUID_PATTERN})]


class JobData(WireData):
    """What to draw. null and "" mean "not given", at every depth. Unknown fields are ignored, and told back by name."""

    generation_id: _GenerationId


class JobMessage(BaseModel):
    """A job, in UTF-8 and at most 256 kB. URLs in it are never called; unknown fields are ignored."""

    task_id: Any = Field(
        None,
        description="A UUID; one task has one end, however often it is published. Anything else is replaced by a UUID "
        "made of the message's bytes, and one that another generation has used by a UUID made of both",
    )
    type: _Type = MESSAGE_TYPE
    data: JobData
    created_at: Any = Field(
        None,
        description="ISO 8601, without a zone in UTC; what is no such time counts as not given. A cancel order by "
        "generation covers only jobs that are not newer",
    )


class CancelMessage(BaseModel):
    """An order to cancel: by task_id, else by generation_id. At most 4 kB."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"required": ["task_id"], "properties": {"task_id": {"type": "string", "minLength": 1}}},
                {"required": ["generation_id"], "properties": {"generation_id": {"type": ["integer", "string"]}}},
            ]
        },
    )

    task_id: _UuidOrNothing | None = Field(None, description="The job's UUID; it wins where both are given")
    generation_id: _GenerationId | None = None


MODELS: dict[str, Any] = {
    "job": JobMessage,
    "cancel": CancelMessage,
    "progress": ProgressBody,
    "complete": CompleteBody,
    "failed": FailedBody,
}


def schema_of(name: str) -> dict[str, Any]:
    """Return the schema of one message, by its name in `MODELS`."""
    made = TypeAdapter(MODELS[name]).json_schema(schema_generator=_Generator)
    inlined: dict[str, Any] = _inlined(made, made.pop("$defs", {}))
    if name == "job":
        inlined["properties"]["data"] = _allow_null(inlined["properties"]["data"])
    return {"$schema": DIALECT, "title": name.capitalize()} | inlined


def as_text(schema: dict[str, Any]) -> str:
    """Return the schema as indented JSON."""
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def write(folder: Path) -> None:
    """Write `{name}.json` for every message."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in MODELS:
        (folder / f"{name}.json").write_text(as_text(schema_of(name)), encoding="utf-8")


class _Generator(GenerateJsonSchema):
    """Pydantic's generator, but shorter: no field titles, and `"type": ["integer", "null"]` for a nullable type."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def nullable_schema(self, schema: NullableSchema) -> JsonSchemaValue:
        inner = self.generate_inner(schema["schema"])
        kind = inner.get("type")
        return inner | {"type": [kind, "null"]} if isinstance(kind, str) else super().nullable_schema(schema)


def _inlined(node: Any, definitions: dict[str, Any]) -> Any:
    """Return `node` with every reference replaced by its definition, and without the names of our classes."""
    if isinstance(node, list):
        return [_inlined(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        node = definitions[node["$ref"].rpartition("/")[2]] | {key: node[key] for key in node if key != "$ref"}
    return {
        key: _inlined(value, definitions)
        for key, value in node.items()
        if not (key == "title" and isinstance(value, str)) and not (key == "default" and value is None)
    }


def _allow_null(node: Any) -> Any:
    """Return `node` with null and "" allowed for every optional field, at every depth, and null in every list."""
    if isinstance(node, list):
        return [_allow_null(item) for item in node]
    if not isinstance(node, dict):
        return node
    node = {key: _allow_null(value) for key, value in node.items()}
    for name in set(node.get("properties", ())) - set(node.get("required", ())):
        node["properties"][name] = _nullable(node["properties"][name])
    if isinstance(node.get("items"), dict):
        node["items"] |= {"type": [node["items"]["type"], "null"]}
    return node


def _nullable(node: dict[str, Any]) -> dict[str, Any]:
    """Extend `node` by null and ""."""
    if "anyOf" in node:
        others = [choice for choice in node["anyOf"] if choice != {"type": "null"}]
        return node | {"anyOf": [*others, NOT_GIVEN]}
    if "enum" in node:
        return node | {"enum": [*node["enum"], None, ""], "type": ["string", "null"]}
    types = [node["type"]] if isinstance(node["type"], str) else [kind for kind in node["type"] if kind != "null"]
    if "string" not in types:
        # The bounds of numbers and lists do not touch a text.
        return node | {"type": [*types, "string", "null"], "maxLength": 0}
    pattern = {"pattern": f"^$|{node['pattern']}"} if "pattern" in node and not re.search(node["pattern"], "") else {}
    return node | {"type": [*types, "null"]} | pattern


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
