"""`python -m tests.support.architecture`: write the lists of folders and files into docs/architecture.md."""

import ast
import re
from pathlib import Path

from tests.support.house import PACKAGES
from tests.support.paths import ROOT

DOCUMENT = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- files -->\n", "<!-- end of files -->"
# The end of a sentence: no full stop inside of a name, a number or a command.
SENTENCE = re.compile(r"(.+?[.?!])(?=\s+[A-Z`]|$)", re.DOTALL)


def first_sentence(path: Path) -> str:
    """Return the first sentence of the module's docstring on one line; empty where there is none."""
    docstring = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0].split())
    found = SENTENCE.match(docstring)
    return found[1] if found else docstring


def render() -> str:
    """List the packages' folders, each with its files, from the docstrings of their modules."""
    lines = []
    for package in PACKAGES:
        for folder in sorted(one.parent for one in (ROOT / package).rglob("__init__.py")):
            lines.append(f"- **`{folder.relative_to(ROOT).as_posix()}/`** {first_sentence(folder / '__init__.py')}")
            files = sorted(one for one in folder.glob("*.py") if one.name != "__init__.py")
            lines += [f"  - `{one.name}` {first_sentence(one)}" for one in files]
    return "\n".join(lines) + "\n"


def with_files(document: str) -> str:
    """Replace what is between the document's two marks by today's lists."""
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{render()}{END}{after}"


if __name__ == "__main__":
    DOCUMENT.write_text(with_files(DOCUMENT.read_text()))
