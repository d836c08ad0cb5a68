"""From bytes to a job: two dialects, every limit, and everything hostile that a queue can hold."""

import json
import re
import time
import uuid
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as bounded
from hypothesis import strategies as st

from clients.storage.location import ObjectRef
from config.model import ModelSettings
from config.store import StoreSettings
from tests.support.long import IS_LONG
from watermark.geometry import Position
from watermark.signature import SignatureStyle, Size
from worker.messages.decoder import decode, rules_from
from worker.messages.envelope import MAX_BODY_BYTES
from worker.messages.generation_id import is_generation_id
from worker.messages.job import Job, JobAdapter, JobRejected, Undecodable, resolve_size
from worker.messages.rules import MAX_REASON_CHARS, JobRules
from worker.messages.schema import MAX_INT64, MAX_PROMPT_CHARS, MAX_SEED, WireData, WireParameters

TASK_ID = "660f9511-f3ac-52e5-b827-557766551111"
# sha256(task_id)[:4]. To change it is to change the pictures of repeated runs.
SEED = 1_814_994_826
LORA = "s3://media/models/style-123/lora_weights.safetensors"
LORA_REF = ObjectRef("media", "models/style-123/lora_weights.safetensors")
MAX_ANSWER_SECONDS = 10.0
EXAMPLES = 200 if IS_LONG else 75
MAX_UINT32 = 2**32 - 1

DEAD = "dead"  # no id to be trusted: nobody is told


@pytest.fixture(scope="session")
def rules() -> JobRules:
    """Build the rules of a worker whose only bucket is `media`."""
    return rules_from(ModelSettings(), StoreSettings(AWS_STORAGE_BUCKET_NAME="media"))  # type: ignore[call-arg]


def message(**fields: Any) -> dict[str, Any]:
    """Build a message with these `data` fields beside the required two."""
    return {
        "task_id": TASK_ID,
        "type": "image_generation",
        "data": {"generation_id": 456, "prompt": "a sunset", **fields},
    }


def to_bytes(body: bytes | Mapping[str, Any]) -> bytes:
    return body if isinstance(body, bytes) else json.dumps(body).encode()


def raw(field: str, literal: str) -> bytes:
    """Build a message in which `field` of `data` has a value only raw JSON can write."""
    return f'{{"task_id": "{TASK_ID}", "data": {{"generation_id": 456, "prompt": "a", "{field}": {literal}}}}}'.encode()


def job_of(rules: JobRules, body: bytes | Mapping[str, Any]) -> Job:
    return decode(to_bytes(body), rules)


def rejection_of(rules: JobRules, body: bytes | Mapping[str, Any]) -> JobRejected:
    with pytest.raises(JobRejected) as caught:
        decode(to_bytes(body), rules)
    return caught.value


# --- Two dialects


FLAT = message(
    prompt="a sunset over mountains",
    negative_prompt="blurry",
    style_id=123,
    lora_path=LORA,
    lora_scale=0.8,
    width=512,
    height=768,
    seed=42,
    num_images=2,
    num_inference_steps=30,
    guidance_scale=5.5,
    scheduler="dpm++",
    signature_path="s3://media/signatures/a.png",
    artist_name="서울 아틀리에",
    signature_config={"position": "top-left", "size": "small", "opacity": 0.5},
    prompt_tags=["sunset"],
)
IN_BOTH = ("prompt", "negative_prompt", "signature_path", "artist_name", "signature_config", "prompt_tags")
DOCUMENTED = message(
    **{name: FLAT["data"][name] for name in (*IN_BOTH, "lora_path", "lora_scale", "num_images")},
    parameters={"width": 512, "height": 768, "steps": 30, "cfg_scale": 5.5, "seed": 42, "scheduler": "dpm++"},
)
EXPECTED = Job(
    task_id=TASK_ID,
    generation_id=456,
    prompt="a sunset over mountains",
    negative_prompt="blurry",
    adapters=(JobAdapter(LORA_REF, 0.8),),
    size=(512, 768),
    aspect=None,
    seed=42,
    num_images=2,
    num_inference_steps=30,
    guidance_scale=5.5,
    cfg_normalization=0.0,
    cfg_truncation=1.0,
    true_cfg_scale=None,
    scheduler="dpm++",
    signature_ref=ObjectRef("media", "signatures/a.png"),
    artist_name="서울 아틀리에",
    signature_style=SignatureStyle(Position.TOP_LEFT, Size.SMALL, 0.5),
    prompt_tags=("sunset",),
    created_at=None,
)


@pytest.mark.parametrize("dialect", [FLAT, DOCUMENTED], ids=["flat", "parameters"])
def test_both_dialects_give_the_same_job(rules: JobRules, dialect: dict[str, Any]) -> None:
    assert job_of(rules, dialect) == EXPECTED


def test_parameters_win_over_the_flat_fields(rules: JobRules) -> None:
    flat = {"width": 64, "height": 64, "num_inference_steps": 1, "guidance_scale": 1.0, "seed": 1, "scheduler": "a"}
    parameters = {"width": 512, "height": 768, "steps": 30, "cfg_scale": 0, "seed": 0, "scheduler": "b"}

    job = job_of(rules, message(**flat, parameters=parameters))

    assert (job.size, job.num_inference_steps, job.guidance_scale) == ((512, 768), 30, 0.0)
    assert (job.seed, job.scheduler) == (0, "b")


def test_null_parameter_leaves_the_flat_field_in_force(rules: JobRules) -> None:
    flat = {"num_inference_steps": 7, "guidance_scale": 2.0, "seed": 9, "width": 128, "height": 64}
    parameters = dict.fromkeys(WireParameters.model_fields)

    job = job_of(rules, message(**flat, parameters=parameters))

    assert (job.num_inference_steps, job.guidance_scale, job.seed, job.size) == (7, 2.0, 9, (128, 64))


