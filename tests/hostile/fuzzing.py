"""Seeded fuzzing of everything that reads what strangers wrote: messages, orders, records, adapters, pictures.

`python -m tests.hostile.fuzzing` runs the long form, prints a table and, last, one line of JSON. Every input follows
from the seed, its target's name and its number: `python -m tests.hostile.fuzzing --only NAME --from N` repeats it.
"""

import argparse
import base64
import io
import json
import random
import resource
import struct
import tempfile
import time
import traceback
import uuid
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from jsonschema import Draft7Validator
from PIL import Image, PngImagePlugin
from rich.console import Console
from rich.table import Table

from clients.storage.location import ObjectRef
from config.model import ModelSettings
from config.store import StoreSettings
from watermark.decoding import ImageMode, decode_image, decode_signature
from watermark.errors import ImageInvalid, ImageTooLarge, SignatureInvalid
from worker.errors import ErrorCode
from worker.messages.cancel import decode_cancel
from worker.messages.decoder import decode, rules_from
from worker.messages.job import Job, JobRejected, Kind, Undecodable, resolve_size
from worker.messages.json_schemas import schema_of
from worker.messages.rules import MAX_REASON_CHARS, JobRules
from worker.messages.schema import (
    WireBox,
    WireControl,
    WireData,
    WireLayout,
    WireLora,
    WireParameters,
    WireProduct,
    WireSignatureConfig,
    WireStroke,
    WireTextOverlay,
)
from worker.results.terminal_event import TerminalEvent, failed_event

SEED = 20_261_121
# What is told to a backend or written beside a dead letter has room for a sentence, and one line.
MAX_MESSAGE_CHARS = MAX_REASON_CHARS + 100
MAX_ADAPTER_MESSAGE_CHARS = 1200  # up to three names of layers, of 256 characters each
MAX_SHOWN_CRASHES = 5

RULES = rules_from(ModelSettings(), StoreSettings(AWS_STORAGE_BUCKET_NAME="media"))  # type: ignore[call-arg]


# --- mutations ------------------------------------------------------------------------------------------------------

EVIL_TEXTS = (
    *("", " ", "\0", "\ud800", "\u202e", "\r\nX-Evil: 1", "../../x", "/etc/passwd", "a" * 5000, "한" * 2000, "NaN"),
    *("s3://media/a.safetensors", "s3://other/a", "https://x/y", "media", "models/a.bin", "models/a/", "%2e%2e/a"),
    *("1:1", "9999:1", "1:1\n", "((((", "(a:1e999)", "center", "__class__", "true", "image_generation", "\x1b[31m"),
    *("2026-01-01T00:00:00Z", "9999-12-31T23:59:59+23:59", "0001-01-01T00:00:00-23:59", "(a+)+$", "x_embedder.2-1"),
)
EVIL_NUMBERS = (0, 1, -1, 2, 7, 64, 150, 2**31, 2**63 - 1, 2**63, 2**64, 10**30, 10**4000, 0.5, -0.0, 1e308, 1e-320)
EVIL_VALUES: tuple[Any, ...] = (
    *EVIL_TEXTS,
    *EVIL_NUMBERS,
    *(None, True, False, [], {}, [[]], {"": None}, float("nan"), float("inf"), -float("inf"), [1] * 500),
)
# Bytes that mean something to one of the formats.
TOKENS = (
    *(
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b"\\",
        b",",
        b":",
        b"\0",
        b"\xff",
        b"\x80",
        b"\\ud800",
        b"\\u0000",
        b"1e400",
        b"NaN",
    ),
    *(b"[" * 2000, b'{"a":' * 500, b"9" * 5000, b"\xef\xbb\xbf", b"\xed\xa0\x80", b"PK\x03\x04", b"\x80\x04", b"null"),
    *(b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"IDAT", b"acTL", b"\xff\xd8", b"\xff\xc0", b"VP8X"),
)


