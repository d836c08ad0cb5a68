"""docs/fields.md lists every field as the schemas have it, and its examples and kinds are what the decoder takes."""

from typing import Any

import pytest

from config.model import ModelSettings
from config.store import StoreSettings
from tests.support.contract_schemas import validator_of
from tests.support.pages.field_examples import EXAMPLES, KINDS
from tests.support.pages.fields import PAGE, TITLES, Field, fields_of, render
from tests.worker.messages.test_decoder import to_bytes
from worker.messages.decoder import decode, rules_from
from worker.messages.job import JobRejected, Kind

JOB_FIELDS = [field for field in fields_of("job") if field.path.startswith("data.")]
# What a job of each kind cannot be without.
LEAST: dict[Kind, dict[str, Any]] = {
    Kind.TEXT2IMAGE: {},
    Kind.IMAGE2IMAGE: {"init_image_path": "uploads/a.png"},
    Kind.INPAINT: {"init_image_path": "uploads/a.png", "mask_path": "uploads/b.png"},
    Kind.PRODUCT: {"product": {"cutout_path": "uploads/a.png"}},
    Kind.EDIT: {"references": [{"image_path": "uploads/a.png"}]},
}
# What a field cannot be without.
BESIDE: dict[str, dict[str, Any]] = {
    "width": {"height": 512},
    "height": {"width": 512},
    "parameters.width": {"parameters": {"height": 512}},
    "parameters.height": {"parameters": {"width": 512}},
    "loras": {"loras": [{"path": "models/a.safetensors"}]},
    "references": {"references": [{"image_path": "uploads/a.png"}]},
    "control": {"control": {"image_path": "uploads/a.png", "model": "canny"}},
    "text_overlay": {"text_overlay": {"text": "a"}},
}


def test_the_committed_page_is_the_one_the_schemas_make() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "run python -m tests.support.pages.fields"


def test_every_field_has_one_example_and_no_example_is_of_another() -> None:
    paths = {(name, field.path) for name in TITLES for field in fields_of(name)}

    assert {path for path in paths if path not in EXAMPLES and ("", path[1]) not in EXAMPLES} == set()
    assert {path for path in EXAMPLES if path not in paths and path[0]} == set()


def with_example(field: Field, kind: Kind) -> dict[str, Any]:
    """Return a job of this kind that has little but the field."""
    path = field.path.removeprefix("data.")
    names = path.split(".")
    fields: dict[str, Any] = {"generation_id": 456, "prompt": "a red fox", "kind": kind}
    for part in (LEAST[kind], BESIDE.get(path, BESIDE.get(names[0].removesuffix("[]"), {}))):
        fields |= {name: value.copy() if isinstance(value, dict | list) else value for name, value in part.items()}
    inner = fields
    for name in names[:-1]:
        inner = inner[name[:-2]][0] if name.endswith("[]") else inner.setdefault(name, {})
    inner[names[-1]] = EXAMPLES["job", field.path]
    return {"task_id": EXAMPLES["", "task_id"], "data": fields}


@pytest.mark.parametrize("field", JOB_FIELDS, ids=lambda field: field.path)
def test_an_example_is_taken_for_the_kinds_of_its_field_alone(field: Field) -> None:
    rules = rules_from(ModelSettings(), StoreSettings(AWS_STORAGE_BUCKET_NAME="media"))  # type: ignore[call-arg]
    name = field.path.split(".")[1].removesuffix("[]")
    expected = {kind for kind in Kind if name not in KINDS or f"`{kind}`" in KINDS[name]}

    taken = set()
    for kind in Kind if name != "kind" else [Kind.IMAGE2IMAGE]:
        job = with_example(field, kind)
        validator_of("job").validate(job)
        try:
            decode(to_bytes(job), rules)
        except JobRejected:
            continue
        taken.add(kind)

    assert taken == (expected if name != "kind" else {Kind.IMAGE2IMAGE})
