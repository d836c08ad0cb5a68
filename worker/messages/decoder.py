"""Decode the bytes of a message into a `Job`: both dialects, every limit, one sentence for what is wrong.

Pure: no I/O, no clock. Hostile bodies (size bombs, deep nesting, duplicate keys, forged ids) end as `Undecodable` or
`JobRejected`, never as another exception.
"""

import hashlib
import logging
import math
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from clients.storage.location import ObjectRef, parse_location, shown_location
from config.images import ImageSettings
from config.model import DEFAULT_MODEL, ModelSettings
from config.redacting import quoted
from config.store import StoreSettings
from watermark.resizing import Fit
from watermark.signature import SignatureStyle
from worker.messages.envelope import MAX_BODY_BYTES, identify, oversized_rejection, parse
from worker.messages.ignoring import ignored_in
from worker.messages.job import MAX_ASPECT, Job, JobAdapter, JobRejected, Undecodable
from worker.messages.kinds import control_of, kind_of, overlay_of, overlays_in, product_of, references_of, source_of
from worker.messages.presets import Styled, presets_in_force, styled_of
from worker.messages.rules import Identity, JobRules, Rejection, is_pickle, located, shown_value
from worker.messages.schema import (
    ASPECT,
    MAX_ADAPTERS,
    MAX_PROMPT_CHARS,
    WireData,
    WireParameters,
    WireSignatureConfig,
)

logger = logging.getLogger(__name__)

_ASPECT = re.compile(ASPECT)
_NOT_TEXT = re.compile(r"[\x00\ud800-\udfff]")

_FIELD_CODES: dict[str | int, str] = {
    "prompt": "INVALID_PROMPT",
    "negative_prompt": "INVALID_PROMPT",
    "aspect_ratio": "UNSUPPORTED_ASPECT_RATIO",
}


def rules_from(model: ModelSettings, store: StoreSettings, images: ImageSettings | None = None) -> JobRules:
    """Return the rules of a worker with these settings. Raises `SettingsError` where its presets cannot be used."""

    def locate(text: str) -> ObjectRef:
        return parse_location(
            text,
            default_bucket=store.bucket,
            allowed_buckets=store.allowed_buckets,
            endpoint_url=store.endpoint_url,
            region=store.region,
        )

    return JobRules(
        default_steps=model.inference_steps,
        default_guidance=model.guidance_scale,
        default_rescale=model.guidance_rescale,
        model_names=model.model_names,
        locate=locate,
        presets=presets_in_force(images, locate),
    )


def decode(body: bytes, rules: JobRules) -> Job:
    """Decode the job in `body`. Raises `Undecodable` where it has no valid id, `JobRejected` for all else."""
    if len(body) > MAX_BODY_BYTES:
        raise oversized_rejection(body)
    message = parse(body)
    identity = identify(message, body)
    reject = Rejection(identity)
    wire = _validate(message.get("data"), reject)
    return _build(wire, message, identity, rules, reject)


def _validate(fields: Any, reject: Rejection) -> WireData:
    if not isinstance(fields, dict):
        raise reject("INVALID_INPUT", "data must be an object with generation_id and prompt")
    try:
        wire = WireData.model_validate(fields)
    except ValidationError as error:
        raise _rejection_of(error, reject) from error

    if not wire.prompt.strip() or len(wire.prompt) > MAX_PROMPT_CHARS:
        raise reject(
            "INVALID_PROMPT", f"prompt must have 1 to {MAX_PROMPT_CHARS} characters; it has {len(wire.prompt)}"
        )
    # Also the fields that are only echoed: a database that takes no NUL would refuse the webhook for a day.
    for name in ("prompt", "negative_prompt", "artist_name", "scheduler", "model", "style", "industry", "prompt_tags"):
        _check_text(name, "".join(getattr(wire, name) or ""), reject)
    for overlay in overlays_in(wire):
        _check_text("text_overlay", overlay.text + (overlay.font or ""), reject)
        if not overlay.text.strip():
            raise reject("INVALID_INPUT", "text_overlay: text is blank: give it words, or leave it out")
    return wire


def _check_text(name: str, text: str, reject: Rejection) -> None:
    if _NOT_TEXT.search(text):
        code = _FIELD_CODES.get(name, "INVALID_INPUT")
        raise reject(code, f"{name} holds a NUL or half a surrogate pair: send plain Unicode text")


def _rejection_of(error: ValidationError, reject: Rejection) -> JobRejected:
    """Return a rejection in one sentence: each wrong field, its rule, and the value where it is a scalar."""
    problems = error.errors(include_url=False, include_context=False)
    sentences = []
    for problem in problems[:5]:
        field = ".".join(str(part) for part in problem["loc"])
        value = problem["input"]
        shown = f" (it is {shown_value(value)})" if isinstance(value, int | float | str) else ""
        rule = "Input should be an object" if problem["type"] == "model_type" else problem["msg"]
        sentences.append(f"data.{field}: {rule}{shown}")
    return reject(_FIELD_CODES.get(problems[0]["loc"][0], "INVALID_INPUT"), "; ".join(sentences))


