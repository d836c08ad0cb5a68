"""The published schemas say what the decoders do, the worker's own webhooks fit them, and no example is wrong."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import settings as bounded
from hypothesis import strategies as st
from jsonschema import Draft7Validator

from config.model import ModelSettings
from config.store import StoreSettings
from tests.support.contract_schemas import DOCS, document, examples, validator_of
from tests.support.long import IS_LONG
from tests.support.paths import ROOT
from tests.worker.messages.test_decoder import (
    DEAD,
    DOCUMENTED,
    FLAT,
    HOSTILE,
    JSON_VALUES,
    LIMITS,
    TASK_ID,
    message,
    to_bytes,
)
from worker.errors import ErrorCode
from worker.messages.cancel import decode_cancel
from worker.messages.decoder import decode, rules_from
from worker.messages.envelope import MAX_BODY_BYTES
from worker.messages.job import JobRejected, Undecodable
from worker.messages.json_schemas import MODELS, as_text, schema_of, write
from worker.messages.rules import JobRules
from worker.messages.schema import WireData
from worker.results.terminal_event import TerminalEvent, failed_event

# What the decoder refuses and no schema can: the rules that look into a location.
LOCATIONS = {"H21 local paths", "H22 other buckets", "H23 keys", "H24 ARNs", "H27 pickles by name"}
EXAMPLES = 300 if IS_LONG else 75
HALF_PAIR = re.compile("[\ud800-\udfff]")
# 5.0 for 5, fields compared with one another, a ratio's quotient, a key's bytes; and "1:1\n", which only Python's `$`
# takes for 1:1.
UNSAID: list[dict[str, Any]] = [
    {"generation_id": 5.0},
    {"generation_id": "5\n"},
    {"num_inference_steps": 50.0},
    {"width": 512},
    *({"aspect_ratio": aspect} for aspect in ("9999:1", "1:9999", "4001:1000", "1:5", "1:1\n")),
    *({field: "a" * 1025} for field in ("lora_path", "signature_path")),
]


@pytest.fixture(scope="module")
def rules() -> JobRules:
    """Build the rules of a worker whose only bucket is `media`."""
    return rules_from(ModelSettings(), StoreSettings(AWS_STORAGE_BUCKET_NAME="media"))  # type: ignore[call-arg]


# --- The files


@pytest.mark.parametrize("name", MODELS)
def test_the_committed_schema_is_the_one_the_models_make(name: str) -> None:
    committed = (DOCS / "schemas" / f"{name}.json").read_text(encoding="utf-8")

    assert committed == as_text(schema_of(name)), "run python -m worker.messages.json_schemas"


def test_schemas_folder_has_no_other_files(tmp_path: Path) -> None:
    write(tmp_path)

    assert {path.name for path in (DOCS / "schemas").iterdir()} == {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("name", MODELS)
def test_schema_is_of_draft_7_and_self_contained(name: str) -> None:
    schema = schema_of(name)

    Draft7Validator.check_schema(schema)
    assert "$ref" not in as_text(schema)
    assert "Wire" not in as_text(schema)


# --- Examples


def json_blocks(markdown: str) -> list[Any]:
    return [json.loads(block) for block in re.findall(r"```json\n(.*?)```", markdown, re.DOTALL)]


PAGES = (ROOT / "README.md", DOCS / "messages.md", DOCS / "kinds.md", DOCS / "product.md")
SHOWN_JOBS = [block for page in PAGES for block in json_blocks(page.read_text()) if "data" in block]
JOBS = [payload for name, _, payload in examples() if name == "job"] + SHOWN_JOBS + [FLAT, DOCUMENTED, message()]


def test_the_pages_and_the_document_show_both_dialects() -> None:
    assert len(SHOWN_JOBS) >= len(PAGES)
    assert {"parameters" in job["data"] for job in JOBS} == {True, False}
    assert {name for name, _, _ in examples()} == set(MODELS)


@pytest.mark.parametrize("job", JOBS, ids=lambda job: f"{len(job['data'])} fields")
def test_an_example_of_a_job_fits_the_schema_and_is_taken(rules: JobRules, job: dict[str, Any]) -> None:
    validator_of("job").validate(job)

    assert decode(to_bytes(job), rules).generation_id == job["data"]["generation_id"]


@pytest.mark.parametrize(("name", "payload"), [(name, payload) for name, _, payload in examples() if name != "job"])
def test_every_other_example_fits_its_schema(name: str, payload: dict[str, Any]) -> None:
    validator_of(name).validate(payload)

    if name == "cancel":
        assert decode_cancel(to_bytes(payload)) is not None


# --- Jobs: what the schema takes is taken


def is_beyond_a_schema(fields: dict[str, Any]) -> bool:
    if HALF_PAIR.search(json.dumps(fields, ensure_ascii=False)):
        return True
    # By their looks: 5 and 5.0 are equal.
    return any(all(repr(fields.get(name)) == repr(value) for name, value in unsaid.items()) for unsaid in UNSAID)


def parsed(body: Any) -> Any:
    """Parse a body as a schema sees it; None where it is no plain JSON, names a key twice, or is too large."""
    content = to_bytes(body)
    if len(content) > MAX_BODY_BYTES:
        return None
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=once, parse_constant=refuse)
    except (ValueError, RecursionError):
        return None


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return dict(pairs) if len(dict(pairs)) == len(pairs) else refuse("a repeated key")


def refuse(text: str) -> Any:
    raise ValueError(text)


REFUSED = [
    pytest.param(seen, id=f"{name}-{number}")
    for name, variants in HOSTILE.items()
    for number, (body, _) in enumerate(variants)
    if name not in LOCATIONS and (seen := parsed(body)) is not None
]


@pytest.mark.parametrize("seen", REFUSED)
def test_schema_refuses_what_the_decoder_refuses_where_it_can(seen: Any) -> None:
    fields = seen.get("data") if isinstance(seen, dict) else None

    assert validator_of("job").is_valid(seen) == (isinstance(fields, dict) and is_beyond_a_schema(fields))


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, good, _ in LIMITS for value in good])
def test_a_value_at_its_limit_fits_the_schema(field: str, value: object) -> None:
    validator_of("job").validate(message(**{field: value}))


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, _, bad in LIMITS for value in bad])
def test_a_value_beyond_its_limit_does_not(field: str, value: object) -> None:
    is_valid = validator_of("job").is_valid(message(**{field: value}))

    assert is_valid == is_beyond_a_schema({field: value})


def test_decoder_refuses_what_no_schema_can_express(rules: JobRules) -> None:
    for fields in UNSAID:
        with pytest.raises((JobRejected, Undecodable)):
            decode(to_bytes(message(**fields)), rules)


@pytest.mark.parametrize("field", sorted(set(WireData.model_fields) - {"prompt"}))
def test_a_null_field_fits_the_schema(field: str) -> None:
    validator_of("job").validate(message(**{field: None}))


@pytest.mark.parametrize("field", sorted(set(WireData.model_fields) - {"prompt"}))
def test_an_empty_text_fits_the_schema(field: str) -> None:
    validator_of("job").validate(message(**{field: ""}))


GOOD_FIELDS = st.fixed_dictionaries(
    {},
    optional={
        name: st.sampled_from([value for field, good, _ in LIMITS if field == name for value in good])
        for name in {field for field, _, _ in LIMITS}
    }
    | {"unknown": JSON_VALUES},
)
WRAPPINGS = st.fixed_dictionaries(
    {}, optional={"task_id": JSON_VALUES, "created_at": JSON_VALUES, "webhook_url": JSON_VALUES}
)


@bounded(max_examples=EXAMPLES, deadline=1000)
@given(fields=GOOD_FIELDS, wrapping=WRAPPINGS)
def test_every_message_that_the_decoder_takes_fits_the_schema(
    rules: JobRules, fields: dict[str, Any], wrapping: dict[str, Any]
) -> None:
    body = to_bytes(message(**fields) | wrapping)
    try:
        decode(body, rules)
    except JobRejected:
        assume(False)  # five adapters, or a width alone

    validator_of("job").validate(json.loads(body))


# --- Cancel orders

ORDERS = st.fixed_dictionaries(
    {},
    optional={
        "task_id": st.just(TASK_ID) | JSON_VALUES,
        "generation_id": st.integers(-1, 2**63) | JSON_VALUES,
        "x": JSON_VALUES,
    },
)


def is_understood(body: bytes) -> bool:
    try:
        decode_cancel(body)
    except Undecodable:
        return False
    return True


@bounded(max_examples=EXAMPLES, deadline=1000)
@given(order=ORDERS)
def test_cancel_order_that_fits_the_schema_is_decoded(order: dict[str, Any]) -> None:
    assume(not isinstance(order.get("generation_id"), float))  # 5.0 for 5
    body = to_bytes(order)

    assert is_understood(body) or not validator_of("cancel").is_valid(json.loads(body))


@pytest.mark.parametrize(
    ("order", "is_good"),
    [
        ({"task_id": TASK_ID}, True),
        ({"task_id": TASK_ID.upper(), "generation_id": 5}, True),
        ({"task_id": None, "generation_id": 2**63 - 1}, True),
        ({"generation_id": 1, "reason": "the user left"}, True),
        ({}, False),
        ({"task_id": None, "generation_id": None}, False),
        ({"task_id": "job-5"}, False),
        ({"task_id": "job-5", "generation_id": 5}, False),
        ({"generation_id": 0}, False),
        ({"generation_id": 2**63}, False),
        ({"generation_id": "5"}, True),
        ({"generation_id": "a.B-c_9"}, True),
        ({"task_id": "", "generation_id": "5"}, True),
        ({"generation_id": ""}, False),
        ({"generation_id": "a/b"}, False),
        ({"generation_id": "a" * 129}, False),
        ({"generation_id": True}, False),
        ([], False),
    ],
)
def test_schema_and_decoder_agree_on_cancel_orders(order: Any, is_good: bool) -> None:
    assert validator_of("cancel").is_valid(order) == is_good
    assert is_understood(to_bytes(order)) == is_good


# --- Webhooks


@pytest.mark.parametrize("name", ["progress", "complete", "failed"])
def test_a_body_with_a_field_missing_or_of_another_kind_does_not_fit(name: str) -> None:
    body = next(payload for message, _, payload in examples() if message == name)

    for field in body:
        assert not validator_of(name).is_valid({key: body[key] for key in body if key != field})
        assert not validator_of(name).is_valid(body | {field: None})
    validator_of(name).validate(body | {"later": "a backend ignores what it does not know"})


def test_a_failed_event_s_body_fits_before_and_after_its_record() -> None:
    event = failed_event(task_id=TASK_ID, generation_id=456, code=ErrorCode.GPU_OOM, message="too large", retry_count=0)

    for restored in (event, TerminalEvent.from_json(event.to_json())):
        validator_of("failed").validate(json.loads(restored.webhook.payload))


# --- Error codes

CODE = re.compile(r"[A-Z]+(_[A-Z]+)+|CANCELLED")
# Who makes a failure out of a code, and what codes are looked up in.
MAKERS = {"JobFailed", "JobRejected", "RequestFailed", "reject"}
HOLDERS = {"code", "CODE", "_FIELD_CODES"}


def codes_in(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ErrorCode":
            yield node.attr
        if isinstance(node, ast.Call):
            is_meant = getattr(node.func, "id", getattr(node.func, "attr", "")) in MAKERS
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            is_meant = any(getattr(target, "id", "") in HOLDERS for target in targets)
        else:
            is_meant = False
        for inner in ast.walk(node) if is_meant else ():
            if isinstance(inner, ast.Constant) and isinstance(inner.value, str) and CODE.fullmatch(inner.value):
                yield inner.value


def test_the_list_of_error_codes_is_that_of_the_source() -> None:
    sources = [path for package in ("worker", "inference") for path in (ROOT / package).rglob("*.py")]

    found = {code for path in sources for code in codes_in(path.read_text())}

    assert found == set(ErrorCode)


@pytest.mark.parametrize("code", ErrorCode)
def test_every_error_code_is_explained_on_the_page_and_in_the_document(code: str) -> None:
    assert f"`{code}`" in (DOCS / "messages.md").read_text()
    assert f"`{code}`" in document()["components"]["messages"]["failed"]["description"]


def test_every_answer_of_the_hostile_messages_is_in_the_list() -> None:
    answers = {answer for variants in HOSTILE.values() for _, answer in variants} - {DEAD}

    assert answers <= set(ErrorCode)
