"""What `darkroom generate` and `darkroom submit` are told about a picture: one set of options, and the fields of it.

The options say no more than a message could: what goes together, and every limit, is the decoder's to judge.
"""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any, get_type_hints

import typer

from watermark.resizing import Fit
from worker.messages.job import Kind, Preprocess

FIT_SIZE = "fit"


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOptions:
    """The options. Pictures and adapters are named as the command names them: files, or locations in the store."""

    prompt: Annotated[str, typer.Argument(help="What to draw")]
    negative: Annotated[str | None, typer.Option(help="What not to draw")] = None
    style: Annotated[str | None, typer.Option(help="A preset, like anime; `darkroom presets` lists them")] = None
    industry: Annotated[str | None, typer.Option(help="A preset, like cafe")] = None
    lora: Annotated[list[str] | None, typer.Option(help="A .safetensors file or a PEFT folder; repeatable")] = None
    scale: Annotated[float | None, typer.Option(help="Scale of the adapters; else 1")] = None
    signature: Annotated[str | None, typer.Option(help="Signature picture")] = None
    artist: Annotated[str | None, typer.Option(help="Signature as text, where there is no picture")] = None
    aspect: Annotated[
        str | None, typer.Option(help="Aspect ratio, like 1:2; else that of the picture to begin from, or 1:1")
    ] = None
    steps: Annotated[int | None, typer.Option(help="Denoise steps")] = None
    guidance: Annotated[float | None, typer.Option(help="Guidance scale")] = None
    seed: Annotated[int | None, typer.Option(help="Seed of the first picture", min=0)] = None
    images: Annotated[int | None, typer.Option("-n", "--images", help="Number of pictures", min=1, max=8)] = None
    scheduler: Annotated[str | None, typer.Option(help="Scheduler by name")] = None

    kind: Annotated[Kind | None, typer.Option(help="Else by the pictures that are given")] = None
    init: Annotated[str | None, typer.Option(help="Picture to begin from")] = None
    mask: Annotated[str | None, typer.Option(help="What of it is repainted: white")] = None
    strength: Annotated[float | None, typer.Option(help="How far from the picture: above 0, up to 1")] = None
    fit: Annotated[Fit | None, typer.Option(help="How pictures come to the size of what is drawn; else cover")] = None

    control: Annotated[str | None, typer.Option(help="Picture that the drawing follows")] = None
    control_model: Annotated[str | None, typer.Option(help="Which of the worker's CONTROLNETS reads it")] = None
    control_scale: Annotated[float | None, typer.Option(help="How strongly it is followed; else 1")] = None
    control_edges: Annotated[bool, typer.Option("--control-edges", help="Find its edges first (Canny)")] = False

    product: Annotated[str | None, typer.Option(help="Product picture, to be cut out")] = None
    cutout: Annotated[str | None, typer.Option(help="The product cut out already")] = None
    background: Annotated[str | None, typer.Option(help="Its background, not drawn then")] = None
    composite: Annotated[str | None, typer.Option(help="Both together, to go on from; with --cutout")] = None
    layout_scale: Annotated[float | None, typer.Option(help="Part of the picture that it fills; else 0.6")] = None
    layout_position: Annotated[str | None, typer.Option(help="auto, or like bottom-center; else auto")] = None
    refine: Annotated[float | None, typer.Option(help="Strength of the pass that blends the two; else 0")] = None

    text: Annotated[list[str] | None, typer.Option(help="Headline; repeatable")] = None
    text_position: Annotated[str | None, typer.Option(help="auto, or like top-center; else auto")] = None
    text_color: Annotated[str | None, typer.Option(help="#rrggbb or auto; else auto")] = None
    text_size: Annotated[str | None, typer.Option(help="Of the letters, by the picture's height; or fit")] = None


