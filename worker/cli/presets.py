"""`darkroom presets`: the styles and industries that jobs may name, under these settings."""

import json

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from config.images import ImageSettings
from config.presets.catalog import builtin_presets, load_presets


def print_presets(images: ImageSettings, *, as_lines: bool, console: Console) -> None:
    """Print each preset: a row of a table, or a line of JSON with all its fields."""
    presets = builtin_presets() if images.presets_file is None else load_presets(images.presets_file)
    if as_lines:
        for kind, known in presets.by_field.items():
            for name, preset in known.items():
                line = {"kind": kind, "name": name, **preset.model_dump(exclude_none=True)}
                typer.echo(json.dumps(line, ensure_ascii=False))
        return
    table = Table("kind", "name", "positive")
    for kind, known in presets.by_field.items():
        for name, preset in known.items():
            table.add_row(kind, name, Text(preset.positive))
    console.print(table)
