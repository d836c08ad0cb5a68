"""`darkroom fonts`: the font families for headlines."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from watermark.text.fonts import code_points
from watermark.text.scripts import Script, covered_scripts
from watermark.text.typefaces import Typeface, list_typefaces


@dataclass(frozen=True, slots=True)
class Family:
    """A font family: `family` is what `text_overlay.font` takes, `also` its names in other languages.

    `scripts` holds how many characters of each script every style has.
    """

    family: str
    also: tuple[str, ...]
    styles: tuple[str, ...]
    scripts: dict[Script, int]


def list_fonts(font_dirs: tuple[Path, ...], *, as_lines: bool, console: Console) -> bool:
    """Print a table of the families under `font_dirs`, or a line of JSON for each; False where there is none."""
    families = families_in(font_dirs)
    if as_lines:
        for family in families:
            typer.echo(json.dumps(asdict(family), ensure_ascii=False))
    elif families:
        table = Table("family", "also called", "styles", "scripts", box=None, pad_edge=False)
        for one in families:
            row = one.family, ", ".join(one.also), ", ".join(one.styles), ", ".join(one.scripts) or "signs alone"
            table.add_row(*map(Text, row))  # plain: a name may hold brackets
        console.print(table)
    else:
        typer.echo(f"no fonts in {', '.join(map(str, font_dirs))}: install some or set FONT_DIRS")
    return bool(families)


def families_in(font_dirs: tuple[Path, ...]) -> list[Family]:
    """Return the families with drawable characters, sorted by name."""
    faces: dict[str, list[Typeface]] = {}
    for face in list_typefaces(font_dirs):
        if code_points(face.path, face.index):
            faces.setdefault(face.family, []).append(face)
    return [_family(name, faces[name]) for name in sorted(faces, key=str.casefold)]


def _family(name: str, faces: list[Typeface]) -> Family:
    ordered = sorted(faces, key=lambda face: (face.is_italic, face.weight, face.style))
    names = dict.fromkeys(other for face in ordered for other in face.families)
    # Legacy names that contain a style, like "NanumSquare Bold", are covered by the family and the style.
    also = [one for one in names if one != name and not any(one.startswith(f"{other} ") for other in names)]
    covered = [covered_scripts(code_points(face.path, face.index)) for face in ordered]
    common = [script for script in Script if all(script in one for one in covered)]
    return Family(
        family=name,
        also=tuple(also),
        styles=tuple(dict.fromkeys(face.style for face in ordered)),
        scripts={script: min(one[script] for one in covered) for script in common},
    )