def mutated_bytes(rng: random.Random, content: bytes, *, start: int = 0) -> bytes:
    """Make one to eight changes to `content` from byte `start` on."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        place = rng.randint(min(start, len(changed)), len(changed))
        length = rng.choice((1, 1, 1, 2, 4, 16, 200))
        match rng.randrange(7):
            case 0:
                changed[place : place + length] = rng.randbytes(length)
            case 1:
                del changed[place : place + length]
            case 2:
                changed[place:place] = rng.choice(TOKENS)
            case 3:
                changed[place:place] = changed[place : place + length]
            case 4:
                other = rng.randint(min(start, len(changed)), len(changed))
                changed[place : place + length] = changed[other : other + length]
            case 5 if rng.random() < 0.3:
                del changed[place:]
            case _:
                if place < len(changed):
                    changed[place] ^= 1 << rng.randrange(8)
    return bytes(changed)


def mutated_json(rng: random.Random, value: Any, names: tuple[str, ...], depth: int = 0) -> Any:
    """Replace, remove, add or wrap something in `value`; `names` are keys worth adding."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.15 + 0.1 * depth:
        return _wrapped(rng, value) if rng.random() < 0.2 else rng.choice(EVIL_VALUES)
    if isinstance(value, list):
        changed = list(value)
        place = rng.randrange(len(changed))
        changed[place] = mutated_json(rng, changed[place], names, depth + 1)
        return changed
    fields = dict(value)
    key = rng.choice(list(fields))
    match rng.randrange(6):
        case 0:
            del fields[key]
        case 1:
            fields[rng.choice(names)] = rng.choice(EVIL_VALUES)
        case 2:
            fields[rng.choice(EVIL_TEXTS)] = fields[key]
        case _:
            fields[key] = mutated_json(rng, fields[key], names, depth + 1)
    return fields


def _wrapped(rng: random.Random, value: Any) -> Any:
    for _ in range(rng.choice((1, 3, 200))):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


# --- messages -------------------------------------------------------------------------------------------------------

FIELD_NAMES = (*WireData.model_fields, *WireParameters.model_fields, "generation_id", "task_id", "type", "created_at")
NESTED = (WireControl, WireProduct, WireLayout, WireTextOverlay, WireStroke, WireBox, WireSignatureConfig, WireLora)
ALL_NAMES = (*FIELD_NAMES, *(name for model in NESTED for name in model.model_fields))
PUBLISHED = Draft7Validator(schema_of("job"))


def valid_message(rng: random.Random, generation_id: int, *, bucket: str = "media") -> dict[str, Any]:
    """Build a message in one of the two dialects, with unique ids, of one step of 64x64 px."""
    fields: dict[str, Any] = {
        "generation_id": generation_id,
        "prompt": rng.choice(("a fox", "서울의 밤 🎨", "(a:1.2)")),
    }
    work = {"width": 64, "height": 64, "seed": rng.randrange(2**32), "scheduler": "dpm++"}
    if rng.random() < 0.5:
        fields |= work | {"num_inference_steps": 1, "guidance_scale": 3.0, "num_images": 1}
    else:
        fields["parameters"] = work | {"steps": 1, "cfg_scale": 3.0}
    extras = {
        "negative_prompt": "blurry",
        "lora_path": f"s3://{bucket}/models/none.safetensors",
        "loras": [{"path": "models/none.safetensors", "scale": 0.5}],
        "signature_path": f"s3://{bucket}/signatures/none.png",
        "signature_config": {"position": "bottom-right", "size": "medium", "opacity": 0.7},
        "artist_name": "서울",
        "prompt_tags": ["sunset"],
        "aspect_ratio": "1:1",
        "lora_scale": 1.0,
        "style_id": 123,
    }
    fields |= {name: extras[name] for name in rng.sample(sorted(extras), rng.randrange(5))}
    if rng.random() < 0.6:
        fields |= _more_than_text(rng, bucket)
    task_id = str(uuid.UUID(int=rng.getrandbits(128), version=4))
    outer = {"task_id": task_id, "type": "image_generation", "data": fields, "created_at": "2025-01-20T11:30:00Z"}
    return outer | ({"webhook_url": "http://169.254.169.254/"} if rng.random() < 0.2 else {})


