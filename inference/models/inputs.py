"""Inputs of a family: prompts, and the samplers, embeddings and guides of the lanes in a forward."""

from collections.abc import Sequence
from typing import NamedTuple

from inference.controlnet.guide import Guide
from inference.lane import Embedding, Lane
from inference.sampling.samplers import Sampler


class Prompt(NamedTuple):
    """A text. `is_left_out`: an empty negative prompt, which some families encode as zeros."""

    text: str
    is_left_out: bool = False


def sampler_of(lane: Lane) -> Sampler:
    """Return a joined lane's sampler."""
    assert lane.sampler is not None, "a lane has its sampler from joining on"  # noqa: S101
    return lane.sampler


def guides_of(rows: Sequence[Lane]) -> dict[int, Guide]:
    """Return the active guides of the coming step by the number of their row."""
    guides = {number: lane.guide for number, lane in enumerate(rows)}
    return {number: guide for number, guide in guides.items() if guide is not None}


def embedding_of(lane: Lane, *, is_negative: bool) -> Embedding:
    """Return the embedding of a joined lane's prompt or negative prompt."""
    conditioning = lane.owner.conditioning
    assert conditioning is not None, "a lane has its conditioning from joining on"  # noqa: S101
    embedding = conditioning.negative if is_negative else conditioning.positive
    assert embedding is not None, "a guided lane has a negative prompt's embedding"  # noqa: S101
    return embedding
