"""The hostile inputs, class by class: what is published, what it finds in the store, and the answer it must get.

Nothing is published from here. Bodies hold placeholders, which `Variant.body_for` fills in. Every job that runs is the
plain one plus something strange, so that its picture must be the plain one's to the byte, or that of `same_as`.
"""

import io
import json
import os
import pickle
import random
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from PIL import Image

from tests.hostile.raw_properties import FROM_THE_FIELD
from tests.support.paths import DEMO_MODEL

# How the demo's adapters, in diffusers' new names, call a layer's two weights.
DOWN, UP = ".lora_A.weight", ".lora_B.weight"
ADAPTERS = DEMO_MODEL / "adapters"
# What every pickle among the inputs would make if anybody opened it.
CANARY_FOLDER = Path(tempfile.gettempdir()) / f"darkroom-canary-{os.getpid()}"

DEAD = "dead letter"  # no id to be trusted: nobody is told
RUNS = "a picture"
IGNORED = "ignored"  # an order to cancel that nobody understands

# Placeholders. ID stands where a JSON number is to be.
TASK, ID, BUCKET, STORE, CANARY = "<task>", "<id>", "<bucket>", "<store>", "<canary>"
OTHER_BUCKET = "hostile-other"
ABSENT = object()

PLAIN: dict[str, Any] = {"prompt": "a red fox", "seed": 7, "num_inference_steps": 2}
STYLED = {"lora_path": "models/neon.safetensors"}
Files = Mapping[str, Callable[[], bytes]]


@dataclass(frozen=True)
class Variant:
    """One message, the objects it names, and its answer: DEAD, RUNS, IGNORED or an error code."""

    answer: str
    body: bytes | Callable[[], bytes]
    files: Files = field(default_factory=dict)
    properties: Mapping[str, Any] = field(default_factory=dict)
    # Of a job that runs: the fields, beside the plain ones, of the one whose picture it must be. None: any picture.
    same_as: Mapping[str, Any] | None = None

    def body_for(self, values: Mapping[str, str]) -> bytes:
        """Fill in the placeholders; `values` by their names."""
        body = self.body if isinstance(self.body, bytes) else self.body()
        body = body.replace(f'"{ID}"'.encode(), values[ID].encode())
        for name, value in values.items():
            body = body.replace(name.encode(), value.encode())
        return body


@dataclass(frozen=True)
class HostileClass:
    """A row of the list. `note` says where the documentation differs from it, and holds."""

    number: int
    title: str
    variants: Mapping[str, Variant]
    note: str = ""

    @property
    def name(self) -> str:
        return f"H{self.number} {self.title}"


def message(**fields: Any) -> dict[str, Any]:
    """Build the plain job with these `data` fields; those that are ABSENT are left out."""
    held = {"generation_id": ID, **PLAIN, **fields}
    return {
        "task_id": TASK,
        "type": "image_generation",
        "data": {name: value for name, value in held.items() if value is not ABSENT},
    }


def to_bytes(body: Any) -> bytes:
    return body if isinstance(body, bytes) else json.dumps(body).encode()


def raw(name: str, literal: str) -> bytes:
    """Build the plain job with a field that only raw JSON can write."""
    return to_bytes(message(**{name: "<raw>"})).replace(b'"<raw>"', literal.encode())


def dead(body: Any, **properties: Any) -> Variant:
    return Variant(DEAD, body if callable(body) else to_bytes(body), properties=properties)


def failed(code: str, files: Files | None = None, **fields: Any) -> Variant:
    return Variant(code, to_bytes(message(**fields)), files or {})


def failed_body(code: str, body: Any, **properties: Any) -> Variant:
    """Build a failure of a message that is more than strange fields."""
    return Variant(code, to_bytes(body), properties=properties)


def runs(files: Files | None = None, *, same_as: Mapping[str, Any] | None = None, **fields: Any) -> Variant:
    """Build the plain job with these fields, which must change nothing, or make it the job with the fields
    `same_as`.
    """
    return Variant(RUNS, to_bytes(message(**fields)), files or {}, same_as=same_as or {})


def draws(files: Files | None = None, **fields: Any) -> Variant:
    """Build a job that runs and may give any image."""
    return Variant(RUNS, to_bytes(message(**fields)), files or {})


def runs_as(body: Any, **properties: Any) -> Variant:
    """Build the plain job in another wrapping."""
    return Variant(RUNS, to_bytes(body), properties=properties, same_as={})


def ignored(body: Any) -> Variant:
    return Variant(IGNORED, to_bytes(body))