def _more_than_text(rng: random.Random, bucket: str) -> dict[str, Any]:
    """Choose fields of the other kinds, with a value in every place of theirs."""
    path = f"s3://{bucket}/uploads/none.png"
    headline = {
        "text": "서울의 밤\nNight",
        "font": "Noto Sans",
        "size": 0.1,
        "color": "auto",
        "stroke": {"width": 0.05, "color": "#000000"},
        "box": {"color": "#ffffff", "opacity": 0.5},
        "shadow": True,
        "position": "top-left",
    }
    product = {name: path for name in WireProduct.model_fields if name.endswith("_path")} | {
        "layout": {"scale": 0.5, "position": "auto"},
        "shadow": 0.5,
        "refine_strength": 0.3,
    }
    control = {"image_path": path, "model": "edges", "scale": 0.8, "start": 0.1, "end": 0.9, "preprocess": "canny"}
    init = {"init_image_path": "uploads/none.png", "strength": 0.5, "fit": "contain"}
    kinds: tuple[dict[str, Any], ...] = (
        {"kind": "image2image", **init, "control": control},
        {"kind": "inpaint", **init, "mask_path": path},
        {"kind": "edit", "references": [{"image_path": path}, {"image_path": "uploads/none.png"}]},
        {"kind": "product", "product": product, "text_overlay": headline},
        {"kind": "text2image", "control": control, "style": "anime"},
        {"text_overlay": [headline, {"text": "cafe", "size": "fit"}], "style": "anime", "industry": "cafe"},
    )
    return rng.choice(kinds)


def fuzzed_message(rng: random.Random, *, generation_id: int = 456, bucket: str = "media") -> bytes:
    """Build a message that is nothing, nearly one, or one with a strange field."""
    message: Any = valid_message(rng, generation_id, bucket=bucket)
    kind = rng.random()
    if kind < 0.05:
        return rng.randbytes(rng.randrange(400))
    if kind < 0.1:
        return b"".join(rng.choice(TOKENS[:16]) for _ in range(rng.randrange(60)))
    if kind < 0.45:
        return mutated_bytes(rng, json.dumps(message, ensure_ascii=rng.random() < 0.5).encode())
    for _ in range(rng.choice((1, 1, 2, 4))):
        if isinstance(message.get("data"), dict) and message["data"] and rng.random() < 0.8:
            message["data"] = _mutated_field(rng, message["data"])
        else:
            message = _mutated_field(rng, message)
    return json.dumps(message if rng.random() < 0.98 else mutated_json(rng, message, ALL_NAMES)).encode()


def _mutated_field(rng: random.Random, fields: dict[str, Any]) -> dict[str, Any]:
    """Change the value of one field, present or not; mostly not of an id, so that more than ids are tried."""
    names = [name for name in FIELD_NAMES if name not in ("generation_id", "type") or rng.random() < 0.1]
    name = rng.choice(([name for name in fields if name in names] if rng.random() < 0.7 else []) or names)
    held = fields.get(name)
    return fields | {name: mutated_json(rng, held, ALL_NAMES) if held else rng.choice(EVIL_VALUES)}


def feed_message(body: bytes, rules: JobRules = RULES) -> str:
    """Decode it; the word for what came of it. What is taken, the published schema takes too."""
    try:
        job = decode(body, rules)
    except Undecodable as error:
        _check_message(str(error))
        return "dead letter"
    except JobRejected as error:
        _check_message(str(error))
        return error.code
    width, height = resolve_size(job, base_size=512, size_multiple=8)
    assert 64 <= min(width, height) <= max(width, height) <= 2048
    assert {ref.bucket for ref in _refs_of(job)} <= {"media"}
    assert str(uuid.UUID(job.task_id)) == job.task_id
    assert PUBLISHED.is_valid(json.loads(body)), "the schema refuses what the decoder takes"
    return "a job" if job.kind is Kind.TEXT2IMAGE else f"a job of kind {job.kind}"


def _refs_of(job: Job) -> list[ObjectRef]:
    """Return every reference that the job makes the worker read."""
    source, control, product = job.source, job.control, job.product
    named = [
        *(adapter.ref for adapter in job.adapters),
        job.signature_ref,
        *((source.image_ref, source.mask_ref) if source else ()),
        *((control.image_ref,) if control else ()),
        *((product.image_ref, product.cutout_ref, product.background_ref, product.composite_ref) if product else ()),
    ]
    return [ref for ref in named if ref is not None]


def _check_message(text: str, max_chars: int = MAX_MESSAGE_CHARS) -> None:
    assert len(text) <= max_chars, f"{text[:100]!r}… has {len(text)} characters"
    assert text.isprintable(), f"{text!r} is no plain line"


# --- cancel orders, records of the ledger ---------------------------------------------------------------------------