def _build(wire: WireData, message: Mapping[str, Any], identity: Identity, rules: JobRules, reject: Rejection) -> Job:
    parameters = wire.parameters or WireParameters()
    style = wire.signature_config or WireSignatureConfig()
    made = styled_of(wire, rules, reject)
    model = _model(wire.model, rules, reject)
    rules = rules.of_model(model)
    # 32 bits: a backend in JavaScript must be able to read the seed in the webhook.
    derived_seed = int.from_bytes(hashlib.sha256(identity.task_id.encode()).digest()[:4], "big")
    return Job(
        task_id=identity.task_id,
        generation_id=identity.generation_id,
        prompt=made.prompt,
        negative_prompt=made.negative_prompt,
        adapters=_adapters(wire, made, rules, reject),
        size=_size(_first(parameters.width, wire.width), _first(parameters.height, wire.height), reject),
        aspect=_aspect(wire.aspect_ratio, reject),
        seed=_first(parameters.seed, wire.seed, derived_seed),
        num_images=wire.num_images or 1,
        num_inference_steps=_first(parameters.steps, wire.num_inference_steps, made.steps, rules.default_steps),
        guidance_scale=_first(parameters.cfg_scale, wire.guidance_scale, made.guidance_scale, rules.default_guidance),
        guidance_rescale=_first(wire.guidance_rescale, rules.default_rescale),
        model=model,
        cfg_normalization=parameters.cfg_normalization or 0.0,
        cfg_truncation=_first(parameters.cfg_truncation, 1.0),
        true_cfg_scale=parameters.true_cfg_scale,
        scheduler=_first(parameters.scheduler, wire.scheduler) or None,
        signature_ref=located("signature_path", wire.signature_path, rules, reject),
        artist_name=(wire.artist_name or "").strip() or None,
        signature_style=SignatureStyle(position=style.position, size=style.size, opacity=style.opacity),
        kind=kind_of(wire),
        source=source_of(wire, rules, reject),
        control=control_of(wire.control, rules, reject),
        product=product_of(wire, rules, reject),
        references=references_of(wire, rules, reject),
        fit=wire.fit or Fit.COVER,
        overlays=tuple(overlay_of(one) for one in overlays_in(wire)),
        style=wire.style or None,
        industry=wire.industry or None,
        prompt_tags=tuple(wire.prompt_tags or ()),
        created_at=_timestamp(message.get("created_at")),
        ignored=ignored_in(message["data"], wire),
    )


def _first(*candidates: Any) -> Any:
    """Return the first candidate that is not None; zero counts."""
    return next((candidate for candidate in candidates if candidate is not None), None)


def _model(name: str | None, rules: JobRules, reject: Rejection) -> str:
    """Return the model that the job names, or the default one."""
    if not name:
        return DEFAULT_MODEL
    if name not in rules.model_names:
        known = ", ".join(rules.model_names)
        raise reject("UNKNOWN_MODEL", f"model {quoted(name)} is not known: this worker has {known}")
    return name


def _adapters(wire: WireData, made: Styled, rules: JobRules, reject: Rejection) -> tuple[JobAdapter, ...]:
    """Return the adapters that the job names; where it names none, that of its presets."""
    named = [(lora.path, lora.scale) for lora in wire.loras or ()]
    if wire.lora_path:
        named.insert(0, (wire.lora_path, _first(wire.lora_scale, 1.0)))
    if len(named) > MAX_ADAPTERS:
        raise reject(
            "INVALID_INPUT", f"the job names {len(named)} adapters; at most {MAX_ADAPTERS} apply to one picture"
        )
    if not named and made.adapter is not None:
        ref = located("the preset's adapter", made.adapter.path, rules, reject)
        return () if ref is None else (JobAdapter(ref, made.adapter.scale),)

    adapters = []
    for path, scale in named:
        ref = located("lora_path", path, rules, reject)
        if ref is None:
            raise reject("INVALID_INPUT", "data.loras: path is empty: name a .safetensors object or a folder")
        if is_pickle(ref):
            raise reject(
                "LORA_UNSAFE_FORMAT", f"lora_path {shown_location(path)} may hold a pickle; only .safetensors is read"
            )
        adapters.append(JobAdapter(ref, scale))
    return tuple(adapters)


def _size(width: int | None, height: int | None, reject: Rejection) -> tuple[int, int] | None:
    if width is None and height is None:
        return None
    if width is None or height is None:
        raise reject("INVALID_INPUT", "width and height belong together: give both, or aspect_ratio")
    return width, height


def _aspect(text: str | None, reject: Rejection) -> tuple[int, int] | None:
    if not text:
        return None
    match = _ASPECT.fullmatch(text)
    if match is not None:
        width, height = int(match[1]), int(match[2])
        if abs(math.log(width / height)) <= math.log(MAX_ASPECT) + 1e-9:
            return width, height
    known = f"1:1, 2:2, 1:2, 2:1 or another W:H of at most {MAX_ASPECT:.0f} to 1"
    raise reject("UNSUPPORTED_ASPECT_RATIO", f"aspect_ratio {quoted(text)} is not supported; use {known}")


def _timestamp(given: Any) -> datetime | None:
    """Parse `created_at`, with or without a zone; None where it is no ISO 8601 time, which rejects no job."""
    if not isinstance(given, str) or len(given) > 64:
        return None
    try:
        return datetime.fromisoformat(given.strip())
    except ValueError:
        return None


def decode_any(body: bytes, rules: JobRules) -> Job | JobRejected:
    """Return the job, or the rejection it ends with. Raises `Undecodable`, and nothing else, where there is no id."""
    try:
        return decode(body, rules)
    except JobRejected as rejection:
        return rejection
    except Undecodable:
        raise
    except Exception as error:
        # The consuming thread's boundary: a bug in the decoder must not close the connection.
        logger.exception("the decoder failed")
        raise Undecodable(f"the decoder failed: {type(error).__name__}") from error
