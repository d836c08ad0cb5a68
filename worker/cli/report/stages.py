"""The stages of a job in their order, and how each is shown wherever a timeline is drawn."""

from typing import NamedTuple


class Look(NamedTuple):
    """A colour, and the letter in its place where there are no colours."""

    colour: str
    letter: str


# As `Run.stage` and the engine name them.
STAGES: dict[str, Look] = {
    "ledger": Look("#9e9e9e", "l"),
    "fetch": Look("#4e79a7", "f"),
    "wait": Look("#e3e3e3", "."),
    "adapt": Look("#b07aa1", "a"),
    "encode": Look("#f28e2b", "e"),
    "denoise": Look("#59a14f", "#"),
    "decode": Look("#edc948", "d"),
    "cut": Look("#9c755f", "c"),
    "compose": Look("#ff9da7", "o"),
    "sign": Look("#e15759", "s"),
    "store": Look("#76b7b2", "p"),
}
# Time of a job that no stage accounts for: of one that broke off, all that was inside the engine.
REST = "rest"
REST_LOOK = Look("#d37295", "?")


def look_of(stage: str) -> Look:
    """How a stage is shown; what is not known as one, as `REST`."""
    return STAGES.get(stage, REST_LOOK)