def fuzzed_cancel(rng: random.Random) -> bytes:
    """Build a message to cancel, or nearly one."""
    order: Any = {"task_id": str(uuid.UUID(int=rng.getrandbits(128)))} if rng.random() < 0.5 else {"generation_id": 456}
    if rng.random() < 0.5:
        return mutated_bytes(rng, json.dumps(order).encode())
    return json.dumps(mutated_json(rng, order, ("task_id", "generation_id"))).encode()


def feed_cancel(body: bytes) -> str:
    """Read it as the consuming thread does, which must not end by it."""
    try:
        order = decode_cancel(body)
    except Undecodable as error:
        _check_message(str(error))
        return "ignored"
    order.names("a", 1)
    return "by task" if order.task_id else "by generation"


def fuzzed_event(rng: random.Random) -> bytes:
    """Build a record of the ledger or an event of the outbox, or nearly one."""
    event = failed_event(
        task_id=str(uuid.UUID(int=7)), generation_id=456, code=ErrorCode.INTERNAL_ERROR, message="why", retry_count=0
    )
    content = event.to_json()
    if rng.random() < 0.4:
        return mutated_bytes(rng, content)
    return json.dumps(mutated_json(rng, json.loads(content), tuple(TerminalEvent.__slots__))).encode()


def feed_event(content: bytes) -> str:
    """Read it and do with it what the worker does with one that it takes."""
    try:
        event = TerminalEvent.from_json(content)
    except ValueError:
        return "refused"
    assert event.webhook.payload
    assert TerminalEvent.from_json(event.to_json()) == event
    event.body.get("error_code", "")
    return event.kind.value


# --- signatures -----------------------------------------------------------------------------------------------------


def signature_images() -> list[bytes]:
    """Write small valid images of every kind that is read."""
    noise = Image.frombytes("RGB", (40, 30), random.Random(1).randbytes(40 * 30 * 3))
    clear = noise.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 40, zip=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    saved: list[tuple[Image.Image, dict[str, Any]]] = [
        (clear, {"format": "PNG", "pnginfo": text, "icc_profile": b"profile"}),
        (noise.convert("P"), {"format": "PNG", "transparency": 3}),
        (noise.convert("I;16"), {"format": "PNG"}),
        (noise, {"format": "PNG", "save_all": True, "append_images": [noise.rotate(90)]}),
        (noise, {"format": "JPEG", "exif": exif}),
        (noise.convert("CMYK"), {"format": "JPEG"}),
        (noise, {"format": "JPEG", "progressive": True}),
        (clear, {"format": "WEBP", "lossless": True}),
        (noise, {"format": "WEBP", "exif": exif}),
        (noise, {"format": "WEBP", "save_all": True, "append_images": [noise.rotate(90)]}),
    ]
    contents = []
    for image, options in saved:
        content = io.BytesIO()
        image.save(content, **options)
        contents.append(content.getvalue())
    return contents


def fuzzed_image(rng: random.Random, images: list[bytes]) -> bytes:
    """Damage one of `images`; a PNG's checksums are often repaired, so that more than they are tried."""
    content = mutated_bytes(rng, rng.choice(images), start=rng.choice((0, 8, 16)))
    return _with_right_checksums(content) if rng.random() < 0.6 else content


def _with_right_checksums(content: bytes) -> bytes:
    place, parts = 8, [content[:8]]
    while content.startswith(b"\x89PNG") and place + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, place)
        if place + 12 + length > len(content):
            break
        chunk = content[place + 4 : place + 8 + length]
        parts.append(content[place : place + 4] + chunk + struct.pack(">I", zlib.crc32(chunk)))
        place += 12 + length
    return b"".join([*parts, content[place:]])


def feed_signature(content: bytes) -> str:
    """Decode it as a signature."""
    try:
        image = decode_signature(content)
    except SignatureInvalid as error:
        assert "signature" in str(error)
        return "refused"
    assert image.mode == "RGBA"
    return "an image"


def feed_image(content: bytes) -> str:
    """Decode it as a picture to draw from, as a product, and as a mask: all of them take it or none does."""
    words = []
    for mode in get_args(ImageMode):
        try:
            words.append("a picture" if decode_image(content, mode).mode == mode else "another mode")
        except (ImageInvalid, ImageTooLarge) as error:
            _check_message(str(error))
            words.append("refused")
    assert len(set(words)) == 1, words
    return words[0]


