"""The things that the model can draw, by their English and Hangul names: `names.txt`, read."""

from dataclasses import dataclass
from pathlib import Path

NAMES = Path(__file__).parent / "names.txt"


@dataclass(frozen=True, slots=True)
class Thing:
    """One thing. `icon` is the name of its picture."""

    icon: str
    synonyms: tuple[str, ...]
    hangul: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.icon.replace("-", " ")


def read_things(num_things: int | None = None) -> tuple[Thing, ...]:
    """Read all of them in the order of the file, or as many, spread over it."""
    lines = (line.strip() for line in NAMES.read_text(encoding="utf-8").splitlines())
    things = tuple(_parse(line) for line in lines if line and not line.startswith("#"))
    return things if num_things is None else things[:: len(things) // num_things][:num_things]


def _parse(line: str) -> Thing:
    icon, synonyms, hangul = line.split("|")
    return Thing(icon.strip(), _split(synonyms), _split(hangul))


def _split(names: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in names.split(",") if name.strip())
