"""What a message says beyond text to image: taken as it is meant, or refused by a sentence that names the field."""

from typing import Any

import pytest
from jsonschema import Draft7Validator

from clients.storage.location import ObjectRef
from config.model import ModelSettings
from config.store import StoreSettings
from tests.worker.messages.test_decoder import assert_reportable, message, to_bytes
from watermark.geometry import Position
from watermark.product.placement import Layout
from watermark.resizing import Fit
from watermark.text.overlay import Box, Stroke, TextOverlay
from worker.messages.decoder import decode, rules_from
from worker.messages.job import Job, JobControl, JobProduct, JobRejected, JobSource, Kind, Preprocess
from worker.messages.json_schemas import schema_of
from worker.messages.rules import JobRules
from worker.messages.schema import MAX_OVERLAY_CHARS, MAX_OVERLAYS, MAX_REFERENCES

SCHEMA = Draft7Validator(schema_of("job"))
INIT, MASK = {"init_image_path": "a.png"}, {"mask_path": "m.png"}


@pytest.fixture(scope="module")
def rules() -> JobRules:
    """Build the rules of a worker whose only bucket is `media`."""
    return rules_from(ModelSettings(), StoreSettings(AWS_STORAGE_BUCKET_NAME="media"))  # type: ignore[call-arg]


def job_of(rules: JobRules, **fields: Any) -> Job:
    SCHEMA.validate(message(**fields))
    return decode(to_bytes(message(**fields)), rules)


def test_message_without_a_kind_is_text_to_image(rules: JobRules) -> None:
    job = job_of(rules)

    assert (job.kind, job.source, job.control, job.product, job.overlays) == (Kind.TEXT2IMAGE, None, None, None, ())
    assert (job.fit, job.style, job.industry) == (Fit.COVER, None, None)


@pytest.mark.parametrize(("given", "meant"), [({}, 0.8), ({"strength": 0.3}, 0.3), ({"strength": 1}, 1.0)])
def test_image_to_image_has_its_source_image(rules: JobRules, given: dict[str, Any], meant: float) -> None:
    job = job_of(rules, kind="image2image", init_image_path="s3://media/a.png", fit="contain", **given)

    assert job.source == JobSource(ObjectRef("media", "a.png"), None, meant)
    assert (job.kind, job.fit) == (Kind.IMAGE2IMAGE, Fit.CONTAIN)


def test_inpainting_has_a_mask_and_full_strength(rules: JobRules) -> None:
    job = job_of(rules, kind="inpaint", **INIT, **MASK)

    assert job.source == JobSource(ObjectRef("media", "a.png"), ObjectRef("media", "m.png"), 1.0)


def test_control_goes_with_every_kind_but_product(rules: JobRules) -> None:
    control = {"image_path": "e.png", "model": "edges", "scale": 0.5, "start": 0.1, "end": 0.9, "preprocess": "canny"}

    assert job_of(rules, control=control).control == JobControl(
        ObjectRef("media", "e.png"), "edges", 0.5, 0.1, 0.9, Preprocess.CANNY
    )
    assert job_of(
        rules, kind="image2image", **INIT, control={"image_path": "e.png", "model": "m"}
    ).control == JobControl(ObjectRef("media", "e.png"), "m", 1.0, 0.0, 1.0, Preprocess.NONE)


def test_edit_has_its_references_in_order(rules: JobRules) -> None:
    job = job_of(rules, kind="edit", references=[{"image_path": "s3://media/a.png"}, {"image_path": "b.png"}])

    assert (job.kind, job.source) == (Kind.EDIT, None)
    assert job.references == (ObjectRef("media", "a.png"), ObjectRef("media", "b.png"))


def test_product_has_its_layout_s_place(rules: JobRules) -> None:
    product = {
        "image_path": "p.png",
        "background_image_path": "b.png",
        "layout": {"scale": 0.5, "position": "bottom-center"},
        "shadow": 0,
        "refine_strength": 0.2,
    }

    assert job_of(rules, kind="product", product=product).product == JobProduct(
        image_ref=ObjectRef("media", "p.png"),
        cutout_ref=None,
        background_ref=ObjectRef("media", "b.png"),
        composite_ref=None,
        layout=Layout(0.5, Position.BOTTOM_CENTER),
        shadow=0.0,
        refine_strength=0.2,
    )
    bare = job_of(rules, kind="product", product={"cutout_path": "c.png"}).product
    assert bare is not None
    assert bare.layout == Layout(0.6, None)