# --- adapters -------------------------------------------------------------------------------------------------------

Files = dict[str, tuple[bytes, bytes | None]]
HEADER_BYTES = 8
RENAMES = (
    *(("lora_A", "lora_B"), ("lora_B", "lora_down"), (".weight", ""), (".weight", ".bias"), ("unet.", "transformer.")),
    *(("unet.", "text_encoder_2."), ("lora_unet_", "lora_te2_"), ("_blocks_", "_blocks_9"), ("to_q", "attention.qkv")),
    *(
        (".lora_", ".default.lora_"),
        ("lora_", "hada_"),
        (".alpha", ".lora.alpha"),
        ("transformer.", "diffusion_model."),
    ),
    *(("base_model.model.", ""), ("", "base_model.model."), (".", "_"), ("_", "."), ("0", "00"), ("0", "１")),
    *(("down_blocks", "input_blocks"), ("layers.0", "layers.999999999999"), ("text_model.", "encoder."), (".", "..")),
)
CONFIG_NAMES = (
    *(
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "use_dora",
        "bias",
        "peft_type",
        "auto_mapping",
    ),
    *("init_lora_weights", "target_modules", "base_model_name_or_path", "modules_to_save", "lora_bias"),
)


class AdapterTarget:
    """Damaged adapter files through the reading of one family, and against its model where they are still read."""

    def __init__(self, folder: Path, family: str) -> None:
        # torch takes seconds to import: only where adapters are fuzzed.
        from inference.lora.names.key_names import STABLE_DIFFUSION, Z_IMAGE, sdxl
        from tests.support.models.tiny_models import build_tiny_sd, build_tiny_sdxl, build_tiny_z_image, load_pipe

        build = {"sd": build_tiny_sd, "sdxl": build_tiny_sdxl, "z-image": build_tiny_z_image}[family]
        pipe = load_pipe(build(folder / family))
        self._dialect = {"sd": STABLE_DIFFUSION, "z-image": Z_IMAGE}.get(family) or sdxl(
            pipe.unet.config.layers_per_block
        )
        self._modules = {name: getattr(pipe, name) for name in self._dialect.models}
        self._path, self._config = folder / f"{family}.safetensors", folder / f"{family}.json"
        self._files = _adapter_files(folder, pipe, family)

    def make(self, rng: random.Random) -> bytes:
        """Make an adapter's two files in one: the weights, and the settings of a PEFT folder behind them."""
        weights, config = self._files[rng.choice(sorted(self._files))]
        if config is not None and rng.random() < 0.5:
            config = _mutated_config(rng, config)
        else:
            weights = mutated_safetensors(rng, weights)
        return struct.pack("<Q", len(weights)) + weights + (b"" if config is None else b"+" + config)

    def feed(self, content: bytes) -> str:
        from inference.lora.adapter import check_fits, read_adapter
        from inference.lora.errors import AdapterError

        (length,) = struct.unpack_from("<Q", content)
        self._path.write_bytes(content[HEADER_BYTES : HEADER_BYTES + length])
        has_config = len(content) > HEADER_BYTES + length
        self._config.write_bytes(content[HEADER_BYTES + length + 1 :])
        try:
            adapter = read_adapter(self._path, self._config if has_config else None, self._dialect)
            check_fits(adapter, self._modules)
        except AdapterError as error:
            _check_message(str(error), MAX_ADAPTER_MESSAGE_CHARS)
            return error.code
        return "an adapter"


def _adapter_files(folder: Path, pipe: Any, family: str) -> Files:
    """Write small valid adapters in the layouts that the family's training scripts write, by name."""
    from tests.support.models.tiny_models import write_adapter

    layouts = ["diffusers_new", "peft_folder"] if family == "z-image" else ["diffusers_new", "peft_folder", "kohya"]
    if family == "sd":
        layouts.append("diffusers_old")
    files: Files = {}
    for layout in layouts:
        path = folder / f"{family}-{layout}"
        path = path if layout == "peft_folder" else path.with_suffix(".safetensors")
        has_text = family != "z-image" and layout != "peft_folder"
        made = write_adapter(path, pipe, layout=layout, rank=2, targets=("to_q",), text_encoder=has_text)  # type: ignore[arg-type]
        if layout == "peft_folder":
            weights, config = made / "adapter_model.safetensors", made / "adapter_config.json"
            files[layout] = weights.read_bytes(), config.read_bytes()
        else:
            files[layout] = made.read_bytes(), None
    return files


