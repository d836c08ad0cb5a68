"""Make text from outside fit for a terminal: escaped characters and narrow tables."""

from rich import box
from rich.table import Table

UUID_CHARS = 36


def escape_for_terminal(text: str) -> str:
    r"""Return `text` with control and invisible characters as `\u…`, which JSON reads back."""
    return "".join(char if char.isprintable() else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    return "".join(f"\\u{unit:04x}" for unit in memoryview(char.encode("utf-16-le", "surrogatepass")).cast("H"))


def narrow_table(*columns: str) -> Table:
    """Return a table whose last column has room for a task id at 80 columns."""
    table = Table(*columns, box=box.SIMPLE_HEAD, padding=(0, 0))
    for column in table.columns:
        column.overflow = "fold"  # what is cut off cannot be copied
    table.columns[-1].min_width = UUID_CHARS
    return table