def forbidden(*paths: str) -> dict[str, Variant]:
    """Build a job with each of the paths as an adapter's, in turns with a signature's."""
    names = ("lora_path", "signature_path")
    return {
        repr(path)[:50]: failed("INPUT_FORBIDDEN", **{names[number % 4 == 3]: path})
        for number, path in enumerate(paths)
    }


# --- objects in the store -------------------------------------------------------------------------------------------


class _Canary:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(CANARY_FOLDER),)


def pickled(protocol: int) -> bytes:
    return pickle.dumps({"unet.x": _Canary()}, protocol=protocol)


def torch_zip() -> bytes:
    """Write what torch.save writes, as far as torch.load reads."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("archive/data.pkl", pickled(2))
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
    return content.getvalue()


@cache
def demo_adapter(name: str = "neon") -> bytes:
    return (ADAPTERS / f"{name}.safetensors").read_bytes()


def _tensors() -> dict[str, Any]:
    return safetensors.numpy.load(demo_adapter())


def adapter_with(value: float) -> bytes:
    """Replace one weight of the demo's adapter."""
    tensors = {name: tensor.copy() for name, tensor in _tensors().items()}
    next(iter(tensors.values())).flat[0] = value
    return safetensors.numpy.save(tensors)


def adapter_of(a: tuple[int, ...], b: tuple[int, ...], stem: str = "", halves: str = "lora_A lora_B") -> bytes:
    """Write a small adapter of one layer, by default one that the demo model has."""
    stem = stem or next(name for name in _tensors() if name.endswith(DOWN)).removesuffix(DOWN)
    down, up = halves.split()
    zeros = {f"{stem}.{down}.weight": np.zeros(a, np.float32), f"{stem}.{up}.weight": np.zeros(b, np.float32)}
    return safetensors.numpy.save(zeros)


def with_header(header: Any, body: bytes = b"", *, length: int | None = None) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(*offsets: int, dtype: str = "F32", shape: tuple[int, ...] = (1, 1)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def peft_weights() -> bytes:
    """Write the demo's adapter with the tensor names of a PEFT folder."""
    tensors = {name.replace("unet.", "base_model.model.", 1): tensor for name, tensor in _tensors().items()}
    return safetensors.numpy.save(tensors)


def peft_config(**settings: Any) -> bytes:
    (rank,) = {tensor.shape[0] for name, tensor in _tensors().items() if name.endswith(DOWN)}
    return json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank} | settings).encode()


def folder(name: str, config: Callable[[], bytes], weights: Callable[[], bytes] = peft_weights) -> Files:
    return {f"hostile/{name}/adapter_config.json": config, f"hostile/{name}/adapter_model.safetensors": weights}


def weights_at(name: str, content: Callable[[], bytes]) -> Files:
    return {f"hostile/{name}.safetensors": content}


def damaged(name: str, content: Callable[[], bytes], code: str = "LORA_INVALID") -> Variant:
    """Build a job with this file for an adapter."""
    return failed(code, weights_at(name, content), lora_path=f"hostile/{name}.safetensors")


def settings(name: str, code: str = "LORA_INVALID", **held: Any) -> Variant:
    """Build a job whose adapter is good but for its settings."""
    return failed(code, folder(name, lambda: peft_config(**held)), lora_path=f"hostile/{name}/")


def image(kind: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (64, 32), **options: Any) -> bytes:
    content = io.BytesIO()
    Image.new(mode, size, "red" if mode in ("RGB", "RGBA") else 100).save(content, kind, **options)
    return content.getvalue()


def noise(kind: str) -> bytes:
    content = io.BytesIO()
    Image.frombytes("RGB", (100, 80), random.Random(0).randbytes(24_000)).save(content, kind)
    return content.getvalue()