def test_a_width_and_a_height_may_come_from_different_dialects(rules: JobRules) -> None:
    assert job_of(rules, message(width=128, parameters={"height": 256})).size == (128, 256)


BARE = Job(
    task_id=TASK_ID,
    generation_id=456,
    prompt="a sunset",
    negative_prompt="",
    adapters=(),
    size=None,
    aspect=None,
    seed=SEED,
    num_images=1,
    num_inference_steps=None,
    guidance_scale=None,
    cfg_normalization=0.0,
    cfg_truncation=1.0,
    true_cfg_scale=None,
    scheduler=None,
    signature_ref=None,
    artist_name=None,
    signature_style=SignatureStyle(),
    prompt_tags=(),
    created_at=None,
)


def test_two_fields_are_enough(rules: JobRules) -> None:
    assert job_of(rules, message()) == BARE


@pytest.mark.parametrize("field", sorted(set(WireData.model_fields) - {"prompt"}))
def test_a_null_field_is_no_field(rules: JobRules, field: str) -> None:
    assert job_of(rules, message(**{field: None})) == job_of(rules, message())


@pytest.mark.parametrize("field", sorted(set(WireData.model_fields) - {"prompt"}))
def test_an_empty_string_is_no_field(rules: JobRules, field: str) -> None:
    assert job_of(rules, message(**{field: ""})) == job_of(rules, message())


def test_message_of_the_existing_backend_is_a_job(rules: JobRules) -> None:
    sent = message(seed=None, signature_path="", style_id=123, lora_path=LORA, lora_scale=1, aspect_ratio="1:1")
    sent |= {"webhook_url": "http://backend/api", "callback_url": None, "created_at": "2025-01-20T11:30:00.000Z"}

    job = job_of(rules, sent)

    assert job.adapters == (JobAdapter(LORA_REF, 1.0),)
    assert job.signature_ref is None
    assert job.created_at == datetime(2025, 1, 20, 11, 30, tzinfo=UTC)


def test_several_adapters_keep_their_order_and_scales(rules: JobRules) -> None:
    loras = [{"path": "models/a.safetensors", "scale": 0.3}, {"path": "gs://media/models/b/"}]

    job = job_of(rules, message(lora_path=LORA, loras=loras))

    assert [(str(adapter.ref), adapter.scale) for adapter in job.adapters] == [
        (LORA, 1.0),
        ("s3://media/models/a.safetensors", 0.3),
        ("s3://media/models/b/", 1.0),
    ]


def test_fields_of_one_family_are_passed_on(rules: JobRules) -> None:
    job = job_of(rules, message(parameters={"cfg_normalization": 0.7, "cfg_truncation": 0.5, "true_cfg_scale": 4}))

    assert (job.cfg_normalization, job.cfg_truncation, job.true_cfg_scale) == (0.7, 0.5, 4.0)


def test_fields_set_by_neither_job_nor_settings_default_to_the_family_s(rules: JobRules) -> None:
    job = job_of(rules, message())

    assert (job.num_inference_steps, job.guidance_scale) == (None, None)


def test_the_worker_s_defaults_hold_where_a_job_names_nothing(rules: JobRules) -> None:
    own = JobRules(default_steps=8, default_guidance=0.0, default_rescale=0.7, locate=rules.locate)

    job = job_of(own, message())

    assert (job.num_inference_steps, job.guidance_scale, job.guidance_rescale) == (8, 0.0, 0.7)


def test_a_job_s_rescaling_of_guidance_wins_over_the_worker_s(rules: JobRules) -> None:
    own = JobRules(None, None, default_rescale=0.7, locate=rules.locate)

    assert job_of(own, message(guidance_rescale=0)).guidance_rescale == 0.0
    assert job_of(rules, message(guidance_rescale=0.2)).guidance_rescale == 0.2
    assert job_of(rules, message(guidance_rescale=None)).guidance_rescale == 0.0


@pytest.mark.parametrize("created_at", [None, "", "yesterday", 5, "x" * 10_000, "\ud800", ["2025-01-20T11:30:00Z"]])
def test_invalid_time_does_not_stop_a_job(rules: JobRules, created_at: object) -> None:
    assert job_of(rules, message() | {"created_at": created_at}).created_at is None


@pytest.mark.parametrize("said", ["2025-01-20T11:30:00", "2025-01-20 11:30:00.000", " 20250120T113000 "])
def test_time_without_a_zone_is_kept_as_written(rules: JobRules, said: str) -> None:
    created_at = job_of(rules, message() | {"created_at": said}).created_at

    assert created_at == datetime(2025, 1, 20, 11, 30)


def test_a_time_keeps_its_zone(rules: JobRules) -> None:
    created_at = job_of(rules, message() | {"created_at": "2025-01-20T20:30:00+09:00"}).created_at

    assert created_at is not None
    assert created_at.utcoffset() == timedelta(hours=9)
    assert created_at == datetime(2025, 1, 20, 11, 30, tzinfo=UTC)


def test_id_beside_data_is_accepted(rules: JobRules) -> None:
    rejected = rejection_of(rules, {"task_id": TASK_ID, "generation_id": 7, "data": {"prompt": ""}})

    assert (rejected.generation_id, rejected.task_id) == (7, TASK_ID)


# --- Seeds and ids