def mutated_safetensors(rng: random.Random, content: bytes) -> bytes:
    """Change the header, the body or the length of a safetensors file."""
    (length,) = struct.unpack_from("<Q", content)
    header, body = content[HEADER_BYTES : HEADER_BYTES + length], content[HEADER_BYTES + length :]
    match rng.randrange(6):
        case 0:
            return mutated_bytes(rng, content)
        case 1:
            header = mutated_bytes(rng, header)
        case 2:
            place = rng.randrange(len(body))
            poison = rng.choice((b"\xff", b"\x7f", b"\x00\x00\x80\x7f", b"\x80"))
            return content[: HEADER_BYTES + length + place] + poison * 4 + body[place + 4 * len(poison) :]
        case 3:
            length = rng.choice((0, 1, len(header) - 1, len(content), 2**63, 2**64 - 1, 4_000_001))
            return struct.pack("<Q", length) + header + body
        case _:
            header = json.dumps(_mutated_header(rng, json.loads(header))).encode()
    return struct.pack("<Q", len(header)) + header + body


def _mutated_header(rng: random.Random, header: dict[str, Any]) -> Any:
    for _ in range(rng.choice((1, 1, 2, 5))):
        name = rng.choice([name for name in header if name != "__metadata__"] or ["x"])
        entry = dict(header.get(name) or {})
        match rng.randrange(7):
            case 0:
                entry["dtype"] = rng.choice(("F16", "F32", "BF16", "F64", "I64", "F8_E4M3", "Q9", 5))
            case 1:
                entry["shape"] = rng.choice(([], [0, 0], [2**62, 8], [1], [2, 2, 1, 1], [-1, 4], [2, "x"], [2.0, 4]))
            case 2:
                entry["data_offsets"] = rng.choice(([0, 0], [0, 4], [0, 2**63], [4, 0], [], [0, -1], "x"))
            case 3:
                old, new = rng.choice(RENAMES)
                header = {key.replace(old, new, 1): value for key, value in header.items()}
                continue
            case 4:
                header = {key: value for key, value in header.items() if key != name}
                continue
            case 5:
                header["__metadata__"] = rng.choice((_settings(rng), {"format": "pt"}, {}, {"a": 1}, [], None))
                continue
            case _:
                old, new = rng.choice(RENAMES)
                name = name.replace(old, new, 1)
        header[name] = entry
    return header if rng.random() < 0.9 else mutated_json(rng, header, ("__metadata__",))


def _settings(rng: random.Random) -> dict[str, str]:
    """Build what diffusers writes into the metadata, or nearly so."""
    own = {f"{model}.{name}": rng.choice(EVIL_VALUES) for model in ("unet", "transformer") for name in CONFIG_NAMES[:5]}
    plain = {"unet.r": 2, "unet.lora_alpha": 4, "transformer.r": 2, "text_encoder.r": 2}
    chosen = {name: own[name] for name in rng.sample(sorted(own), rng.randrange(3))}
    return {"lora_adapter_metadata": json.dumps(plain | chosen)}


def _mutated_config(rng: random.Random, config: bytes) -> bytes:
    if rng.random() < 0.3:
        return mutated_bytes(rng, config)
    return json.dumps(mutated_json(rng, json.loads(config), CONFIG_NAMES)).encode()


# --- running --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """What is fuzzed: how an input is made, and what it is fed to. `feed` raises what must not come out."""

    name: str
    make: Callable[[random.Random], bytes]
    feed: Callable[[bytes], str]


@dataclass
class Tally:
    """What came of a target's inputs."""

    name: str
    outcomes: Counter[str] = field(default_factory=Counter)
    crashes: list[str] = field(default_factory=list)
    slowest_seconds: float = 0.0
    seconds: float = 0.0
    grown_mb: float = 0.0

    @property
    def num_inputs(self) -> int:
        return self.outcomes.total() + len(self.crashes)