def animated(kind: str) -> bytes:
    content = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green")]
    frames[0].save(content, kind, save_all=True, append_images=frames[1:])
    return content.getvalue()


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    """Write a PNG by hand, checksums right."""
    parts = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def png_of(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    header = b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    return png(header, *chunks, (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b""))


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return image("JPEG", exif=exif)


def signed(name: str, content: Callable[[], bytes], code: str = "SIGNATURE_INVALID") -> Variant:
    """Build a job with this file for a signature."""
    path = f"hostile/{name}.png"
    return failed(code, {path: content}, signature_path=path)


def signs(name: str, content: Callable[[], bytes]) -> Variant:
    """Build a job with this file for a signature, which is unusual and right."""
    path = f"hostile/{name}.png"
    return draws({path: content}, signature_path=path)


# --- the list -------------------------------------------------------------------------------------------------------

HEADERS_10000 = {f"h{number}": number for number in range(10_000)}
FORGED_DEATHS = [{"count": 999, "reason": "expired", "queue": "image_generation", "exchange": ""}] * 100
ENDLESS = "((((" * 25_000

CLASSES = (
    HostileClass(
        1,
        "no JSON in UTF-8",
        {
            "empty": dead(b""),
            "latin-1": dead(b'{"data": {"generation_id": 5, "prompt": "caf\xe9"}}'),
            "two objects": dead(b"{}{}"),
            "text": dead(b"a red fox"),
            "cut off": dead(to_bytes(message())[:-9]),
            "a comma too many": dead(b'{"data": {"generation_id": 5, "prompt": "a",}}'),
        },
    ),
    HostileClass(
        2,
        "nesting",
        {
            "lists": dead(b"[" * 100_000),
            "objects with an id": dead(raw("deep", '{"a":' * 20_000 + "1" + "}" * 20_000)),
            "objects": dead(b'{"a":' * 40_000),
            "closed lists": dead(b"[" * 100_000 + b"]" * 100_000),
            "a deep prompt": dead(raw("prompt", "[" * 50_000 + "]" * 50_000)),
        },
    ),
    HostileClass(
        3,
        "JSON that is no object",
        {"text": dead(b'"str"'), "list": dead(b"[]"), "null": dead(b"null"), "5": dead(b"5"), "true": dead(b"true")},
    ),
    HostileClass(
        4,
        "endless integers",
        {
            "5000 digits": dead(raw("generation_id", "9" * 5000)),
            "a seed of 4000": failed_body("INVALID_INPUT", raw("seed", "9" * 4000)),
            "4000 digits": dead(raw("generation_id", "9" * 4000)),
            "a seed of 5000": dead(raw("seed", "9" * 5000)),
            "steps of 4000": failed_body("INVALID_INPUT", raw("num_inference_steps", "9" * 4000)),
        },
    ),
    HostileClass(
        5,
        "numbers that are none",
        {
            "NaN": failed_body("INVALID_INPUT", raw("guidance_scale", "NaN")),
            "1e400": failed_body("INVALID_INPUT", raw("guidance_scale", "1e400")),
            "an infinite scale": failed_body("INVALID_INPUT", raw("lora_scale", "-Infinity")),
            "a nested one": failed_body("INVALID_INPUT", raw("parameters", '{"cfg_scale": Infinity}')),
            "as seed": failed_body("INVALID_INPUT", raw("seed", "NaN")),
            "as id": dead(raw("generation_id", "Infinity")),
        },
        note="one in a field that nobody reads is ignored with its field",
    ),
    HostileClass(
        6,
        "repeated keys",
        {
            "id": dead(b'{"data": {"generation_id": 1, "generation_id": 2, "prompt": "a"}}'),
            "escaped": dead(raw("unknown", '{"a": 1, "\\u0061": 2}')),
            "data": dead(b'{"data": {"generation_id": 1, "prompt": "a"}, "data": {}}'),
            "nested": dead(raw("parameters", '{"steps": 1, "steps": 2}')),
            "task_id": dead(b'{"task_id": "a", "task_id": "b", "data": {"generation_id": 1, "prompt": "a"}}'),
        },
    ),
    HostileClass(
        7,
        "size",
        {
            "11 MB of objects": dead(lambda: b"[" + b"{}," * 3_600_000 + b"{}]"),
            "blanks behind a job": Variant("INVALID_INPUT", lambda: to_bytes(message()) + b" " * 256 * 1024),
            "blanks": dead(lambda: b" " * 300_000),
            "a field of 1 MB": Variant("INVALID_INPUT", lambda: to_bytes(message(unknown="x" * 1_000_000))),
            "128 MB": dead(lambda: b"[" + b"{}," * 42_666_000 + b"{}]"),
        },
    ),
    HostileClass(
        8,
        "other encodings",
        {
            "BOM": runs_as(b"\xef\xbb\xbf" + to_bytes(message())),
            "UTF-16": dead(to_bytes(message()).decode().encode("utf-16")),
            "UTF-16 without BOM": dead(to_bytes(message()).decode().encode("utf-16-le")),
            "UTF-32": dead(to_bytes(message()).decode().encode("utf-32")),
            "surrogates in UTF-8": dead(b'{"data": {"generation_id": 1, "prompt": "\xed\xa0\x80"}}'),
            "overlong": dead(b'{"data": {"generation_id": 1, "prompt": "\xc0\x80"}}'),
        },
    ),
    HostileClass(
        9,
        "other types",
        {
            "training": dead({"task_id": TASK, "type": "model_training", "data": {"style_id": 1, "images": []}}),
            "null": dead(message() | {"type": None}),
            "training with an id": dead(message() | {"type": "training"}),
            "a forged line": dead(message() | {"type": "\r\n[CRITICAL] fake"}),
            "100 kB": dead(message() | {"type": "x" * 100_000}),
            "list": dead(message() | {"type": ["image_generation"]}),
        },
    ),
    HostileClass(
        10,
        "task_id",
        {
            "a path": runs_as(message() | {"task_id": "../../x"}),
            "a header": runs_as(message() | {"task_id": "id\r\nX-Evil: 1"}),
            "missing": runs_as({name: value for name, value in message().items() if name != "task_id"}),
            "no UUID": runs_as(message() | {"task_id": "job-5"}),
            "200 kB": runs_as(message() | {"task_id": "x" * 200_000}),
            "surrogates": runs_as(message() | {"task_id": "\ud800" * 32}),
        },
        note="1 MB is over the body's 256 kB",
    ),
    HostileClass(
        11,
        "generation_id",
        {
            "true": dead(message(generation_id=True)),
            "text": dead(message(generation_id="a/5")),
            **{repr(value): dead(message(generation_id=value)) for value in (5.0, 0, -1, 2**63, None, [5], {})},
            "missing": dead(message(generation_id=ABSENT)),
            "wrong inside, right outside": dead(message(generation_id="../5") | {"generation_id": 5}),
        },
    ),
    HostileClass(
        12,
        "data",
        {
            "missing": failed_body("INVALID_INPUT", {"task_id": TASK, "generation_id": ID}),
            "unknown fields": runs(brush="oil", __class__="Job", deep=[[[{}]]] * 100),
            "list": failed_body("INVALID_INPUT", {"task_id": TASK, "generation_id": ID, "data": []}),
            "text": failed_body("INVALID_INPUT", {"task_id": TASK, "generation_id": ID, "data": "prompt"}),
            "steps in text": failed("INVALID_INPUT", num_inference_steps="50"),
            "true for a number": failed("INVALID_INPUT", num_images=True),
            "parameters in a list": failed("INVALID_INPUT", parameters=[]),
            "a list of adapters' names": failed("INVALID_INPUT", loras=["a.safetensors"]),
            "unknown parameters": runs(parameters={"strange": 1, "\ud800": 1}, signature_config={"font": "x"}),
        },
        note="unknown fields are ignored, counted and told back by name",
    ),
    HostileClass(
        13,
        "prompt",
        {
            "5000 characters": failed("INVALID_PROMPT", prompt="x" * 5000),
            "only blanks": failed("INVALID_PROMPT", prompt="\t\r\n\u2003\u3000"),
            "none": failed("INVALID_PROMPT", prompt=ABSENT),
            "empty": failed("INVALID_PROMPT", prompt=""),
            "a number": failed("INVALID_PROMPT", prompt=5),
            "10 MB": Variant("INVALID_INPUT", lambda: to_bytes(message(prompt="x" * 10_000_000))),
            "far beyond 77 tokens": draws(prompt="a red fox in the snow, " * 40),
        },
        note="10 MB is over the body's 256 kB, of which the ids are read; beyond 77 tokens nothing is truncated, it is "
        "read in chunks (compel)",
    ),
    HostileClass(
        14,
        "text that is none, or only looks odd",
        {
            "NUL": failed("INVALID_PROMPT", prompt="a\0b"),
            "a forged line": draws(prompt="cat\r\n[CRITICAL] fake\x1b[31mred\x1b[0m"),
            "half a surrogate pair": failed("INVALID_PROMPT", prompt="a\ud800b"),
            "NUL in a tag": failed("INVALID_INPUT", prompt_tags=["sun\0set"]),
            "NUL in the negative": failed("INVALID_PROMPT", negative_prompt="a\0b"),
            "right to left": draws(prompt="\u202eevil \u200f prompt"),
            "zalgo": draws(prompt="z\u0351\u036b\u0343a\u0329l\u0321g\u0338o"),
        },
    ),
    HostileClass(
        15,
        "weights and templates",
        {
            "100000 parentheses": failed("INVALID_PROMPT", prompt=ENDLESS),
            "templates": draws(prompt="{{a|b}} {% for x in y %} ${HOME} `id` %s {0}"),
            "nested weights": draws(prompt="((((a:1.3))))" * 300),
            "4000 parentheses": draws(prompt=ENDLESS[:4000]),
            "weights beyond numbers": draws(prompt="(a:1e999) (b:nan) (c:-1)"),
            "many templates": failed("INVALID_PROMPT", prompt="{{a|b}}" * 20_000),
        },
    ),
    HostileClass(
        16,
        "aspect_ratio",
        {
            "9999:1": failed("UNSUPPORTED_ASPECT_RATIO", aspect_ratio="9999:1"),
            "null": runs(aspect_ratio=None),
            "a line end": failed("UNSUPPORTED_ASPECT_RATIO", aspect_ratio="1:1\n"),
            "a number": failed("UNSUPPORTED_ASPECT_RATIO", aspect_ratio=1),
            "zero": failed("UNSUPPORTED_ASPECT_RATIO", aspect_ratio="0:0"),
            "Arabic digits": failed("UNSUPPORTED_ASPECT_RATIO", aspect_ratio="1\u0660:1\u0660"),
            "3:2": draws(aspect_ratio="3:2"),
        },
        note="null is not given; any W:H of up to 4 to 1 is drawn, not only the four named ones",
    ),
    HostileClass(
        17,
        "work",
        {
            "10^9 steps": failed("INVALID_INPUT", num_inference_steps=10**9),
            "65536 px": failed("INVALID_INPUT", width=64, height=65_536),
            "1e400 steps": failed_body("INVALID_INPUT", raw("num_inference_steps", "1e400")),
            "no steps": failed("INVALID_INPUT", parameters={"steps": 0}),
            "10^6 images": failed("INVALID_INPUT", num_images=10**6),
            "-1 steps": failed("INVALID_INPUT", num_inference_steps=-1),
            "5000 adapters": failed("INVALID_INPUT", loras=[{"path": "a.safetensors"}] * 5000),
        },
    ),
    HostileClass(
        18,
        "seed",
        {
            "-2": failed("INVALID_INPUT", seed=-2),
            "-1": draws(seed=-1),
            "in text": runs(seed="7"),
            "null": draws(seed=None),
            "2^64": failed("INVALID_INPUT", seed=2**64),
            "text": failed("INVALID_INPUT", seed="x"),
            "2^63": failed("INVALID_INPUT", parameters={"seed": 2**63}),
            "true": failed("INVALID_INPUT", seed=True),
        },
    ),
    HostileClass(
        19,
        "URLs to call",
        {
            url: runs_as(message() | {"webhook_url": url, "callback_url": url})
            for url in (
                f"http://127.0.0.1:{CANARY}/",
                f"http://2130706433:{CANARY}/",
                "http://169.254.169.254/latest/meta-data",
                f"http://127.1:{CANARY}/",
                f"http://0x7f.1:{CANARY}/",
                f"http://[::ffff:127.0.0.1]:{CANARY}/",
                "file:///etc/passwd",
                f"http://good@127.0.0.1:{CANARY}/",
            )
        },
    ),
    HostileClass(
        20,
        "URLs that parsers read differently",
        {
            **{
                url: runs_as(message() | {"webhook_url": url, "callback_url": url})
                for url in (
                    f"http://127.0.0.1:{CANARY}\\@good.example/",
                    f"http://good.example\\@127.0.0.1:{CANARY}/",
                    f"//127.0.0.1:{CANARY}/",
                )
            },
            "as an adapter": failed("INPUT_FORBIDDEN", lora_path=f"http://127.0.0.1:{CANARY}\\@<store>/<bucket>/a"),
            "as a signature": failed(
                "INPUT_FORBIDDEN", signature_path=f"http://127.0.0.1:{CANARY}#@<store>/<bucket>/a"
            ),
        },
    ),
    HostileClass(
        21,
        "local paths",
        forbidden(
            *("/etc/passwd", f"file://{CANARY_FOLDER}-pickles", "..", "/proc/self/environ", "\\\\x", "~/.ssh/id_rsa"),
            *(f"{CANARY_FOLDER}-pickles", "C:\\a"),
        ),
    ),
    HostileClass(
        22,
        "other buckets and hosts",
        forbidden(
            *(f"s3://{OTHER_BUCKET}/a.safetensors", f"http://127.0.0.1:{CANARY}/<bucket>/a.safetensors"),
            *("https://evil.example/a", f"http://<store>@127.0.0.1:{CANARY}/<bucket>/a.png", "gs://<bucket>@evil/a"),
            *(
                "s3://Media/a.safetensors",
                "http://169.254.169.254/latest/meta-data",
                f"http://<store>/{OTHER_BUCKET}/a",
            ),
            *("http://<store>.evil.example/<bucket>/a", "ftp://<store>/<bucket>/a"),
        ),
    ),
    HostileClass(
        23,
        "keys",
        forbidden(
            *("../../other/secret", f"s3://<bucket>/../{OTHER_BUCKET}/a", "http://<store>/<bucket>/%2e%2e/a"),
            *("http://<store>/<bucket>/%252e%252e/a", "s3://<bucket>/%2e%2e/a", "a//b", "s3://<bucket>/", "a\0b"),
            *("a\r\nHost: evil", "a" * 1025, "한" * 400, "s3://<bucket>"),
        ),
    ),
    HostileClass(
        24,
        "ARNs for buckets",
        forbidden(
            "s3://arn:aws:s3:us-east-1:123456789012:accesspoint/x/a.safetensors",
            "arn:aws:s3:::<bucket>/a.safetensors",
            "gs://arn:aws:s3-outposts:us-east-1:1:outpost/op-1/accesspoint/ap/a",
            f"s3://arn:aws:s3:127.0.0.1:{CANARY}:a/b.png",
            "s3://arn:aws:s3-object-lambda:us-east-1:1:accesspoint/x/a",
        ),
    ),
    HostileClass(
        25,
        "what else lies in an adapter's folder",
        {
            "odd names only": failed(
                "LORA_NOT_FOUND",
                {
                    "hostile/odd/%2e%2e%2fadapter_config.json": peft_config,
                    "hostile/odd/..adapter_model.safetensors": peft_weights,
                },
                lora_path="hostile/odd/",
            ),
            "50 others": runs(
                {
                    **folder("full", peft_config),
                    **{f"hostile/full/{number}.safetensors": lambda: b"x" for number in range(50)},
                },
                lora_path="hostile/full/",
                same_as=STYLED,
            ),
            "another name": failed(
                "LORA_NOT_FOUND",
                {"hostile/named/pytorch_lora_weights.safetensors": demo_adapter},
                lora_path="hostile/named",
            ),
            "folders of their names": failed(
                "LORA_NOT_FOUND",
                {
                    "hostile/deep/adapter_config.json/x": peft_config,
                    "hostile/deep/adapter_model.safetensors/x": peft_weights,
                },
                lora_path="hostile/deep/",
            ),
            "a folder further down": failed(
                "LORA_NOT_FOUND", folder("down/checkpoint-500", peft_config), lora_path="hostile/down/"
            ),
        },
        note="two objects are asked for by their names, nothing is listed: LORA_NOT_FOUND where they are missing. "
        "50 objects here for a million",
    ),
    HostileClass(
        26,
        "names that begin like others",
        {
            "style-2 beside style-20": runs(
                folder("style-2", peft_config) | folder("style-20", lambda: b"{"),
                lora_path="hostile/style-2",
                same_as=STYLED,
            ),
            "style-1 where style-10 is": failed(
                "LORA_NOT_FOUND", folder("style-10", peft_config), lora_path="hostile/style-1"
            ),
            "style-1/ where style-10 is": failed(
                "LORA_NOT_FOUND", folder("style-10", peft_config), lora_path="hostile/style-1/"
            ),
            "a file beside its copy": runs(
                weights_at("a", demo_adapter) | {"hostile/a.safetensors.bak": lambda: b"x"},
                lora_path="hostile/a.safetensors",
                same_as=STYLED,
            ),
            "weights inside their folder": runs(
                folder("inside", peft_config),
                lora_path="hostile/inside/adapter_model.safetensors",
                same_as=STYLED,
            ),
            "a file beside a folder of its name": runs(
                weights_at("b", demo_adapter) | folder("b", lambda: b"{"),
                lora_path="hostile/b.safetensors",
                same_as=STYLED,
            ),
        },
    ),
    HostileClass(
        27,
        "pickles",
        {
            "a zip by torch": damaged("zip", torch_zip, "LORA_UNSAFE_FORMAT"),
            "protocol 4": damaged("pickle4", lambda: pickled(4), "LORA_UNSAFE_FORMAT"),
            "a folder with a pickle alone": failed(
                "LORA_UNSAFE_FORMAT",
                {"hostile/bin/adapter_config.json": peft_config, "hostile/bin/adapter_model.bin": torch_zip},
                lora_path="hostile/bin/",
            ),
            "protocol 2": damaged("pickle2", lambda: pickled(2), "LORA_UNSAFE_FORMAT"),
            "in a folder, by the right name": failed(
                "LORA_UNSAFE_FORMAT", folder("disguised", peft_config, torch_zip), lora_path="hostile/disguised/"
            ),
            **{
                suffix: failed("LORA_UNSAFE_FORMAT", {f"hostile/a{suffix}": torch_zip}, lora_path=f"hostile/a{suffix}")
                for suffix in (".bin", ".pt", ".CKPT", ".pkl")
            },
            "an unpickled text": damaged("pickle0", lambda: pickled(0)),
        },
        note="a pickle of protocol 0 that begins with a container is text like any other, so it is just invalid",
    ),
    HostileClass(
        28,
        "safetensors",
        {
            "empty": damaged("empty", lambda: b""),
            "repeated name": damaged("repeated", lambda: with_header('{"a.lora_A.weight":{},"a.lora_A.weight":{}}')),
            "length 2^63": damaged("endless", lambda: with_header("{}", length=2**63)),
            "length beyond the file": damaged("beyond", lambda: with_header("{}", length=999_999)),
            "overlap": damaged(
                "overlap",
                lambda: with_header({"x.lora_A.weight": entry(0, 4), "x.lora_B.weight": entry(0, 4)}, bytes(4)),
            ),
            "hole": damaged(
                "hole",
                lambda: with_header({"x.lora_A.weight": entry(0, 4), "x.lora_B.weight": entry(8, 12)}, bytes(12)),
            ),
            "trailing bytes": damaged("trailing", lambda: demo_adapter() + b"\0"),
            "cut off": damaged("cut", lambda: demo_adapter()[:-1]),
            "shape beyond numbers": damaged(
                "shape", lambda: with_header({"x.lora_A.weight": entry(0, 4, shape=(2**62, 8))}, bytes(4))
            ),
            "unknown dtype": damaged(
                "dtype", lambda: with_header({"x.lora_A.weight": entry(0, 4, dtype="Q9")}, bytes(4))
            ),
            "an error that quotes 100 kB": damaged(
                "quoted", lambda: with_header({"x.lora_A.weight": entry() | {"data_offsets": "a" * 100_000}})
            ),
            "nested": damaged("nested", lambda: with_header('{"x":' + "[" * 400_000)),
            "100000 tensors": damaged(
                "many", lambda: with_header({f"x{i}.lora_A.weight": entry(0, 0, shape=(0,)) for i in range(100_000)})
            ),
            "a header of 99 MB": damaged("long", lambda: with_header('{"x":"' + "a" * 99_000_000 + '"}')),
        },
        note="headers up to 4 MB are read, not 1 MB: training scripts write the tags of all their pictures there",
    ),
    HostileClass(
        29,
        "large objects",
        {
            "a signature": failed(
                "INPUT_TOO_LARGE",
                {"hostile/large.png": lambda: image() + bytes(10_000_000)},
                signature_path="hostile/large.png",
            ),
            "settings": failed(
                "INPUT_TOO_LARGE",
                folder("large", lambda: peft_config(target_modules=["to_q"] * 20_000)),
                lora_path="hostile/large/",
            ),
            "a signature of 20 MB": signed("20mb", lambda: bytes(20_000_000), "INPUT_TOO_LARGE"),
            "settings of 10 MB": failed(
                "INPUT_TOO_LARGE", folder("huge", lambda: bytes(10_000_000)), lora_path="hostile/huge/"
            ),
            "an adapter over 1 GB": damaged("gigabyte", lambda: bytes(1_000_000_001), "INPUT_TOO_LARGE"),
        },
        note="the cap is 1 GB; wrong sizes are tested in tests/clients/storage/test_client.py",
    ),
    HostileClass(
        30,
        "adapters of others",
        {
            "another width": damaged("width", lambda: adapter_of((4, 1280), (1280, 4)), "LORA_INCOMPATIBLE"),
            "NaN": damaged("nan", lambda: adapter_with(float("nan"))),
            "infinite": damaged("infinite", lambda: adapter_with(float("inf"))),
            "rank 10000": damaged("rank", lambda: adapter_of((10_000, 4), (4, 10_000))),
            "SDXL": damaged(
                "sdxl",
                lambda: adapter_of(
                    *((4, 640), (640, 4)),
                    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
                    "lora_down lora_up",
                ),
                "LORA_INCOMPATIBLE",
            ),
            "Z-Image": damaged(
                "zimage",
                lambda: adapter_of((4, 64), (64, 4), "diffusion_model.layers.0.attention.to_q"),
                "LORA_INCOMPATIBLE",
            ),
            "a layer that is not there": damaged(
                "nowhere", lambda: adapter_of((4, 64), (64, 4), "unet.down_blocks.9.to_q"), "LORA_INCOMPATIBLE"
            ),
        },
    ),
    HostileClass(
        31,
        "an adapter's settings",
        {
            "r of a million": settings("million", r=10**6),
            "names to import and to call": runs(
                folder(
                    "imports",
                    lambda: peft_config(
                        target_modules="(a+)+$",
                        auto_mapping={"parent_library": "antigravity", "base_model_class": "x"},
                        base_model_name_or_path="http://127.0.0.1:9/model",
                    ),
                ),
                lora_path="hostile/imports/",
                same_as=STYLED,
            ),
            "an evil expression": settings("expression", rank_pattern={"(a+)+$": 4}),
            "nesting": failed(
                "LORA_INVALID", folder("nesting", lambda: b'{"r":' + b"[" * 60_000), lora_path="hostile/nesting/"
            ),
            "r in text": settings("text", r="8"),
            "alpha beyond numbers": settings("alpha", lora_alpha=10**400),
            "another method": settings("dora", "LORA_UNSUPPORTED", use_dora=True),
            "a changed base": settings("pissa", "LORA_UNSUPPORTED", init_lora_weights="pissa_niter_4"),
            "no object": failed("LORA_INVALID", folder("list", lambda: b"[]"), lora_path="hostile/list/"),
        },
        note="settings that only concern training are never evaluated, whatever they hold; 10 MB is H29",
    ),
    HostileClass(
        32,
        "large pictures for signatures",
        {
            "65535 px by the header": signed("65535", lambda: png_of(65535, 65535)),
            "9000 px": signed("9000", lambda: image(mode="1", size=(9000, 9000))),
            "12000 px": signed("12000", lambda: image(mode="1", size=(12_000, 12_000))),
            "14000 px": signed("14000", lambda: image(mode="1", size=(14_000, 14_000))),
            "one long side": signed("side", lambda: image(mode="1", size=(4097, 1))),
        },
    ),
    HostileClass(
        33,
        "other files for signatures",
        {
            "EPS": signed("eps", lambda: noise("EPS")),
            "CMYK": signs("cmyk", lambda: image("JPEG", "CMYK")),
            "a web page": signed("page", lambda: b"<html><body>403 Forbidden</body></html>"),
            "SVG": signed("svg", lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>'),
            "half a TIFF": signed("tiff", lambda: noise("TIFF")[:2000]),
            "TIFF": signs("whole-tiff", lambda: noise("TIFF")),
            "TIFF of two pages": signed("pages", lambda: animated("TIFF")),
            "PSD": signed("psd", lambda: b"8BPS\0\x01" + bytes(40)),
            "animated GIF": signed("gif", lambda: animated("GIF")),
            "animated WebP": signed("webp", lambda: animated("WEBP")),
            "animated PNG": signed("apng", lambda: animated("PNG")),
            "16 bits": signs("16bit", lambda: image(mode="I;16")),
            "turned by EXIF": signs("turned", turned),
            "a text bomb": signed(
                "ztxt", lambda: png_of(4, 4, (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(50_000_000))))
            ),
            "a profile bomb": signed(
                "iccp", lambda: png_of(4, 4, (b"iCCP", b"icc\0\0" + zlib.compress(bytes(50_000_000))))
            ),
            "cut off": signed("truncated", lambda: noise("PNG")[:9000]),
            "broken EXIF": signs("exif", lambda: turned().replace(b"MM\0*", b"MM\0*\xff", 1)),
        },
    ),
    HostileClass(
        34,
        "signature_config",
        {
            "opacity 2": failed("INVALID_INPUT", signature_config={"opacity": 2}),
            "position __class__": failed("INVALID_INPUT", signature_config={"position": "__class__"}),
            "opacity NaN": failed_body("INVALID_INPUT", raw("signature_config", '{"opacity": NaN}')),
            "opacity in text": failed("INVALID_INPUT", signature_config={"opacity": "0.7"}),
            "size null": runs(signature_config={"size": None}),
            "text": failed("INVALID_INPUT", signature_config="bottom-right"),
        },
    ),
    HostileClass(
        35,
        "orders to cancel",
        {
            "empty": ignored(b""),
            "a huge id": ignored(b'{"generation_id": 9223372036854775808}'),
            "nesting": ignored(b"[" * 4000),
            "1 MB": ignored(b" " * 1_000_000),
            "a path": ignored({"task_id": "../../x\r\n[CRITICAL] fake"}),
            "4000 digits": ignored(b'{"generation_id": ' + b"9" * 4000 + b"}"),
        },
        note="the list has no H35; this is what it says nothing of",
    ),
    HostileClass(
        36,
        "headers and properties",
        {
            "10000 headers": runs_as(message(), headers=HEADERS_10000),
            "forged tries of a job that fails": failed_body(
                "INVALID_INPUT", message(seed=-2), headers={"x-darkroom-attempt": 2**53 - 1}
            ),
            "forged tries": runs_as(
                message(), headers={"x-death": FORGED_DEATHS, "x-delivery-count": 999, "x-darkroom-attempt": 999}
            ),
            "gzip": dead(zlib.compress(bytes(50_000_000), wbits=31), content_encoding="gzip"),
            "said to be gzip": runs_as(message(), content_encoding="gzip", content_type="application/x-evil"),
            "transient with a priority": runs_as(
                message(), delivery_mode=1, priority=255, expiration="60000", reply_to="evil", correlation_id="../x"
            ),
            **{name: runs_as(message(), raw=encoded) for name, encoded in FROM_THE_FIELD.items()},
            "headers of other kinds": runs_as(
                message(), headers={"x-darkroom-attempt": "9", "x-darkroom-since": -1, "x-darkroom-reason": ["\r\n"]}
            ),
        },
    ),
)
