"""The backgrounds of things: those that a prompt can name, and those that it gets if it names none."""

from typing import NamedTuple


class Ground(NamedTuple):
    """A plain colour; without words it is drawn for prompts that name none."""

    rgb: tuple[int, int, int]
    english: str = ""
    hangul: tuple[str, ...] = ()


NAMED = (
    Ground((255, 255, 255), "white", ("하얀", "흰")),
    Ground((43, 132, 210), "blue", ("파란",)),
    Ground((76, 164, 80), "green", ("초록", "녹색")),
    Ground((250, 200, 60), "yellow", ("노란",)),
    Ground((244, 150, 190), "pink", ("분홍", "분홍색")),
    Ground((110, 70, 180), "purple", ("보라", "보라색")),
    Ground((22, 20, 24), "black", ("검은", "까만")),
)
PASTELS = (
    Ground((252, 242, 226)),
    Ground((228, 241, 250)),
    Ground((232, 246, 232)),
    Ground((247, 233, 241)),
)
GROUNDS = NAMED + PASTELS
WHITE = 0