def test_a_derived_seed_follows_from_the_task_alone_and_has_32_bits(rules: JobRules) -> None:
    # Given the same task asked for in other words, and a hundred other tasks
    again = job_of(rules, message(prompt="another", seed=None))
    others = [job_of(rules, message() | {"task_id": str(uuid.UUID(int=number))}).seed for number in range(100)]

    # Then the task's seed is the known one, and the others' seeds are spread over 32 bits
    assert again.seed == SEED
    assert len({SEED, *others}) == 101
    assert all(0 <= seed <= MAX_UINT32 for seed in others)
    assert max(others) > MAX_UINT32 // 2


def test_seeds_of_several_images_follow_one_another_and_fit_a_generator(rules: JobRules) -> None:
    assert job_of(rules, message(seed=5, num_images=3)).seeds == (5, 6, 7)
    assert max(job_of(rules, message(seed=MAX_SEED, num_images=8)).seeds) <= MAX_INT64


@pytest.mark.parametrize(
    "given_id", [TASK_ID.upper(), "{" + TASK_ID + "}", TASK_ID.replace("-", ""), f"urn:uuid:{TASK_ID}"]
)
def test_every_way_to_write_a_uuid_is_one_task(rules: JobRules, given_id: str) -> None:
    assert job_of(rules, message() | {"task_id": given_id}).task_id == TASK_ID


@pytest.mark.parametrize(
    "given_id",
    [
        None,
        "",
        "job-5",
        "../../x",
        "a/b",
        "id\r\nX-Evil: 1",
        "x" * 100_000,
        5,
        True,
        [TASK_ID],
        {"id": 1},
        "\ud800" * 32,
    ],
    ids=repr,
)
def test_h10_an_id_that_is_no_uuid_is_replaced_by_one_made_of_the_message(rules: JobRules, given_id: object) -> None:
    body = message() | {"task_id": given_id}

    first, again = job_of(rules, body), job_of(rules, body)
    other = job_of(rules, body | {"created_at": "2025-01-20T11:30:00Z"})

    assert str(uuid.UUID(first.task_id)) == first.task_id == again.task_id
    assert other.task_id != first.task_id


def test_h10_a_message_without_an_id_gets_one(rules: JobRules) -> None:
    body = {"data": {"generation_id": 5, "prompt": "a"}}

    assert uuid.UUID(job_of(rules, body).task_id) == uuid.UUID(job_of(rules, body).task_id)


def test_a_rejected_job_carries_its_ids(rules: JobRules) -> None:
    rejected = rejection_of(rules, message(seed=-2))

    assert (rejected.task_id, rejected.generation_id) == (TASK_ID, 456)


# --- Sizes


def size_of(rules: JobRules, base_size: int, size_multiple: int = 8, **fields: Any) -> tuple[int, int]:
    return resolve_size(job_of(rules, message(**fields)), base_size=base_size, size_multiple=size_multiple)


@pytest.mark.parametrize(
    ("aspect", "sides"), [("1:1", (1, 1)), ("2:2", (2, 2)), ("1:2", (1, 2)), ("2:1", (2, 1)), ("", (1, 1))]
)
@pytest.mark.parametrize(("base_size", "size_multiple"), [(512, 8), (1024, 16), (128, 8)])
def test_a_named_ratio_counts_in_base_sizes(
    rules: JobRules, aspect: str, sides: tuple[int, int], base_size: int, size_multiple: int
) -> None:
    size = size_of(rules, base_size, size_multiple, aspect_ratio=aspect)

    assert size == (sides[0] * base_size, sides[1] * base_size)


@pytest.mark.parametrize("aspect", ["3:2", "2:3", "4:3", "3:4", "16:9", "9:16", "4:1", "1:4", "21:9", "1000:999"])
@pytest.mark.parametrize(("base_size", "size_multiple"), [(512, 8), (1024, 16), (128, 8)])
def test_any_other_ratio_keeps_the_area_in_whole_multiples(
    rules: JobRules, aspect: str, base_size: int, size_multiple: int
) -> None:
    width, height = size_of(rules, base_size, size_multiple, aspect_ratio=aspect)

    ratio = eval(aspect.replace(":", "/"))  # noqa: S307 - of the list above
    assert (width % size_multiple, height % size_multiple) == (0, 0)
    assert abs(width - base_size * ratio**0.5) <= size_multiple / 2
    assert abs(height - base_size / ratio**0.5) <= size_multiple / 2
    assert width * height == pytest.approx(base_size**2, rel=0.07 if base_size == 128 else 0.02)


def test_a_size_wins_over_a_ratio_and_is_rounded_to_the_nearest_multiple(rules: JobRules) -> None:
    fields = {"aspect_ratio": "2:1", "parameters": {"width": 510, "height": 777}}

    assert size_of(rules, 512, 8, **fields) == (512, 776)
    assert size_of(rules, 512, 16, **fields) == (512, 784)
    assert size_of(rules, 1024, 64, width=64, height=2048) == (64, 2048)


# --- Limits

