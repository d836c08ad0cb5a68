"""`python -m tests.mutations.matrix`: write the fault matrix into docs/reliability.md, from the rows themselves."""

from collections.abc import Sequence

from tests.mutations.row import Row
from tests.mutations.rows import ROWS
from tests.support.paths import ROOT

DOCUMENT = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- matrix -->\n", "<!-- end of matrix -->"


def render(rows: Sequence[Row]) -> str:
    """Render a Markdown table; the last column counts the mechanisms that are taken out to see the row's tests fail."""
    lines = ["| | what breaks | what then happens | tests | without |", "|---|---|---|---|---|"]
    for row in rows:
        tests = len(row.tests) + len(row.also)
        without = "fail" if row.without else row.because
        lines.append(f"| {row.name} | {row.fault} | {row.answer} | {tests} | {without} |")
    return "\n".join(lines) + "\n"


def with_matrix(document: str) -> str:
    """Replace the matrix between the document's two marks by today's."""
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{render(ROWS)}{END}{after}"


if __name__ == "__main__":
    DOCUMENT.write_text(with_matrix(DOCUMENT.read_text()))
