"""The stages of a job in their order, and the style of each in timelines."""

from typing import NamedTuple


class StageStyle(NamedTuple):
    """Colour of a stage, and the letter for terminals without colours."""

    colour: str
    letter: str


# As `Run.stage` and the engine name them.
STAGES: dict[str, StageStyle] = {
    "ledger": StageStyle("#9e9e9e", "l"),
    "fetch": StageStyle("#4e79a7", "f"),
    "wait": StageStyle("#e3e3e3", "."),
    "adapt": StageStyle("#b07aa1", "a"),
    "encode": StageStyle("#f28e2b", "e"),
    "denoise": StageStyle("#59a14f", "#"),
    "decode": StageStyle("#edc948", "d"),
    "cut": StageStyle("#9c755f", "c"),
    "compose": StageStyle("#ff9da7", "o"),
    "sign": StageStyle("#e15759", "s"),
    "store": StageStyle("#76b7b2", "p"),
}
# Time of a job that no stage accounts for; of an aborted job, all of its time inside the engine.
UNACCOUNTED = "rest"
UNACCOUNTED_STYLE = StageStyle("#d37295", "?")


def style_of(stage: str) -> StageStyle:
    """Return the style of a stage; an unknown one has that of `UNACCOUNTED`."""
    return STAGES.get(stage, UNACCOUNTED_STYLE)