LIMITS: list[tuple[str, Any, Any]] = [
    # field, the values at its limits, the values just beyond them
    ("prompt", ["a", "a" * MAX_PROMPT_CHARS], ["", "a" * (MAX_PROMPT_CHARS + 1)]),
    ("negative_prompt", ["", "a" * MAX_PROMPT_CHARS], ["a" * (MAX_PROMPT_CHARS + 1)]),
    ("lora_scale", [-4, 0, 4, 4.0], [-4.001, 4.001]),
    ("loras", [[], [{"path": "a.safetensors"}] * 4], [[{"path": "a.safetensors"}] * 5, [{"path": ""}], [{}]]),
    ("lora_path", ["a" * 1024], ["a" * 1025, "a" * 2049]),
    ("signature_path", ["a" * 1024], ["a" * 1025, "a" * 2049]),
    ("aspect_ratio", ["4:1", "1:4", "4000:1000"], ["4001:1000", "1:5", "0:1", "01:1"]),
    ("seed", [0, MAX_SEED, -1, -1.0, 42.0, "42", "-1", "42.0", str(MAX_SEED), ""], [-2, MAX_SEED + 1, "x", 1.5, "4_2"]),
    ("num_images", [1, 8], [0, 9]),
    ("num_inference_steps", [1, 150], [0, 151]),
    ("guidance_scale", [0, 0.0, 50], [-0.1, 50.1]),
    ("guidance_rescale", [0, 0.5, 1], [-0.1, 1.1]),
    ("scheduler", ["a" * 100], ["a" * 101]),
    ("artist_name", ["a" * 100], ["a" * 101]),
    ("prompt_tags", [[], ["a" * 200] * 100, ["a"] * 1000, ["", " "], [None], ""], [["a"] * 1001, ["a" * 201], [5]]),
    ("parameters", [{}, {"steps": 1}, {"steps": 150}], [{"steps": 0}, {"steps": 151}]),
    ("parameters", [{"cfg_scale": 0}, {"cfg_scale": 50}], [{"cfg_scale": -1}, {"cfg_scale": 51}]),
    ("parameters", [{"cfg_normalization": 0}, {"cfg_normalization": 1.5}], [{"cfg_normalization": -1}]),
    ("parameters", [{"cfg_truncation": 0}, {"cfg_truncation": 1}], [{"cfg_truncation": 1.5}]),
    ("parameters", [{"true_cfg_scale": 1}, {"true_cfg_scale": 50}], [{"true_cfg_scale": 0.5}, {"true_cfg_scale": 51}]),
    (
        "parameters",
        [{"seed": 0}, {"seed": MAX_SEED}, {"seed": "7"}, {"seed": -1}],
        [{"seed": -2}, {"seed": MAX_SEED + 1}],
    ),
    ("parameters", [{"width": 64, "height": 2048}], [{"width": 63, "height": 64}, {"width": 64, "height": 2049}]),
    ("signature_config", [{"opacity": 0}, {"opacity": 1}], [{"opacity": -0.1}, {"opacity": 1.1}]),
]


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, good, _ in LIMITS for value in good])
def test_a_value_at_its_limit_is_taken(rules: JobRules, field: str, value: object) -> None:
    assert job_of(rules, message(**{field: value})).generation_id == 456


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, _, bad in LIMITS for value in bad])
def test_a_value_beyond_its_limit_is_refused_by_a_message_that_names_the_field(
    rules: JobRules, field: str, value: object
) -> None:
    rejected = rejection_of(rules, message(**{field: value}))

    assert field in str(rejected)
    assert_reportable(rejected)


def test_a_body_may_have_256_kilobytes_and_not_one_byte_more(rules: JobRules) -> None:
    start = to_bytes(message())
    longest = start + b" " * (MAX_BODY_BYTES - len(start))

    assert job_of(rules, longest).generation_id == 456
    rejected = rejection_of(rules, longest + b" ")
    assert (rejected.code, rejected.task_id, rejected.generation_id) == ("INVALID_INPUT", TASK_ID, 456)
    assert f"{MAX_BODY_BYTES + 1} bytes; at most {MAX_BODY_BYTES}" in str(rejected)


def test_lora_path_counts_among_the_adapters(rules: JobRules) -> None:
    rejected = rejection_of(rules, message(lora_path=LORA, loras=[{"path": "a.safetensors"}] * 4))

    assert rejected.code == "INVALID_INPUT"
    assert "5 adapters" in str(rejected)
    assert "at most 4" in str(rejected)


# --- What the messages say


@pytest.mark.parametrize(
    ("fields", "named", "right"),
    [
        ({"num_inference_steps": 1000}, "1000", "150"),
        ({"seed": -7}, "-7", "0"),
        ({"seed": "lucky"}, "'lucky'", "integer"),
        ({"aspect_ratio": "9999:1"}, "'9999:1'", "2:1"),
        ({"prompt": "x" * 5000}, "5000", "4000"),
        ({"prompt": "   "}, "prompt", "1 to 4000"),
        ({"prompt": None}, "prompt", "required"),
        ({"width": 70_000, "height": 512}, "70000", "2048"),
        ({"width": 512}, "width and height", "both"),
        ({"num_images": 1_000_000}, "1000000", "8"),
        ({"signature_config": {"position": "middle"}}, "'middle'", "'bottom-right'"),
        ({"signature_config": {"opacity": 2}}, "2", "1"),
        ({"lora_path": "s3://secret/a.safetensors"}, "'s3://secret/a.safetensors'", "media"),
        ({"lora_path": "/etc/passwd"}, "'/etc/passwd'", "s3://bucket/key"),
        ({"lora_path": "a.ckpt"}, "'a.ckpt'", ".safetensors"),
        ({"signature_path": "file:///etc/passwd"}, "signature_path: 'file:///etc/passwd'", "s3://bucket/key"),
        ({"guidance_scale": "high"}, "'high'", "number"),
    ],
)
def test_a_rejection_names_the_value_and_what_would_be_right(
    rules: JobRules, fields: dict[str, Any], named: str, right: str
) -> None:
    text = str(rejection_of(rules, message(**fields)))

    assert named in text
    assert right in text


@pytest.mark.parametrize("holder", [{"signature_config": 5}, {"parameters": "x"}, {"loras": [5]}])
def test_rejection_names_the_message_s_fields_and_not_our_classes(rules: JobRules, holder: dict[str, Any]) -> None:
    assert "Wire" not in str(rejection_of(rules, message(**holder)))