def fuzz(target: Target, num_inputs: int, *, seed: int = SEED, first: int = 0) -> Tally:
    """Feed the target its inputs from number `first` on."""
    tally = Tally(target.name)
    started_at, peak = time.perf_counter(), _peak_mb()
    for number in range(first, first + num_inputs):
        content = target.make(random.Random(f"{seed} {target.name} {number}"))
        fed_at = time.process_time()
        try:
            tally.outcomes[target.feed(content)] += 1
        except Exception:  # noqa: BLE001 - whatever comes out here is what is looked for
            shown = base64.b64encode(content[:300]).decode()
            tally.crashes.append(f"{target.name} number {number}: {shown}\n{traceback.format_exc()[-2000:]}")
        tally.slowest_seconds = max(tally.slowest_seconds, time.process_time() - fed_at)
    tally.seconds = time.perf_counter() - started_at
    tally.grown_mb = _peak_mb() - peak
    return tally


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def pure_targets() -> dict[str, Target]:
    """Return the targets that need no model."""
    images = signature_images()
    targets = (
        Target("messages", fuzzed_message, feed_message),
        Target("cancel orders", fuzzed_cancel, feed_cancel),
        Target("records", fuzzed_event, feed_event),
        Target("signatures", lambda rng: fuzzed_image(rng, images), feed_signature),
        Target("reference pictures", lambda rng: fuzzed_image(rng, images), feed_image),
    )
    return {target.name: target for target in targets}


def adapter_target(folder: Path, family: str) -> Target:
    """Build the target of adapter files of one family: sd, sdxl or z-image."""
    made = AdapterTarget(folder, family)
    return Target(f"adapters of {family}", made.make, made.feed)


def table_of(tallies: list[Tally]) -> Table:
    """Build the table, a row a target."""
    table = Table("target", "inputs", "seconds", "slowest ms (CPU)", "peak memory + MB", "crashes", "what came of them")
    for tally in tallies:
        outcomes = ", ".join(f"{name} {count}" for name, count in tally.outcomes.most_common())
        numbers = (tally.num_inputs, f"{tally.seconds:.1f}", f"{tally.slowest_seconds * 1000:.0f}")
        table.add_row(tally.name, *map(str, numbers), f"{tally.grown_mb:.0f}", str(len(tally.crashes)), outcomes or "-")
    return table


def summary_of(tallies: list[Tally]) -> Mapping[str, Any]:
    """Build the JSON summary."""
    return {
        tally.name: {
            "inputs": tally.num_inputs,
            "crashes": len(tally.crashes),
            "seconds": round(tally.seconds, 1),
            "slowest_seconds": round(tally.slowest_seconds, 3),
            "grown_mb": round(tally.grown_mb, 1),
            "outcomes": dict(tally.outcomes.most_common()),
        }
        for tally in tallies
    }


def main() -> int:
    """Fuzz every target; the exit status is 1 where anything crashed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=100_000, help="messages through the decoder")
    parser.add_argument(
        "--others", type=int, default=50_000, help="orders, records, signatures and reference pictures each"
    )
    parser.add_argument("--adapters", type=int, default=5000, help="adapter files of each family")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--only", default="", help="the one target to fuzz")
    parser.add_argument("--from", type=int, default=0, dest="first", help="the number of the first input")
    options = parser.parse_args()

    warnings.filterwarnings("ignore", module="PIL")  # of odd EXIF data, which is what is asked for
    console, tallies = Console(width=200), []
    with tempfile.TemporaryDirectory() as folder:
        makers: dict[str, tuple[Callable[[], Target], int]] = {
            name: (lambda target=target: target, options.messages if name == "messages" else options.others)  # type: ignore[misc]
            for name, target in pure_targets().items()
        } | {
            f"adapters of {family}": (lambda family=family: adapter_target(Path(folder), family), options.adapters)  # type: ignore[misc]
            for family in ("sd", "sdxl", "z-image")
        }
        for name, (make, num_inputs) in makers.items():
            if options.only in ("", name):
                tallies.append(fuzz(make(), num_inputs, seed=options.seed, first=options.first))
                for crash in tallies[-1].crashes[:MAX_SHOWN_CRASHES]:
                    console.print(crash, markup=False)

    console.print(table_of(tallies))
    num_crashes = sum(len(tally.crashes) for tally in tallies)
    console.print(
        json.dumps({"seed": options.seed, "crashes": num_crashes, "targets": summary_of(tallies)}), soft_wrap=True
    )
    return 1 if num_crashes else 0


if __name__ == "__main__":
    raise SystemExit(main())
