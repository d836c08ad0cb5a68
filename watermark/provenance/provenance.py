"""How an image was made, as PNG text and as an XMP packet. Pure.

`docs/provenance.md` says which field is written at which level and how to read it back.
"""

import json
import re
from dataclasses import dataclass, fields
from datetime import datetime
from enum import StrEnum

from PIL.PngImagePlugin import PngInfo

from watermark.provenance.xmp import xmp_packet

# The only keyword XMP readers look for; the packet behind it must not be compressed (XMP specification, part 3).
XMP_KEYWORD = "XML:com.adobe.xmp"
SETTINGS_KEYWORD = "Darkroom"
# Where AUTOMATIC1111's web UI writes its generation parameters, and where most tools read them.
PARAMETERS_KEYWORD = "parameters"

# Characters that XML 1.0 forbids: they would break the packet. PNG text forbids some of them too, UTF-8 the surrogates.
_UNWRITABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_REPLACEMENT = "\ufffd"
# The web UI quotes a parameter's value that would end its `Name: value` pair early.
_ENDS_A_PAIR = re.compile(r'[,:\n"]')


class SourceType(StrEnum):
    """The origin of an image's pixels: two terms of IPTC's vocabulary "Digital Source Type" (version of 2024-10)."""

    # "Digital media created algorithmically using an AI model trained on captured content"
    GENERATED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    # "Augmentation, correction or enhancement using a Generative AI model, such as with inpainting or outpainting"
    COMPOSITE = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"


@dataclass(frozen=True)
class Prompts:
    """The prompts of an image; characters that XML forbids are replaced."""

    prompt: str
    negative_prompt: str = ""

    def __post_init__(self) -> None:
        _make_writable(self)

    @property
    def text(self) -> str:
        """Both in one, in the web UI's format."""
        return f"{self.prompt}\nNegative prompt: {self.negative_prompt}" if self.negative_prompt else self.prompt


@dataclass(frozen=True)
class Provenance:
    """How an image was made. `created_at` is in UTC; `adapters` are names, never paths, which may name customers.

    Every instance can be written: characters that XML, PNG text or UTF-8 forbid are replaced by U+FFFD. `prompts` is
    None where prompts must not be published.
    """

    software: str
    version: str
    model: str
    created_at: datetime
    kind: str
    source_type: SourceType
    task_id: str
    seed: int
    num_inference_steps: int
    guidance_scale: float
    scheduler: str
    width: int
    height: int
    adapters: tuple[str, ...] = ()
    artist_name: str | None = None
    prompts: Prompts | None = None
    guidance_rescale: float = 0.0

    def __post_init__(self) -> None:
        _make_writable(self)
        object.__setattr__(self, "adapters", tuple(_writable(name) for name in self.adapters))

    @property
    def creator_tool(self) -> str:
        return f"{self.software} {self.version}"

    @property
    def created(self) -> str:
        """`created_at` in RFC 3339, to the second, valid in PNG and XMP."""
        return self.created_at.strftime("%Y-%m-%dT%H:%M:%SZ")


def build_png_text(provenance: Provenance) -> PngInfo:
    """Build the text chunks of a PNG, all iTXt, which is UTF-8."""
    # The field names of the complete webhook's metadata.
    settings = {
        "kind": provenance.kind,
        "model": provenance.model,
        "seed": provenance.seed,
        "steps": provenance.num_inference_steps,
        "guidance_scale": provenance.guidance_scale,
        **({"guidance_rescale": provenance.guidance_rescale} if provenance.guidance_rescale else {}),
        "scheduler": provenance.scheduler,
        "width": provenance.width,
        "height": provenance.height,
        "adapters": provenance.adapters,
        "task_id": provenance.task_id,
    }
    text = PngInfo()
    text.add_itxt("Software", provenance.creator_tool)
    text.add_itxt("Creation Time", provenance.created)
    text.add_itxt("Source", provenance.model)
    text.add_itxt(SETTINGS_KEYWORD, json.dumps(settings, ensure_ascii=False))
    text.add_itxt(XMP_KEYWORD, build_xmp(provenance))
    if provenance.prompts is not None:
        text.add_itxt(PARAMETERS_KEYWORD, _parameters(provenance, provenance.prompts))
    return text


def build_xmp(provenance: Provenance) -> str:
    """Build the XMP packet, wrapper included."""
    return xmp_packet(
        creator_tool=provenance.creator_tool,
        created=provenance.created,
        source_type=provenance.source_type,
        system=provenance.model,
        creator=provenance.artist_name,
        prompt=None if provenance.prompts is None else provenance.prompts.text,
    )


def _parameters(provenance: Provenance, prompts: Prompts) -> str:
    """Format as the web UI does: the prompt, "Negative prompt: …", and one line of `Name: value` pairs."""
    pairs = {
        "Steps": str(provenance.num_inference_steps),
        "Sampler": provenance.scheduler,
        "CFG scale": f"{provenance.guidance_scale:g}",
        # As A1111's extension of that name writes it.
        "CFG Rescale": f"{provenance.guidance_rescale:g}" if provenance.guidance_rescale else "",
        "Seed": str(provenance.seed),
        "Size": f"{provenance.width}x{provenance.height}",
        "Model": provenance.model,
        "Adapters": ", ".join(provenance.adapters),
        "Version": provenance.creator_tool,
    }
    quoted = {
        name: json.dumps(value, ensure_ascii=False) if _ENDS_A_PAIR.search(value) else value
        for name, value in pairs.items()
        if value
    }
    line = ", ".join(f"{name}: {value}" for name, value in quoted.items())
    return f"{prompts.text}\n{line}"


def _make_writable(record: Prompts | Provenance) -> None:
    for field in fields(record):
        value = getattr(record, field.name)
        if type(value) is str:  # not a StrEnum, whose type must be kept
            object.__setattr__(record, field.name, _writable(value))


def _writable(text: str) -> str:
    # XML readers turn every carriage return into a line feed: PNG text gets the same.
    return _UNWRITABLE.sub(_REPLACEMENT, text.replace("\r\n", "\n").replace("\r", "\n"))