@pytest.mark.parametrize("given_data", [[], "text", 5])
def test_data_of_a_wrong_kind_is_not_called_missing(rules: JobRules, given_data: object) -> None:
    text = str(rejection_of(rules, {"task_id": TASK_ID, "generation_id": 7, "data": given_data}))

    assert "missing" not in text
    assert "object" in text


@pytest.mark.parametrize(
    ("body", "named", "right"),
    [
        (b"not json", "JSON", "line 1"),
        (b'{"a": 1, "a": 2}', "twice", ""),
        (b"[]", "list", "object"),
        (b"\xff", "UTF-8", "byte 0"),
        (message() | {"type": "training"}, "'training'", "'image_generation'"),
        (message(generation_id=True), "True", "1 to 2^63-1"),
        (message(generation_id="5 6"), "'5 6'", "1 to 2^63-1"),
    ],
)
def test_undecodable_message_has_a_reason(
    rules: JobRules, body: bytes | dict[str, Any], named: str, right: str
) -> None:
    with pytest.raises(Undecodable) as caught:
        decode(to_bytes(body), rules)

    assert named in str(caught.value)
    assert right in str(caught.value)


def assert_reportable(error: Undecodable | JobRejected) -> None:
    """Assert that the message is short enough for a header, one line, and forges no other."""
    assert 0 < len(str(error)) <= MAX_REASON_CHARS <= 400
    assert str(error).isprintable()


# --- Hostile messages (FAULTS.md, section 2)

NESTED = 100_000
HUGE = "9" * 5000  # more digits than int() takes
LARGE = "9" * 4000  # as many as it takes
UTF8 = to_bytes(message())

