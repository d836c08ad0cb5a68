"""What publishers really send, through a whole worker whose engine runs without torch: ids of text, odd forms,
secrets.
"""

import json
import unicodedata
import uuid
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pika
import pytest

from examples.parts.backend import Call
from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS
from tests.faults.station import start_light_worker
from tests.hostile.inputs import demo_adapter, image, peft_config, peft_weights
from tests.support.contract_schemas import assert_webhook_fits
from tests.support.long import IS_LONG
from tests.support.world import Worker, World, eventually, new_world
from worker.messages.envelope import MAX_BODY_BYTES

LONG = 150  # steps: three seconds
STATUS_PATHS = ("/status.json", "/metrics", "/health/ready")


@pytest.fixture(scope="module")
def world(rabbitmq: RabbitMQ, s3_server: SeaweedFS, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with new_world(rabbitmq, s3_server, tmp_path_factory.mktemp("world")) as made:
        constants = {
            "worker.jobs.inputs.store_source:NOT_FOUND_RETRY_SECONDS": 0.2,
            "tests.support.engine.fake_child:TURN_SECONDS": 0.02,
        }
        start_light_worker(made, constants=constants, STATUS_SHOW_PROMPTS="true", FAULTS_FOLDER=str(made.folder))
        yield made


@pytest.fixture
def worker(world: World) -> Worker:
    return world.workers[0]


def body_of(generation_id: Any, **fields: Any) -> bytes:
    message = {
        "task_id": str(uuid.uuid4()),
        "type": "image_generation",
        "data": {"generation_id": generation_id, "prompt": "a red fox", "num_inference_steps": 2} | fields,
    }
    return json.dumps(message).encode()


def end_of(world: World, generation_id: Any, **fields: Any) -> Call:
    """Publish a job and wait for its end, which fits the contract."""
    world.publish_raw(body_of(generation_id, **fields))
    end = world.wait_for_end(generation_id)
    assert_webhook_fits(end.kind, end.body, end.headers)
    return end


def record_of(world: World, end: Call) -> dict[str, Any]:
    key = f"jobs/{end.headers['webhook-id'].partition(':')[0]}.json"
    content = world.store.client().get_object(Bucket=world.bucket, Key=key)["Body"].read()
    return dict(json.loads(content))


# --- Ids


@pytest.mark.parametrize(
    "given_id", ["0b7c1a52-6a0e-4f6e-9d53-2f1c5e8d7a41", "A.b-c_9", "456", "..", "a" * 128, 2**63 - 1], ids=str
)
def test_generation_id_is_returned_as_it_was_sent(world: World, worker: Worker, given_id: int | str) -> None:
    # Held until its progress is told, which a job that is drawn faster than a busy machine posts does without
    body = body_of(given_id, prompt="hold@2")
    world.publish_raw(body)
    eventually(lambda: bool(world.backend.calls("progress", given_id)), worker.log_tail)
    (world.folder / f"go-{json.loads(body)['task_id']}").touch()
    end = world.wait_for_end(given_id)

    received = [call.body["generation_id"] for call in world.backend.calls(generation_id=given_id)]
    assert end.kind == "complete"
    assert_webhook_fits(end.kind, end.body, end.headers)
    assert {(type(one), one) for one in received} == {(type(given_id), given_id)}
    assert end.body["result_url"].endswith(f"/generations/gen-{given_id}.png")
    assert world.keys(f"generations/gen-{given_id}.png") == [f"generations/gen-{given_id}.png"]
    assert record_of(world, end)["generation_id"] == given_id
    # The line is written behind the webhook.
    eventually(lambda: [one["generation_id"] for one in worker.events("job out")][-1:] == [given_id], worker.log_tail)


def test_images_of_ids_that_end_in_a_number_have_keys_of_their_own(world: World) -> None:
    ids: list[int | str] = [71, "71-2", "shot", "shot-2"]

    ends = [end_of(world, given_id, num_images=2) for given_id in ids]

    urls = [url for end in ends for url in end.body["metadata"]["result_urls"]]
    assert len(set(urls)) == 8
    assert urls[1].endswith("/generations/gen-71-2.png")


@pytest.mark.parametrize(("given_id", "ordered"), [("order-5", "order-5"), ("7001", 7001), (7002, "7002")], ids=str)
def test_cancel_order_names_a_generation_by_number_or_text(
    world: World, given_id: int | str, ordered: int | str
) -> None:
    world.publish_raw(body_of(given_id, num_inference_steps=LONG))
    eventually(lambda: world.backend.calls("progress", given_id) != [])

    connection = pika.BlockingConnection(pika.URLParameters(world.rabbitmq.url))
    order = json.dumps({"generation_id": ordered}).encode()
    connection.channel().basic_publish(f"{world.queue}.cancel", "", order)
    connection.close()

    end = world.wait_for_end(given_id)
    assert (end.kind, end.body["error_code"]) == ("failed", "CANCELLED")


# --- Bodies and fields


def test_a_body_beyond_the_limit_fails_under_its_own_ids(world: World) -> None:
    prompt = '"generation_id": 5, ' * (MAX_BODY_BYTES // 10)

    end = end_of(world, "too-large", prompt=prompt)

    assert (end.kind, end.body["error_code"]) == ("failed", "INVALID_INPUT")
    assert str(MAX_BODY_BYTES) in end.body["error_message"]


def test_byte_order_mark_and_null_fields_are_accepted(world: World) -> None:
    empty = {"seed": "", "signature_config": {"position": None, "size": ""}, "parameters": {"width": None}, "loras": []}
    tags = ["", "  ", *(f"tag {number}" for number in range(150))]
    world.publish_raw(b"\xef\xbb\xbf" + body_of("bom", prompt_tags=tags, scheduler="", aspect_ratio="", **empty))

    end = world.wait_for_end("bom")

    assert end.kind == "complete"
    assert end.body["metadata"]["prompt_tags"] == tags


def test_unknown_fields_are_reported_and_counted(world: World, worker: Worker) -> None:
    counted = worker.metric("darkroom_ignored_fields_total")

    end = end_of(world, "misspelt", stlye="anime", style_id=7, signature_config={"colour": "red"})

    assert end.body["metadata"]["ignored"] == ["stlye", "signature_config.colour"]
    assert worker.metric("darkroom_ignored_fields_total") == counted + 2
    assert "ignored" not in end_of(world, "well-spelt", style_id=7).body["metadata"]


def test_product_without_a_transparent_part_is_refused_where_no_cutout_model_is_set(world: World) -> None:
    world.upload("uploads/opaque.png", image("PNG"))

    end = end_of(world, "opaque", kind="product", product={"image_path": "uploads/opaque.png"})

    assert end.body["error_code"] == "UNSUPPORTED_BY_MODEL"
    assert "product.cutout_path" in end.body["error_message"]


# --- The forms that a trainer and its backend name an adapter by

FOLDER = "models/style-1"


@pytest.fixture(scope="module")
def trained(world: World) -> World:
    """Upload folders as trainers do."""
    world.upload(f"{FOLDER}/adapter_config.json", peft_config())
    world.upload(f"{FOLDER}/adapter_model.safetensors", peft_weights())
    world.upload(f"{FOLDER}/checkpoint-500/adapter_config.json", peft_config())
    world.upload(f"{FOLDER}/checkpoint-500/weights.safetensors", peft_weights())
    world.upload(f"{FOLDER}/pytorch_lora_weights.safetensors", demo_adapter())
    world.upload("models/bare/adapter_model.safetensors", peft_weights())
    world.upload("models/plain/adapter_model.safetensors", demo_adapter())
    world.upload(unicodedata.normalize("NFD", "models/서울 화풍.safetensors"), demo_adapter())
    world.upload("models/한글.safetensors", demo_adapter())
    return world


@pytest.mark.parametrize(
    ("number", "path"),
    list(
        enumerate(
            (
                f"{FOLDER}/adapter_model.safetensors",
                f"{FOLDER}/adapter_config.json",
                f"{FOLDER}/checkpoint-500/weights.safetensors",
                f"{FOLDER}/pytorch_lora_weights.safetensors",
                FOLDER,
                f"{FOLDER}/",
                "s3://<bucket>/models/style-1/adapter_model.safetensors",
                "gs://<bucket>/models/style-1/adapter_model.safetensors",
                "<endpoint>/<bucket>/models/style-1/adapter_model.safetensors",
                "models/plain/adapter_model.safetensors",
                "models/서울 화풍.safetensors",
                unicodedata.normalize("NFD", "models/한글.safetensors"),
                f"<endpoint>/<bucket>/{quote('models/한글.safetensors')}",
                f"gs://<bucket>/{quote('models/한글.safetensors')}",
            )
        )
    ),
)
def test_a_trained_style_is_found_by_every_form_of_its_name(trained: World, number: int, path: str) -> None:
    path = path.replace("<bucket>", trained.bucket).replace("<endpoint>", f"http://127.0.0.1:{trained.store.port}")

    assert end_of(trained, f"form.{number}", lora_path=path).body.get("error_message") is None


def test_weights_of_peft_without_their_config_are_refused_by_what_is_missing(trained: World) -> None:
    end = end_of(trained, "bare", lora_path="models/bare/adapter_model.safetensors")

    assert end.body["error_code"] == "LORA_INVALID"
    assert "adapter_config.json" in end.body["error_message"]


# --- Secrets

CANARIES = ("PASSWORDcanary", "SIGNATUREcanary", "AKIACANARY0123456789", "TOKENcanary")
# Where a text may stand; `null` in the key's place is filled in.
FIELDS: tuple[dict[str, Any], ...] = (
    *({name: "<>"} for name in ("lora_path", "signature_path", "init_image_path", "mask_path", "aspect_ratio")),
    *({name: "<>"} for name in ("seed", "width", "num_images", "guidance_scale", "scheduler", "kind", "fit", "style")),
    *({name: "<>"} for name in ("industry", "signature_config", "parameters", "loras", "prompt_tags", "control")),
    {"loras": [{"path": "<>"}]},
    {"loras": [{"path": "a.safetensors", "scale": "<>"}]},
    {"parameters": {"scheduler": "<>", "steps": "<>"}},
    {"signature_config": {"position": "<>"}},
    {"kind": "image2image", "init_image_path": "<>"},
    {"kind": "inpaint", "init_image_path": "a.png", "mask_path": "<>"},
    {"control": {"image_path": "<>", "model": "edges"}},
    {"control": {"image_path": "a.png", "model": "<>"}},
    {"kind": "product", "prompt": "a table", "product": {"image_path": "<>"}},
    {"text_overlay": {"text": "a", "font": "<>"}},
    {"text_overlay": {"text": "a", "color": "<>"}},
    {"<>": 1},
)


def presigned(world: World) -> tuple[str, ...]:
    """Build locations with secrets in them, as copied from a browser."""
    host = f"127.0.0.1:{world.store.port}/{world.bucket}"
    query = f"X-Amz-Credential={CANARIES[2]}%2F2026&X-Amz-Signature={CANARIES[1]}&X-Amz-Security-Token={CANARIES[3]}"
    return (
        f"http://{host}/a.safetensors?{query}",
        f"http://user:{CANARIES[0]}@{host}/a.safetensors",
        f"http://user:{CANARIES[0]}/x@{host}/a.safetensors",
        f"models/a.safetensors?{query}",
        f"s3://{world.bucket}/a.safetensors?sig={CANARIES[1]}",
        quote(f"http://user:{CANARIES[0]}@{host}/a?{query}", safe=""),
    )


def filled(fields: Any, text: str) -> Any:
    return json.loads(json.dumps(fields).replace('"<>"', json.dumps(text)))


def test_no_secret_of_a_location_comes_back_from_any_field(world: World, worker: Worker) -> None:
    # Given a job for each field and each way to write a secret into a location; in the short form
    # all ways for the adapter's location, and two for each other field
    bodies = {
        f"secret-{place}.{number}": body_of(f"secret-{place}.{number}", **filled(fields, text))
        for place, fields in enumerate(FIELDS)
        for number, text in enumerate(presigned(world))
        if IS_LONG or place == 0 or (place - number) % 3 == 0
    }
    ids = list(bodies)
    world.publish_raw(*bodies.values())
    world.publish_raw(*(body_of(text) for text in presigned(world)))  # no ids: dead letters

    # When all of them have ended
    ends = [world.wait_for_end(given_id) for given_id in ids]
    eventually(lambda: world.queues()[".dead"][0] == len(presigned(world)), lambda: str(world.queues()))

    # Then no part of a secret is in a webhook, a record, the log, the pages or a dead letter's reason
    seen = [json.dumps([call.body for call in world.backend.calls()]), worker.log.read_text()]
    seen += [worker.get(path)[1] for path in STATUS_PATHS]
    seen += [reason for _, reason in world.dead_letters()]
    seen += [json.dumps(record_of(world, end)) for end in ends]
    assert worker.get(STATUS_PATHS[0])[0] == 200
    assert {canary for canary in CANARIES for text in seen if canary in text} == set()
    world.wait_until_clean()


def test_a_signature_of_an_old_editor_is_put_on(world: World) -> None:
    world.upload("signatures/a.gif", image("GIF"))

    assert end_of(world, "gif", signature_path="signatures/a.gif").kind == "complete"