def test_a_headline_may_leave_everything_to_the_worker_or_nothing(rules: JobRules) -> None:
    whole = {
        "text": "새로운\n메뉴",
        "font": "NanumGothic",
        "size": 0.1,
        "color": "#FFcc00",
        "stroke": {"width": 0.1, "color": "#000000"},
        "shadow": True,
        "box": {"opacity": 0.5},
        "position": "top-left",
    }

    assert job_of(rules, text_overlay={"text": "Sale"}).overlays == (TextOverlay("Sale"),)
    assert job_of(rules, text_overlay=[whole, {"text": "b", "size": "fit", "color": "auto"}]).overlays == (
        TextOverlay(
            "새로운\n메뉴",
            font="NanumGothic",
            size=0.1,
            colour="#FFcc00",
            stroke=Stroke(0.1, "#000000"),
            shadow=True,
            box=Box(None, 0.5),
            position=Position.TOP_LEFT,
        ),
        TextOverlay("b"),
    )


AT_THEIR_LIMITS: list[dict[str, Any]] = [
    {"kind": "image2image", **INIT, "strength": 0.001},
    {"control": {"image_path": "e", "model": "m" * 100, "scale": 2, "start": 0, "end": 0.001}},
    {"control": {"image_path": "e", "model": "m", "scale": 0, "start": 0.999, "end": 1}},
    {"kind": "product", "product": {"image_path": "p", "shadow": 1, "refine_strength": 0.6, "layout": {"scale": 1}}},
    {"kind": "product", "product": {"cutout_path": "c", "composite_path": "d"}},
    {"kind": "edit", "references": [{"image_path": "a"}] * MAX_REFERENCES},
    {"references": []},
    {"text_overlay": []},
    {"text_overlay": [{"text": "a"}] * MAX_OVERLAYS},
    {"text_overlay": {"text": "a" * MAX_OVERLAY_CHARS, "size": 0.5, "stroke": {"width": 0.2}, "box": {"opacity": 1}}},
    {"kind": None, "fit": None, "text_overlay": None, "control": None, "product": None, "strength": None},
]


@pytest.mark.parametrize("fields", AT_THEIR_LIMITS, ids=str)
def test_a_value_at_its_limit_is_taken(rules: JobRules, fields: dict[str, Any]) -> None:
    assert job_of(rules, **fields).generation_id == 456


CONTROL, REFERENCES = {"image_path": "e", "model": "m"}, [{"image_path": "a"}, {"image_path": "b"}]
# What is sent, and the field that the refusal names.
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"kind": "video"}, "kind"),
    ({"kind": 5}, "kind"),
    ({"fit": "stretch"}, "fit"),
    ({"kind": "image2image", **INIT, "strength": 0}, "strength"),
    ({"kind": "image2image", **INIT, "strength": 1.01}, "strength"),
    ({"kind": "image2image", **INIT, "strength": "0.5"}, "strength"),
    ({"kind": "image2image", "init_image_path": 7}, "init_image_path"),
    ({"kind": "inpaint", **INIT, "mask_path": ["m"]}, "mask_path"),
    ({"control": {"model": "m"}}, "control.image_path"),
    ({"control": {**CONTROL, "image_path": ""}}, "control"),
    ({"control": {"image_path": "e"}}, "control.model"),
    ({"control": {**CONTROL, "scale": 2.1}}, "control.scale"),
    ({"control": {**CONTROL, "start": 1}}, "control.start"),
    ({"control": {**CONTROL, "end": 0}}, "control.end"),
    ({"control": {**CONTROL, "preprocess": "pose"}}, "control.preprocess"),
    ({"control": "edges"}, "control"),
    ({"kind": "product", "product": []}, "product"),
    ({"kind": "product", "product": {"image_path": "p", "shadow": 1.1}}, "product.shadow"),
    ({"kind": "product", "product": {"image_path": "p", "refine_strength": 0.7}}, "product.refine_strength"),
    ({"kind": "product", "product": {"image_path": "p", "layout": {"scale": 0}}}, "product.layout.scale"),
    ({"kind": "product", "product": {"image_path": "p", "layout": {"position": "left"}}}, "product.layout.position"),
    ({"kind": "edit", "references": {"image_path": "a"}}, "references"),
    ({"kind": "edit", "references": ["a"]}, "references"),
    ({"kind": "edit", "references": [{"image_path": ""}]}, "references"),
    ({"kind": "edit", "references": [{"image_path": "a"}] * (MAX_REFERENCES + 1)}, "references"),
    ({"text_overlay": "Sale"}, "text_overlay"),
    ({"text_overlay": {}}, "text_overlay"),
    ({"text_overlay": {"text": ""}}, "text_overlay"),
    ({"text_overlay": {"text": "a" * (MAX_OVERLAY_CHARS + 1)}}, "text_overlay"),
    ({"text_overlay": {"text": "a", "size": 0.51}}, "size"),
    ({"text_overlay": {"text": "a", "size": "big"}}, "size"),
    ({"text_overlay": {"text": "a", "color": "red"}}, "color"),
    ({"text_overlay": {"text": "a", "stroke": {"width": 0.3}}}, "stroke"),
    ({"text_overlay": {"text": "a", "box": {"opacity": 2}}}, "box"),
    ({"text_overlay": {"text": "a", "position": "middle"}}, "position"),
    ({"text_overlay": [{"text": "a"}] * (MAX_OVERLAYS + 1)}, "text_overlay"),
    ({"text_overlay": {"text": "a\0b"}}, "text_overlay"),
    ({"text_overlay": {"text": "  \n "}}, "text_overlay"),
    ({"style": "x" * 101}, "style"),
    ({"industry": "a\0"}, "industry"),
]