HOSTILE: dict[str, list[tuple[bytes | Mapping[str, Any], str]]] = {
    "H1 no JSON": [
        (b"", DEAD),
        (b"{}{}", DEAD),
        (b"generate a sunset", DEAD),
        (b'{"data": {', DEAD),
        (UTF8 + b"x", DEAD),
        ('{"data": {"generation_id": 1, "prompt": "caf\xe9"}}'.encode("latin-1"), DEAD),
        (b"\x80\x04\x95", DEAD),
    ],
    "H2 nesting": [
        (b"[" * NESTED, DEAD),
        (b'{"a":' * (NESTED // 3), DEAD),
        (b"[" * NESTED + b"]" * NESTED, DEAD),
        (b'{"type":' + b"[" * NESTED + b"]" * NESTED + b"}", DEAD),
        (raw("prompt", "[" * 50_000 + "]" * 50_000), DEAD),
    ],
    "H3 no object": [(b'"str"', DEAD), (b"[]", DEAD), (b"null", DEAD), (b"5", DEAD), (b"true", DEAD), (b"1e9", DEAD)],
    "H4 digits": [
        (raw("seed", HUGE), DEAD),
        (raw("unknown", HUGE), DEAD),
        (f'{{"data": {{"generation_id": {LARGE}, "prompt": "a"}}}}'.encode(), DEAD),
        (raw("seed", LARGE), "INVALID_INPUT"),
        (raw("num_inference_steps", LARGE), "INVALID_INPUT"),
        (raw("guidance_scale", LARGE), "INVALID_INPUT"),
        (raw("width", "-" + LARGE), "INVALID_INPUT"),
    ],
    "H5 not finite": [
        (raw("guidance_scale", "NaN"), "INVALID_INPUT"),
        (raw("guidance_scale", "1e400"), "INVALID_INPUT"),
        (raw("lora_scale", "-Infinity"), "INVALID_INPUT"),
        (raw("seed", "Infinity"), "INVALID_INPUT"),
        (raw("signature_config", '{"opacity": NaN}'), "INVALID_INPUT"),
        (raw("prompt", "NaN"), DEAD),
        (b'{"data": {"generation_id": NaN, "prompt": "a"}}', DEAD),
    ],
    "H6 duplicate keys": [
        (b'{"data": {"generation_id": 1, "generation_id": 2, "prompt": "a"}}', DEAD),
        (b'{"data": {"generation_id": 1, "prompt": "a"}, "data": {"generation_id": 2, "prompt": "b"}}', DEAD),
        (raw("parameters", '{"steps": 1, "steps": 2}'), DEAD),
        (raw("unknown", '{"a": 1, "\\u0061": 2}'), DEAD),
    ],
    "H7 size": [
        (b"[" + b"{}," * 3_600_000 + b"{}]", DEAD),
        (b" " * (MAX_BODY_BYTES + 1), DEAD),
        (UTF8 + b" " * MAX_BODY_BYTES, "INVALID_INPUT"),
        (message(prompt="x" * 10_000_000), "INVALID_INPUT"),
    ],
    "H8 encodings": [
        (b"\xef\xbb\xbf" * 2 + UTF8, DEAD),
        (UTF8.decode().encode("utf-16"), DEAD),
        (UTF8.decode().encode("utf-16-le"), DEAD),
        (UTF8.decode().encode("utf-32"), DEAD),
        (raw("unknown", '"\x00"'), DEAD),
        (b'{"data": {"generation_id": 1, "prompt": "\xed\xa0\x80"}}', DEAD),
        (b'{"data": {"generation_id": 1, "prompt": "\xc0\x80"}}', DEAD),
    ],
    "H9 type": [
        (message() | {"type": "training"}, DEAD),
        (message() | {"type": "IMAGE_GENERATION"}, DEAD),
        (message() | {"type": None}, DEAD),
        (message() | {"type": ["image_generation"]}, DEAD),
        (message() | {"type": "x" * 100_000}, DEAD),
        (message() | {"type": "\r\n[CRITICAL] fake"}, DEAD),
        ({"task_id": TASK_ID, "type": "model_training", "data": {"style_id": 1, "images": ["s3://media/1.png"]}}, DEAD),
    ],
    "H11 generation_id": [
        *(
            (message(generation_id=given_id), DEAD)
            for given_id in (True, 5.0, 0, -1, 2**63, None, [5], {}, "", "a/b", "../x", "a b", "한", "5\n", "a" * 129)
        ),
        ({"task_id": TASK_ID, "data": {"prompt": "a"}}, DEAD),
        ({"task_id": TASK_ID}, DEAD),
        # One inside `data` that is wrong is not replaced by one beside it.
        ({"task_id": TASK_ID, "generation_id": 5, "data": {"generation_id": "a/5", "prompt": "a"}}, DEAD),
    ],
    "H12 data": [
        ({"task_id": TASK_ID, "generation_id": 5}, "INVALID_INPUT"),
        ({"task_id": TASK_ID, "generation_id": 5, "data": None}, "INVALID_INPUT"),
        ({"task_id": TASK_ID, "generation_id": 5, "data": []}, "INVALID_INPUT"),
        ({"task_id": TASK_ID, "generation_id": 5, "data": "prompt"}, "INVALID_INPUT"),
        (message(num_inference_steps="50"), "INVALID_INPUT"),
        (message(num_inference_steps=50.0), "INVALID_INPUT"),
        (message(num_images=True), "INVALID_INPUT"),
        (message(parameters=[]), "INVALID_INPUT"),
        (message(parameters="steps=5"), "INVALID_INPUT"),
        (message(loras={"path": "a.safetensors"}), "INVALID_INPUT"),
        (message(loras=["a.safetensors"]), "INVALID_INPUT"),
        (message(prompt_tags="sunset"), "INVALID_INPUT"),
        (message(prompt_tags=[5] * 50_000), "INVALID_INPUT"),
        (message(artist_name=5, scheduler=5, lora_path=5, signature_path=5, seed="", width="x"), "INVALID_INPUT"),
    ],
    "H13 prompt length": [
        (message(prompt="x" * (MAX_PROMPT_CHARS + 1)), "INVALID_PROMPT"),
        (message(prompt="한" * 40_000), "INVALID_PROMPT"),
        (message(prompt=""), "INVALID_PROMPT"),
        (message(prompt="   "), "INVALID_PROMPT"),
        (message(prompt="\t\r\n\u2003\u3000"), "INVALID_PROMPT"),
        (message(prompt=None), "INVALID_PROMPT"),
        (message(prompt=5), "INVALID_PROMPT"),
        ({"task_id": TASK_ID, "data": {"generation_id": 5}}, "INVALID_PROMPT"),
    ],
    "H14 no text": [
        (message(prompt="a\0b"), "INVALID_PROMPT"),
        (message(prompt="a\ud800b"), "INVALID_PROMPT"),
        (message(prompt="\udc00\ud800"), "INVALID_PROMPT"),
        (message(negative_prompt="a\0b"), "INVALID_PROMPT"),
        (message(negative_prompt="a\ud800b"), "INVALID_PROMPT"),
    ],
    # Told to the backend with the picture, whose database takes no NUL either: it would refuse the end for a day.
    "H14 no text elsewhere": [
        (message(artist_name="\0"), "INVALID_INPUT"),
        (message(prompt_tags=["sun\0set"]), "INVALID_INPUT"),
        (message(prompt_tags=["\ud800"]), "INVALID_INPUT"),
        (message(scheduler="dpm\0"), "INVALID_INPUT"),
        (message(scheduler="\ud800"), "INVALID_INPUT"),
    ],
    "H15 prompt bombs": [
        (message(prompt="(" * 100_000), "INVALID_PROMPT"),
        (message(prompt="((a:1.1)" * 20_000), "INVALID_PROMPT"),
        (message(prompt="{{a|b}}" * 20_000), "INVALID_PROMPT"),
    ],
    "H16 aspect_ratio": [
        *(
            (message(aspect_ratio=aspect), "UNSUPPORTED_ASPECT_RATIO")
            for aspect in (
                "9999:1",
                "1:9999",
                "1:1\n",
                "\n1:1",
                " 1:1",
                "1:1:1",
                "1",
                ":",
                "-1:-1",
                "0:0",
                "1.5:1",
                "a:b",
            )
        ),
        *((message(aspect_ratio=aspect), "UNSUPPORTED_ASPECT_RATIO") for aspect in (1, 1.0, True, [1, 1], {"w": 1})),
        (message(aspect_ratio="1\u0660:1\u0660"), "UNSUPPORTED_ASPECT_RATIO"),  # Arabic digits
        (message(aspect_ratio="1:1" * 50_000), "UNSUPPORTED_ASPECT_RATIO"),
    ],
    "H17 work": [
        *((message(num_inference_steps=steps), "INVALID_INPUT") for steps in (10**9, 0, -1, 2**64)),
        (raw("num_inference_steps", "1e400"), "INVALID_INPUT"),
        (message(parameters={"steps": 10**9}), "INVALID_INPUT"),
        (message(parameters={"width": 65_536, "height": 64}), "INVALID_INPUT"),
        (message(width=64, height=65_536), "INVALID_INPUT"),
        (message(width=0, height=0), "INVALID_INPUT"),
        (message(width=512), "INVALID_INPUT"),
        (message(num_images=10**6), "INVALID_INPUT"),
        (message(num_images=0), "INVALID_INPUT"),
        (message(loras=[{"path": "a.safetensors"}] * 5000), "INVALID_INPUT"),
    ],
    "H18 seed": [
        *((message(seed=seed), "INVALID_INPUT") for seed in (-2, 2**63, 2**64, "x", "4 2", 1.5, True, [1])),
        (message(parameters={"seed": -2}), "INVALID_INPUT"),
    ],
    "H21 local paths": [
        *(
            (message(lora_path=path), "INPUT_FORBIDDEN")
            for path in ("/etc/passwd", "file:///etc/passwd", "..", ".", "\\\\x", "~/.ssh/id_rsa", "C:\\a", "/tmp")
        ),
        (message(signature_path="/proc/self/environ"), "INPUT_FORBIDDEN"),
        (message(loras=[{"path": "file:///a.safetensors"}]), "INPUT_FORBIDDEN"),
    ],
    "H22 other buckets": [
        *(
            (message(lora_path=path), "INPUT_FORBIDDEN")
            for path in (
                "s3://other-bucket/a.safetensors",
                "https://evil.example/a.safetensors",
                "gs://media@evil/a.safetensors",
                "s3://Media/a.safetensors",
                "https://media.s3.amazonaws.com@evil.example/a.safetensors",
                "https://media.s3.amazonaws.com.evil.example/a.safetensors",
                "https://s3.amazonaws.com/other/a.safetensors",
                "http://169.254.169.254/latest/meta-data",
            )
        ),
        (message(signature_path="s3://other-bucket/a.png"), "INPUT_FORBIDDEN"),
        (message(loras=[{"path": LORA}, {"path": "s3://other-bucket/a.safetensors"}]), "INPUT_FORBIDDEN"),
    ],
    "H23 keys": [
        *(
            (message(lora_path=path), "INPUT_FORBIDDEN")
            for path in (
                "../../other/secret",
                "s3://media/../../other/secret",
                "s3://media/%2e%2e/secret",
                "https://media.s3.amazonaws.com/%252e%252e/secret",
                "s3://media/a//b",
                "s3://media//a",
                "s3://media/",
                "s3://media",
                "a\0b",
                "a\r\nHost: evil",
                "a" * 1025,
                "한" * 400,
            )
        ),
    ],
    "H24 ARNs": [
        *(
            (message(lora_path=path), "INPUT_FORBIDDEN")
            for path in (
                "s3://arn:aws:s3:us-east-1:123456789012:accesspoint/x/a.safetensors",
                "arn:aws:s3:::media/a.safetensors",
                "gs://arn:aws:s3-outposts:us-east-1:1:outpost/op-1/accesspoint/ap/a",
            )
        ),
        (message(signature_path="s3://arn:aws:s3:::media/a.png"), "INPUT_FORBIDDEN"),
    ],
    "H27 pickles by name": [
        *((message(lora_path=f"models/a{suffix}"), "LORA_UNSAFE_FORMAT") for suffix in (".bin", ".pt", ".CKPT")),
        (message(loras=[{"path": LORA}, {"path": "models/b.pth"}]), "LORA_UNSAFE_FORMAT"),
    ],
    "H34 signature_config": [
        (raw("signature_config", '{"opacity": NaN}'), "INVALID_INPUT"),
        (message(signature_config={"opacity": 2}), "INVALID_INPUT"),
        (message(signature_config={"opacity": "0.7"}), "INVALID_INPUT"),
        (message(signature_config={"opacity": True}), "INVALID_INPUT"),
        (message(signature_config={"position": "__class__"}), "INVALID_INPUT"),
        (message(signature_config={"position": 5}), "INVALID_INPUT"),
        (message(signature_config={"position": ["center"]}), "INVALID_INPUT"),
        (message(signature_config={"position": "BOTTOM_RIGHT"}), "INVALID_INPUT"),
        (message(signature_config={"size": "gigantic"}), "INVALID_INPUT"),
        (message(signature_config="bottom-right"), "INVALID_INPUT"),
        (message(signature_config=[]), "INVALID_INPUT"),
    ],
}

CASES = [
    pytest.param(body, answer, id=f"{name}-{number}")
    for name, variants in HOSTILE.items()
    for number, (body, answer) in enumerate(variants)
]


@pytest.mark.parametrize(("body", "answer"), CASES)
def test_a_hostile_message_gets_its_answer_at_once(
    rules: JobRules, body: bytes | Mapping[str, Any], answer: str
) -> None:
    content = to_bytes(body)
    started_at = time.thread_time()

    with pytest.raises((Undecodable, JobRejected)) as caught:
        decode(content, rules)

    assert time.thread_time() - started_at < MAX_ANSWER_SECONDS
    assert getattr(caught.value, "code", DEAD) == answer
    assert_reportable(caught.value)


def test_every_hostile_class_has_three_variants_or_more() -> None:
    assert {name for name, variants in HOSTILE.items() if len(variants) < 3} == set()


@pytest.mark.parametrize(
    "prompt",
    [
        "\u202eevil \u200f prompt",
        "z\u0351\u036b\u0343a\u0329l\u0321g\u0338o",
        "cat\r\n[CRITICAL] fake",
        "\x1b[31mred\x1b[0m",
        "서울의 밤 🎨",
        "(" * MAX_PROMPT_CHARS,
        "((((a:1.3))))" * 300,
        "{{a|b}} {% for x in y %} ${HOME} `id`",
        "%s %n {0} \\",
    ],
)
def test_h14_h15_a_strange_prompt_is_plain_text(rules: JobRules, prompt: str) -> None:
    started_at = time.thread_time()

    assert job_of(rules, message(prompt=prompt)).prompt == prompt
    assert time.thread_time() - started_at < 0.5


@pytest.mark.parametrize("nothing", [None, ""])
def test_an_id_beside_data_counts_where_the_one_in_data_is_not_given(rules: JobRules, nothing: object) -> None:
    body = {"task_id": TASK_ID, "generation_id": 7, "data": {"generation_id": nothing, "prompt": "a"}}

    assert job_of(rules, body).generation_id == 7
    assert rejection_of(rules, body | {"data": {"generation_id": nothing, "prompt": "x" * 300_000}}).generation_id == 7


@pytest.mark.parametrize("token", ["AKIAIOSFODNN7EXAMPLE", "sk_live_51Habcdefghijklmnop", "x-0123456789abcdef"])
def test_secret_used_as_a_field_name_is_not_reported(rules: JobRules, token: str) -> None:
    assert job_of(rules, message(**{token: 1, "num_inference_steps_2": 2, "stlye": 1})).ignored == (
        "?",
        "num_inference_steps_2",
        "stlye",
    )


def test_h12_unknown_fields_are_ignored_wherever_they_are(rules: JobRules) -> None:
    strange = {"mood": "oil", "__class__": "Job", "task_id": "other", "\ud800": 1, "deep": [[[{}]]] * 100}
    body = message(**strange, parameters={"strange": 1, "\ud800": 1}, signature_config={"font": "x"}) | {"priority": 9}

    job = job_of(rules, body)

    assert replace(job, ignored=()) == job_of(rules, message())
    assert job.ignored == (
        "mood",
        "__class__",
        "?",
        "deep",
        "parameters.strange",
        "parameters.?",
        "signature_config.font",
    )


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest/meta-data",
        "http://127.1/",
        "http://2130706433/",
        "http://[::ffff:127.0.0.1]/",
        "file:///etc/passwd",
        "http://127.0.0.1:80\\@good.example/",
        "x" * 100_000,
        5,
        None,
        {"url": "http://evil"},
    ],
    ids=lambda url: repr(url)[:40],
)
def test_h19_h20_the_urls_of_a_message_are_not_even_read(rules: JobRules, url: object) -> None:
    assert job_of(rules, FLAT | {"webhook_url": url, "callback_url": url}) == EXPECTED


