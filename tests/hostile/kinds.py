"""The hostile inputs of the fields beyond text to image: pictures, places, numbers, headlines, presets."""

import io
import zlib
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

from PIL import Image

from tests.hostile.inputs import (
    BUCKET,
    CANARY,
    OTHER_BUCKET,
    STORE,
    HostileClass,
    Variant,
    animated,
    dead,
    draws,
    failed,
    failed_body,
    image,
    noise,
    png_of,
    raw,
    runs,
)

INIT: dict[str, Any] = {"kind": "image2image", "init_image_path": "hostile/init.png", "strength": 0.5}
MASKED = INIT | {"kind": "inpaint", "mask_path": "hostile/mask.png"}
CONTROL: dict[str, Any] = {"image_path": "hostile/init.png", "model": "edges"}
EDIT: dict[str, Any] = {"kind": "edit", "references": [{"image_path": "hostile/init.png"}]}
PRODUCT: dict[str, Any] = {"cutout_path": "hostile/cut.png"}
GOOD = {"hostile/init.png": image}


def job_naming(field: str, path: str) -> dict[str, Any]:
    """Build the fields of a job that has `path` in one field, right but for that."""
    outer, _, inner = field.partition(".")
    if outer == "control":
        return {"control": CONTROL | {inner: path}}
    if outer == "references":
        return {"kind": "edit", "references": [{inner: path}]}
    if outer == "product":
        return {"kind": "product", "product": PRODUCT | {inner: path}}
    return MASKED | {field: path}


PLACES = (
    *("init_image_path", "mask_path", "control.image_path", "product.image_path", "product.cutout_path"),
    *("product.background_image_path", "product.composite_path", "references.image_path"),
)
TRICKS = (
    *(f"s3://{OTHER_BUCKET}/a.png", "../../other/secret.png", "file:///etc/passwd", f"http://127.0.0.1:{CANARY}/a.png"),
    *("arn:aws:s3:::<bucket>/a.png", "/proc/self/environ", f"http://{STORE}/{BUCKET}/%2e%2e/a", "a\0b.png", "a//b"),
    *(f"http://{STORE}@127.0.0.1:{CANARY}/{BUCKET}/a.png", "http://169.254.169.254/latest", "data:image/png;base64,AA"),
    *(f"s3://arn:aws:s3:127.0.0.1:{CANARY}:a/b.png", "C:\\a.png", "a\r\nHost: evil", "\u202egnp.a\x1b[31m"),
)


def tricked() -> Iterator[tuple[str, Variant]]:
    """Build every trick in every place, neighbours of different tricks."""
    for turn, (number, field) in product(range(len(TRICKS)), enumerate(PLACES)):
        path = TRICKS[(turn + number) % len(TRICKS)]
        yield f"{field} {path!r}", failed("INPUT_FORBIDDEN", **job_naming(field, path))


def drawn_from(name: str, content: Callable[[], bytes], code: str = "IMAGE_INVALID") -> Variant:
    """Build a job with this file for the source image."""
    path = f"hostile/{name}"
    return failed(code, {path: content}, **INIT | {"init_image_path": path})


def draws_from(name: str, content: Callable[[], bytes]) -> Variant:
    """Build a job with this file for the source image, which is unusual and right."""
    path = f"hostile/{name}"
    return draws({path: content}, **INIT | {"init_image_path": path, "width": 64, "height": 64})


def masked_by(name: str, content: Callable[[], bytes], code: str = "IMAGE_INVALID") -> Variant:
    """Build a job with this file for its mask."""
    path = f"hostile/{name}"
    return failed(code, GOOD | {path: content}, **MASKED | {"mask_path": path})


def composed_of(name: str, content: Callable[[], bytes], field: str, code: str = "IMAGE_INVALID") -> Variant:
    """Build a job with this file for one of a product's images."""
    path = f"hostile/{name}"
    files = {"hostile/cut.png": cut, path: content}
    return failed(code, files, kind="product", product=PRODUCT | {field: path})


def cut() -> bytes:
    """Draw a red square with transparent sides."""
    content = io.BytesIO()
    square = Image.new("RGBA", (64, 64))
    square.paste("red", (16, 16, 48, 48))
    square.save(content, "PNG")
    return content.getvalue()


def camera_jpeg() -> bytes:
    """Write a JPEG with a smaller one behind it."""
    content = io.BytesIO()
    preview = Image.new("RGB", (16, 16), "blue")
    Image.new("RGB", (64, 64), "red").save(content, "MPO", save_all=True, append_images=[preview])
    return content.getvalue()


def nothing() -> bytes:
    """Draw an image all of which is transparent."""
    content = io.BytesIO()
    Image.new("RGBA", (64, 64)).save(content, "PNG")
    return content.getvalue()


def headed(text: Any, code: str = "INVALID_INPUT", **fields: Any) -> Variant:
    """Build a job with this headline, which is refused."""
    return failed(code, text_overlay={"text": text, **fields})


