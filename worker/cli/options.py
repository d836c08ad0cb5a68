"""The options that `darkroom generate` and `darkroom submit` share, and the message fields they stand for.

The options say no more than a message could: limits and combinations are validated by the decoder.
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
    """The shared options. Pictures and adapters are files for `generate`, locations in the store for `submit`."""

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
    guidance_rescale: Annotated[float | None, typer.Option(help="Rescaling of guidance, 0 to 1")] = None
    seed: Annotated[int | None, typer.Option(help="Seed of the first picture", min=0)] = None
    images: Annotated[int | None, typer.Option("-n", "--images", help="Number of pictures", min=1, max=8)] = None
    scheduler: Annotated[str | None, typer.Option(help="Scheduler by name")] = None
    model: Annotated[
        str | None, typer.Option(help="One of the worker's MODELS; for generate also a folder or hub id")
    ] = None

    kind: Annotated[Kind | None, typer.Option(help="Else by the pictures that are given")] = None
    init: Annotated[str | None, typer.Option(help="Picture to begin from")] = None
    mask: Annotated[str | None, typer.Option(help="What of it is repainted: white")] = None
    strength: Annotated[float | None, typer.Option(help="How far from the picture: above 0, up to 1")] = None
    fit: Annotated[Fit | None, typer.Option(help="How pictures come to the size of what is drawn; else cover")] = None

    reference: Annotated[list[str] | None, typer.Option(help="Picture that an edit is made from; repeatable")] = None

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
    """Wrap `command` for typer: its first parameter, a `GenerateOptions`, is replaced by the options themselves."""
    own = inspect.signature(command, eval_str=True)
    _options, *others = own.parameters.values()

    def wrapper(**given: Any) -> None:
        options = GenerateOptions(**{field.name: given.pop(field.name) for field in fields(GenerateOptions)})
        command(options, **given)

    # Keyword-only, as typer calls it: a parameter with a default may then precede one without.
    hints, kind = get_type_hints(GenerateOptions, include_extras=True), inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter(
            field.name,
            kind,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(GenerateOptions)
    ]
    parameters += [other.replace(kind=kind) for other in others]
    wrapper.__name__, wrapper.__doc__ = command.__name__, command.__doc__
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    wrapper.__dict__["__signature__"] = own.replace(parameters=parameters)
    return wrapper


def fields_of(options: GenerateOptions) -> dict[str, Any]:
    """Return the `data` fields of a message for `options`, without those that it leaves open."""
    if not options.lora:
        _require_option("--lora", {"--scale": options.scale})
    return _given(
        prompt=options.prompt,
        negative_prompt=options.negative,
        style=options.style,
        industry=options.industry,
        loras=[_given(path=path, scale=options.scale) for path in options.lora or ()] or None,
        signature_path=options.signature,
        artist_name=options.artist,
        aspect_ratio=options.aspect,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance,
        guidance_rescale=options.guidance_rescale,
        seed=options.seed,
        num_images=options.images,
        scheduler=options.scheduler,
        model=options.model,
        kind=_kind(options),
        init_image_path=options.init,
        mask_path=options.mask,
        strength=options.strength,
        fit=options.fit,
        references=[{"image_path": path} for path in options.reference or ()] or None,
        control=_control(options),
        product=_product(options),
        text_overlay=_headlines(options),
    )


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _kind(options: GenerateOptions) -> Kind | None:
    """Return the kind that was named, else the one whose pictures were given."""
    if options.kind is not None:
        return options.kind
    if options.mask is not None:
        return Kind.INPAINT
    if options.init is not None:
        return Kind.IMAGE2IMAGE
    if options.reference:
        return Kind.EDIT
    images = (options.product, options.cutout, options.background, options.composite)
    return None if images == (None,) * len(images) else Kind.PRODUCT


def _control(options: GenerateOptions) -> dict[str, Any] | None:
    if options.control is None:
        named = {"--control-model": options.control_model, "--control-scale": options.control_scale}
        _require_option("--control", named | {"--control-edges": options.control_edges or None})
        return None
    if options.control_model is None:
        raise typer.BadParameter("--control needs --control-model: which of the worker's CONTROLNETS reads it")
    return _given(
        image_path=options.control,
        model=options.control_model,
        scale=options.control_scale,
        preprocess=Preprocess.CANNY if options.control_edges else None,
    )


def _product(options: GenerateOptions) -> dict[str, Any] | None:
    return (
        _given(
            image_path=options.product,
            cutout_path=options.cutout,
            background_image_path=options.background,
            composite_path=options.composite,
            layout=_given(scale=options.layout_scale, position=options.layout_position) or None,
            refine_strength=options.refine,
        )
        or None
    )


def _headlines(options: GenerateOptions) -> list[dict[str, Any]] | None:
    size: float | str | None = options.text_size
    if size is not None and size != FIT_SIZE:
        try:
            size = float(size)
        except ValueError:
            raise typer.BadParameter(f"--text-size {size!r:.40} is neither a number nor {FIT_SIZE}") from None
    named = {"position": options.text_position, "color": options.text_color, "size": size}
    if not options.text:
        _require_option("--text", {f"--text-{name}": value for name, value in named.items()})
        return None
    return [_given(text=text, **named) for text in options.text]


def _require_option(option: str, others: dict[str, Any]) -> None:
    """Refuse an option of `option` without it: ignored, it would be missed only in the picture."""
    for other, value in others.items():
        if value is not None:
            raise typer.BadParameter(f"{other} belongs to {option}")