def test_rejection_lists_several_mistakes_and_stays_short(rules: JobRules) -> None:
    rejected = rejection_of(rules, message(**dict.fromkeys(set(WireData.model_fields) - {"prompt"}, "x" * 300)))

    assert_reportable(rejected)
    assert str(rejected).count("data.") > 1


# --- Fuzzing

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, -1, 2**31, 2**63 - 1, 2**63, 2**64, 10**30])
    | st.floats()
    | st.text(st.characters(exclude_categories=[]), max_size=40)
    | st.sampled_from(["", "1:1", "2:1", "models/a.safetensors", "s3://media/a", "https://x/y", TASK_ID, "center"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)
PARAMETERS = st.dictionaries(st.sampled_from(sorted(WireParameters.model_fields)), JSON_VALUES, max_size=6)
KNOWN_FIELDS = st.dictionaries(st.sampled_from(sorted(WireData.model_fields)), JSON_VALUES | PARAMETERS, max_size=8)
DATA = st.builds(
    lambda fields, given_id, prompt: fields | {"generation_id": given_id} | ({"prompt": prompt} if prompt else {}),
    KNOWN_FIELDS,
    st.just(456) | JSON_VALUES,
    st.none() | st.text(min_size=1, max_size=50),
)
MESSAGES = st.fixed_dictionaries(
    {},
    optional={
        "task_id": st.just(TASK_ID) | JSON_VALUES,
        "type": st.just("image_generation") | JSON_VALUES,
        "data": DATA | JSON_VALUES,
        "generation_id": JSON_VALUES,
        "created_at": JSON_VALUES | st.datetimes().map(str),
        "webhook_url": JSON_VALUES,
    },
)
BODIES = st.binary(max_size=500) | st.text(max_size=200).map(str.encode) | MESSAGES.map(to_bytes)


def assert_within_limits(job: Job) -> None:
    assert str(uuid.UUID(job.task_id)) == job.task_id
    assert is_generation_id(job.generation_id)
    assert 1 <= len(job.prompt) <= MAX_PROMPT_CHARS
    assert re.search(r"[\x00\ud800-\udfff]", job.prompt + job.negative_prompt) is None
    assert all(0 <= seed <= MAX_INT64 for seed in job.seeds)
    assert job.num_inference_steps is None or 1 <= job.num_inference_steps <= 150
    assert job.guidance_scale is None or 0 <= job.guidance_scale <= 50
    assert all(adapter.ref.bucket == "media" and -4 <= adapter.scale <= 4 for adapter in job.adapters)
    assert all(64 <= side <= 2048 for side in resolve_size(job, base_size=512, size_multiple=8))


@bounded(max_examples=EXAMPLES, deadline=1000)
@given(body=BODIES)
def test_decoding_ends_in_a_job_a_rejection_or_a_dead_letter(rules: JobRules, body: bytes) -> None:
    try:
        job = decode(body, rules)
    except (Undecodable, JobRejected) as error:
        assert_reportable(error)
    else:
        assert_within_limits(job)


@bounded(max_examples=EXAMPLES, deadline=1000)
@given(fields=KNOWN_FIELDS)
def test_message_with_an_id_is_answered_whatever_its_fields(rules: JobRules, fields: dict[str, Any]) -> None:
    body = to_bytes({"data": {"prompt": "a", **fields, "generation_id": 456}})

    try:
        assert_within_limits(decode(body, rules))
    except JobRejected as rejected:
        assert rejected.generation_id == 456
        assert_reportable(rejected)