def with_generate_options(command: Callable[..., None]) -> Callable[..., None]:
    """`command`, whose first parameter is an `Order`, as typer is to see it: with the options in that one's place."""
    own = inspect.signature(command, eval_str=True)
    _order, *others = own.parameters.values()

    def told(**options: Any) -> None:
        order = GenerateOptions(**{field.name: options.pop(field.name) for field in fields(GenerateOptions)})
        command(order, **options)

    # By keyword, as typer calls it: what has a default may then stand before what has none.
    options = [*_parameters(), *(other.replace(kind=inspect.Parameter.KEYWORD_ONLY) for other in others)]
    told.__name__, told.__doc__ = command.__name__, command.__doc__
    told.__annotations__ = {option.name: option.annotation for option in options}
    told.__dict__["__signature__"] = own.replace(parameters=options)
    return told


def _parameters() -> list[inspect.Parameter]:
    hints = get_type_hints(GenerateOptions, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(GenerateOptions)
    ]


def fields_of(order: GenerateOptions) -> dict[str, Any]:
    """The `data` fields of a message that asks for what `order` does; what it leaves open is not in them."""
    return _given(
        prompt=order.prompt,
        negative_prompt=order.negative,
        style=order.style,
        industry=order.industry,
        loras=_loras(order),
        signature_path=order.signature,
        artist_name=order.artist,
        aspect_ratio=order.aspect,
        num_inference_steps=order.steps,
        guidance_scale=order.guidance,
        seed=order.seed,
        num_images=order.images,
        scheduler=order.scheduler,
        kind=_kind(order),
        init_image_path=order.init,
        mask_path=order.mask,
        strength=order.strength,
        fit=order.fit,
        control=_control(order),
        product=_product(order),
        text_overlay=_headlines(order),
    )


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _kind(order: GenerateOptions) -> Kind | None:
    """The kind that was named, else the one whose pictures were given."""
    if order.kind is not None:
        return order.kind
    if order.mask is not None:
        return Kind.INPAINT
    if order.init is not None:
        return Kind.IMAGE2IMAGE
    pictures = (order.product, order.cutout, order.background, order.composite)
    return None if pictures == (None,) * len(pictures) else Kind.PRODUCT


def _loras(order: GenerateOptions) -> list[dict[str, Any]] | None:
    if not order.lora:
        _refuse_alone("--lora", {"--scale": order.scale})
        return None
    return [_given(path=path, scale=order.scale) for path in order.lora]


def _control(order: GenerateOptions) -> dict[str, Any] | None:
    if order.control is None:
        named = {"--control-model": order.control_model, "--control-scale": order.control_scale}
        _refuse_alone("--control", named | {"--control-edges": order.control_edges or None})
        return None
    if order.control_model is None:
        raise typer.BadParameter("--control needs --control-model: which of the worker's CONTROLNETS reads it")
    return _given(
        image_path=order.control,
        model=order.control_model,
        scale=order.control_scale,
        preprocess=Preprocess.CANNY if order.control_edges else None,
    )


def _product(order: GenerateOptions) -> dict[str, Any] | None:
    return (
        _given(
            image_path=order.product,
            cutout_path=order.cutout,
            background_image_path=order.background,
            composite_path=order.composite,
            layout=_given(scale=order.layout_scale, position=order.layout_position) or None,
            refine_strength=order.refine,
        )
        or None
    )


def _headlines(order: GenerateOptions) -> list[dict[str, Any]] | None:
    named = {"position": order.text_position, "color": order.text_color, "size": _text_size(order.text_size)}
    if not order.text:
        _refuse_alone("--text", {f"--text-{name}": value for name, value in named.items()})
        return None
    return [_given(text=text, **named) for text in order.text]


def _text_size(text: str | None) -> float | str | None:
    if text is None or text == FIT_SIZE:
        return text
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"--text-size {text!r:.40} is neither a number nor {FIT_SIZE}") from None


def _refuse_alone(option: str, others: dict[str, Any]) -> None:
    """An option that says how something is to be done, without that something, would be missed only in the picture."""
    for other, value in others.items():
        if value is not None:
            raise typer.BadParameter(f"{other} belongs to {option}")