@pytest.mark.parametrize(("fields", "named"), REFUSED, ids=str)
def test_invalid_value_is_refused_by_the_schema_and_by_a_sentence_that_names_it(
    rules: JobRules, fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(JobRejected) as refusal:
        decode(to_bytes(message(**fields)), rules)

    assert refusal.value.code == "INVALID_INPUT"
    assert all(part in str(refusal.value) for part in named.split("."))
    assert_reportable(refusal.value)
    assert not SCHEMA.is_valid(message(**fields))


# What no schema says: fields that go together, and those that do not.
UNMATCHED: list[tuple[dict[str, Any], str, str]] = [
    ({"kind": "image2image"}, "INVALID_INPUT", "init_image_path"),
    ({"kind": "image2image", "init_image_path": ""}, "INVALID_INPUT", "init_image_path"),
    ({"kind": "inpaint", **INIT}, "INVALID_INPUT", "mask_path"),
    ({"kind": "inpaint", **MASK}, "INVALID_INPUT", "init_image_path"),
    ({**INIT}, "INVALID_INPUT", "data.init_image_path belongs to kind image2image or inpaint"),
    ({"kind": "image2image", **INIT, **MASK}, "INVALID_INPUT", "mask_path"),
    ({"strength": 0.5}, "INVALID_INPUT", "strength"),
    ({"product": {"image_path": "p"}}, "INVALID_INPUT", "data.product belongs to kind product"),
    ({"kind": "product"}, "INVALID_INPUT", "data.product"),
    ({"kind": "product", "product": {}}, "INVALID_INPUT", "image_path or cutout_path"),
    ({"kind": "product", "product": {"image_path": "p", "composite_path": "c"}}, "INVALID_INPUT", "cutout_path"),
    ({"kind": "product", "product": {"image_path": "p"}, "num_images": 2}, "INVALID_INPUT", "num_images"),
    ({"kind": "product", "product": {"image_path": "p"}, "control": CONTROL}, "INVALID_INPUT", "control"),
    ({"kind": "edit"}, "INVALID_INPUT", "kind edit needs data.references"),
    ({"kind": "edit", "references": []}, "INVALID_INPUT", "kind edit needs data.references"),
    ({"references": REFERENCES}, "INVALID_INPUT", "data.references belongs to kind edit, but kind is text2image"),
    ({"kind": "edit", "references": REFERENCES, **INIT}, "INVALID_INPUT", "init_image_path"),
    ({"kind": "edit", "references": REFERENCES, **MASK}, "INVALID_INPUT", "mask_path"),
    ({"kind": "edit", "references": REFERENCES, "strength": 0.5}, "INVALID_INPUT", "strength"),
    ({"kind": "edit", "references": REFERENCES, "control": CONTROL}, "INVALID_INPUT", "control does not go with kind"),
    ({"kind": "edit", "references": [{"image_path": "s3://other/a"}]}, "INPUT_FORBIDDEN", "references.0.image_path"),
    ({"control": {**CONTROL, "start": 0.5, "end": 0.5}}, "INVALID_INPUT", "start 0.5 must be before end 0.5"),
    ({"kind": "image2image", "init_image_path": "/etc/passwd"}, "INPUT_FORBIDDEN", "init_image_path"),
    ({"kind": "inpaint", **INIT, "mask_path": "s3://other/m.png"}, "INPUT_FORBIDDEN", "mask_path"),
    ({"control": {**CONTROL, "image_path": "file:///e.png"}}, "INPUT_FORBIDDEN", "control.image_path"),
    ({"kind": "product", "product": {"cutout_path": "a/../b"}}, "INPUT_FORBIDDEN", "product.cutout_path"),
    (
        {"kind": "product", "product": {"image_path": "p", "background_image_path": "https://evil.example/b.png"}},
        "INPUT_FORBIDDEN",
        "product.background_image_path",
    ),
]


@pytest.mark.parametrize(("fields", "code", "named"), UNMATCHED, ids=str)
def test_fields_that_do_not_go_together_are_refused_by_a_sentence_that_names_one(
    rules: JobRules, fields: dict[str, Any], code: str, named: str
) -> None:
    with pytest.raises(JobRejected) as refusal:
        decode(to_bytes(message(**fields)), rules)

    assert refusal.value.code == code
    assert named in str(refusal.value)
    assert_reportable(refusal.value)
