"""Decode the fields beyond text to image: init image, mask, control, product, references, headlines."""

from clients.storage.location import ObjectRef
from watermark.geometry import Position
from watermark.product.placement import Layout
from watermark.text.overlay import Box, Stroke, TextOverlay
from worker.messages.job import JobControl, JobProduct, JobSource, Kind
from worker.messages.rules import JobRules, Rejection, located
from worker.messages.schema import WireControl, WireData, WireLayout, WireTextOverlay

# The defaults of diffusers' own pipelines.
DEFAULT_STRENGTH = {Kind.IMAGE2IMAGE: 0.8, Kind.INPAINT: 1.0}
# Fields that apply to some kinds alone. Ignored silently, they would be missed only in the picture.
KINDS_OF = {
    "init_image_path": {Kind.IMAGE2IMAGE, Kind.INPAINT},
    "mask_path": {Kind.INPAINT},
    "strength": {Kind.IMAGE2IMAGE, Kind.INPAINT},
    "product": {Kind.PRODUCT},
    "references": {Kind.EDIT},
}
WITHOUT_CONTROL = {Kind.PRODUCT, Kind.EDIT}
AUTO = "auto"


def kind_of(wire: WireData) -> Kind:
    """Return the job's kind."""
    return wire.kind or Kind.TEXT2IMAGE


def source_of(wire: WireData, rules: JobRules, reject: Rejection) -> JobSource | None:
    """Decode the init image and mask of an image2image or inpaint job; None for other kinds. Raises `JobRejected`."""
    kind = kind_of(wire)
    for field, kinds in KINDS_OF.items():
        if getattr(wire, field) and kind not in kinds:
            of = " or ".join(sorted(kinds))
            raise reject("INVALID_INPUT", f"data.{field} belongs to kind {of}, but kind is {kind}")
    if kind in WITHOUT_CONTROL and wire.control:
        raise reject("INVALID_INPUT", f"data.control does not go with kind {kind}")
    if kind not in DEFAULT_STRENGTH:
        return None
    return JobSource(
        image_ref=_required_ref("init_image_path", wire.init_image_path, kind, rules, reject),
        mask_ref=_required_ref("mask_path", wire.mask_path, kind, rules, reject) if kind is Kind.INPAINT else None,
        strength=wire.strength or DEFAULT_STRENGTH[kind],
    )


def control_of(wire: WireControl | None, rules: JobRules, reject: Rejection) -> JobControl | None:
    """Decode the ControlNet's input. Raises `JobRejected`."""
    if wire is None:
        return None
    if wire.start >= wire.end:
        raise reject("INVALID_INPUT", f"data.control: start {wire.start} must be before end {wire.end}")
    ref = located("control.image_path", wire.image_path, rules, reject)
    if ref is None:
        raise reject(
            "INVALID_INPUT", "data.control: image_path is empty: name a PNG, JPEG, WebP, GIF, BMP or TIFF picture"
        )
    return JobControl(ref, wire.model, wire.scale, wire.start, wire.end, wire.preprocess)


def product_of(wire: WireData, rules: JobRules, reject: Rejection) -> JobProduct | None:
    """Decode the fields of a product job; None for other kinds. Raises `JobRejected`."""
    if kind_of(wire) is not Kind.PRODUCT:
        return None
    product = wire.product
    if product is None:
        raise reject("INVALID_INPUT", "kind product needs data.product with image_path or cutout_path")
    image, cutout, background, composite = (
        located(f"product.{name}", getattr(product, name), rules, reject)
        for name in ("image_path", "cutout_path", "background_image_path", "composite_path")
    )
    if image is None and cutout is None:
        raise reject("INVALID_INPUT", "data.product needs image_path or cutout_path: what is to be shown")
    if (wire.num_images or 1) > 1:
        raise reject("INVALID_INPUT", f"data.num_images is {wire.num_images}; a product job makes one picture")
    if composite is not None and cutout is None:
        raise reject(
            "INVALID_INPUT", "data.product.composite_path needs cutout_path beside it: what is to be protected"
        )
    layout = product.layout or WireLayout()
    return JobProduct(
        image_ref=image,
        cutout_ref=cutout,
        background_ref=background,
        composite_ref=composite,
        layout=Layout(layout.scale, None if layout.position == AUTO else Position(layout.position)),
        shadow=product.shadow,
        refine_strength=product.refine_strength,
    )


def references_of(wire: WireData, rules: JobRules, reject: Rejection) -> tuple[ObjectRef, ...]:
    """Decode the references of an edit; none for other kinds. Raises `JobRejected`."""
    if kind_of(wire) is not Kind.EDIT:
        return ()
    if not wire.references:
        raise reject("INVALID_INPUT", "kind edit needs data.references: name one to four pictures by their image_path")
    fields = [f"references.{number}.image_path" for number in range(len(wire.references))]
    return tuple(
        _required_ref(field, one.image_path, Kind.EDIT, rules, reject)
        for field, one in zip(fields, wire.references, strict=True)
    )


def overlays_in(wire: WireData) -> list[WireTextOverlay]:
    """Return the headlines as a list, given as one or as several."""
    given = wire.text_overlay or []
    return given if isinstance(given, list) else [given]


def overlay_of(wire: WireTextOverlay) -> TextOverlay:
    """Decode one headline."""
    return TextOverlay(
        text=wire.text,
        font=wire.font or None,
        size=None if wire.size == "fit" else wire.size,
        colour=_colour(wire.color),
        stroke=Stroke(wire.stroke.width, _colour(wire.stroke.color)) if wire.stroke else None,
        shadow=wire.shadow,
        box=Box(_colour(wire.box.color), wire.box.opacity) if wire.box else None,
        position=None if wire.position == AUTO else Position(wire.position),
    )


def _required_ref(field: str, text: str | None, kind: Kind, rules: JobRules, reject: Rejection) -> ObjectRef:
    ref = located(field, text, rules, reject)
    if ref is None:
        raise reject(
            "INVALID_INPUT", f"kind {kind} needs data.{field}: name a PNG, JPEG, WebP, GIF, BMP or TIFF picture"
        )
    return ref


def _colour(text: str) -> str | None:
    return None if text == AUTO else text