def number_in(field: str, literal: str) -> Variant:
    """Build a job with a number that only raw JSON can write in a field of an object, or of one in it."""
    outer, *inner = field.split(".")
    whole = literal
    for name in reversed(inner):
        whole = f'{{"{name}": {whole}, "text": "a", "image_path": "hostile/init.png", "model": "edges"}}'
    return failed_body("INVALID_INPUT", raw(outer, whole))


NUMBERS = (
    *("text_overlay.box.opacity", "product.layout.scale", "strength", "control.scale", "control.start", "control.end"),
    *("product.shadow", "product.refine_strength", "text_overlay.size", "text_overlay.stroke.width"),
)
NO_NUMBERS = ("NaN", "1e400", "-Infinity", "true", '"0.5"', "9" * 4000, "[0.5]", "-1", "1e308")
LONG = "x" * 100_000

KIND_CLASSES = (
    HostileClass(37, "places of pictures", dict(tricked())),
    HostileClass(
        38,
        "numbers of the kinds",
        {f"{field} {literal[:20]}": number_in(field, literal) for literal, field in product(NO_NUMBERS, NUMBERS)},
    ),
    HostileClass(
        39,
        "nesting and size of the kinds",
        {
            "deep control": dead(raw("control", '{"a":' * 20_000 + "1" + "}" * 20_000)),
            "10^4 headlines": failed("INVALID_INPUT", text_overlay=[{"text": "a"}] * 10_000),
            "headlines in headlines": failed_body("INVALID_INPUT", raw("text_overlay", "[" * 500 + "]" * 500)),
            "a deep box": failed_body(
                "INVALID_INPUT", raw("text_overlay", '{"text":"a","box":' + '{"color":' * 400 + "1" + "}" * 401)
            ),
            "product in a list": failed("INVALID_INPUT", kind="product", product=[PRODUCT]),
            "a text for control": failed("INVALID_INPUT", control="edges"),
            "a repeated key": dead(raw("product", '{"cutout_path": "a", "cutout_path": "b"}')),
            "10^4 unknown names": runs(product_=dict.fromkeys(map(str, range(10_000)), 1), layout={"scale": -1}),
            **{
                f"10^5 characters in {field}": failed("INVALID_INPUT", **{field: LONG})
                for field in ("init_image_path", "mask_path", "style", "industry", "kind", "fit", "strength")
            },
            **{
                f"10^5 characters in control.{field}": failed("INVALID_INPUT", control=CONTROL | {field: LONG})
                for field in ("image_path", "model", "preprocess")
            },
            **{
                f"10^5 characters in text_overlay.{field}": headed(**{"text": "a", field: LONG})
                for field in ("text", "font", "size", "color", "position")
            },
            "10^5 characters in layout": failed(
                "INVALID_INPUT", kind="product", product=PRODUCT | {"layout": {"position": LONG}}
            ),
        },
    ),
    HostileClass(
        40,
        "words that choose",
        {
            "a style of Python": failed("INVALID_INPUT", style="__class__"),
            "a kind with a line end": failed("INVALID_INPUT", kind="inpaint\n"),
            "an industry that is a path": failed("INVALID_INPUT", industry="../../etc/passwd"),
            "a forged style": failed("INVALID_INPUT", style="anime\r\n[CRITICAL] fake\x1b[31m"),
            "NUL in a style": failed("INVALID_INPUT", style="anime\0"),
            "a capital kind": failed("INVALID_INPUT", kind="PRODUCT"),
            "a model that is a path": failed(
                "UNSUPPORTED_BY_MODEL", GOOD, control=CONTROL | {"model": "../../models\0"}
            ),
            "a forged model": failed("UNSUPPORTED_BY_MODEL", GOOD, control=CONTROL | {"model": "a\u202eb\r\nX: 1"}),
            "half a pair for a model": failed("INVALID_INPUT", GOOD, control=CONTROL | {"model": "\ud800"}),
            "a position with a line end": headed("a", position="center\n"),
            "a colour with a line end": headed("a", color="#ffffff\n"),
            "a colour in Arabic digits": headed("a", color="#\u0660\u0660\u0660\u0660\u0660\u0660"),
            "a colour to call": headed("a", box={"color": "hsl(0,100%,50%)"}),
            "a font that is a path": headed("a", "FONT_MISSING", font="/etc/passwd"),
            "a font of control characters": headed("a", "FONT_MISSING", font="\u202e\x1b[31m\r\n"),
            "what belongs to another kind": failed("INVALID_INPUT", mask_path="hostile/mask.png"),
            "end before start": failed("INVALID_INPUT", control=CONTROL | {"start": 0.5, "end": 0.5}),
            "an edit by an image to image": failed("UNSUPPORTED_BY_MODEL", GOOD, **EDIT),
            "an edit with control": failed("INVALID_INPUT", GOOD, **EDIT, control=CONTROL),
            "10^4 references": failed("INVALID_INPUT", **EDIT | {"references": EDIT["references"] * 10_000}),
            "a product with control": failed("INVALID_INPUT", kind="product", product=PRODUCT, control=CONTROL),
        },
    ),
    HostileClass(
        41,
        "headlines",
        {
            "turned round": headed("a\u202eb"),
            "300 characters without a blank": draws(text_overlay={"text": "W" * 300, "size": 0.5}),
            "control characters": headed("a\x1b[31m"),
            "half a surrogate pair": headed("a\ud800"),
            "NUL": headed("a\0"),
            "only blanks": headed("\u3000\n\u2003"),
            "nothing to be seen": headed("\u3164"),
            "isolates": headed("\u2066a\u2069"),
            "a tag's letters": headed("a\U000e0061"),
            "right to left, with a joiner": draws(
                text_overlay={"text": "\u05e9\u05dc\u05d5\u05dd \u0645\u06cc\u200c\u062e"}
            ),
            "no font has it": headed("\U00012000", "FONT_MISSING"),
            "300 lines": draws(text_overlay={"text": "a\n" * 149 + "a", "size": 0.5}),
            "a letter under 299 accents": draws(text_overlay={"text": "a" + "\u0301" * 299}),
            "eight of everything": draws(
                text_overlay=[
                    {"text": "서울 " * 99, "size": 0.5, "stroke": {"width": 0.2}, "box": {"opacity": 1}, "shadow": True}
                ]
                * 8
            ),
            "on the smallest picture": draws(width=64, height=64, text_overlay={"text": "가" * 300}),
        },
    ),
    HostileClass(
        42,
        "large reference pictures",
        {
            "65535 px by the header": drawn_from("65535.png", lambda: png_of(65535, 65535)),
            "a text bomb": draws_from(
                "ztxt.png", lambda: png_of(4, 4, (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(50_000_000))))
            ),
            "100 Mpx": drawn_from("100mpx.png", lambda: image(mode="1", size=(10_000, 10_000)), "INPUT_TOO_LARGE"),
            "a mask of 100 Mpx": masked_by(
                "mask.100mpx.png", lambda: image(mode="1", size=(10_000, 10_000)), "INPUT_TOO_LARGE"
            ),
            "a cut-out of 49 Mpx": composed_of(
                "49mpx.png", lambda: image(mode="1", size=(7000, 7000)), "cutout_path", "INPUT_TOO_LARGE"
            ),
            "a background of 49 Mpx": composed_of(
                "b49mpx.png", lambda: image(mode="1", size=(7000, 7000)), "background_image_path", "INPUT_TOO_LARGE"
            ),
            "60 MB": drawn_from("60mb.png", lambda: image() + bytes(60_000_000), "INPUT_TOO_LARGE"),
            "a profile bomb": draws_from(
                "iccp.png", lambda: png_of(4, 4, (b"iCCP", b"icc\0\0" + zlib.compress(bytes(50_000_000))))
            ),
            "a JPEG of 100 Mpx": draws_from("100mpx.jpg", lambda: image("JPEG", "L", (10_000, 10_000))),
            "a progressive one": drawn_from(
                "progressive.jpg",
                lambda: image("JPEG", "L", (10_000, 10_000), progressive=True),
                "INPUT_TOO_LARGE",
            ),
            "1 by 20000": draws_from("thin.png", lambda: image(size=(1, 20_000))),
        },
    ),
    HostileClass(
        43,
        "other files for reference pictures",
        {
            "a web page": drawn_from("page.png", lambda: b"<html><body>403 Forbidden</body></html>"),
            "an animation": drawn_from("animated.webp", lambda: animated("WEBP")),
            "SVG": drawn_from("svg.png", lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>'),
            "EPS": drawn_from("eps.png", lambda: noise("EPS")),
            "half a TIFF": masked_by("tiff.png", lambda: noise("TIFF")[:2000]),
            "empty": masked_by("empty.png", lambda: b""),
            "a mask of grey": masked_by("grey.png", lambda: image(mode="L")),
            "a mask of red": masked_by("red.png", image),
            "cut off": drawn_from("cut.off.png", lambda: noise("PNG")[:9000]),
            "a cut-out without alpha": composed_of("opaque.png", image, "cutout_path"),
            "an empty cut-out": composed_of("nothing.png", nothing, "cutout_path"),
            "a composite that is none": composed_of("gif.png", lambda: animated("GIF"), "composite_path"),
            "a camera's picture with a preview behind it": draws_from("mpo.jpg", camera_jpeg),
            "16 bits": draws_from("16bit.png", lambda: image(mode="I;16")),
            "CMYK": draws_from("cmyk.jpg", lambda: image("JPEG", "CMYK")),
            "one pixel": draws_from("pixel.png", lambda: image(size=(1, 1))),
        },
    ),
)
