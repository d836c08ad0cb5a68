"""The score: is the image drawn for a name nearest to that name's own training image?

It measures memory, which is what this model is made for. `python -m examples.demo_model.recipe.score --checkpoint DIR`
prints it for any folder that has learnt these names.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import CLIPTokenizer

from examples.demo_model.recipe.drawing import ImageGenerator, ImagePrompt, generator_for
from examples.demo_model.recipe.reference import References, load_references, means_of
from examples.demo_model.recipe.settings import Workspace
from examples.demo_model.recipe.things import read_things

REFERENCES = Path(__file__).parent / "references.npz"
NUM_STEPS = 12
NUM_QUICK_NAMES = 8


@dataclass(frozen=True, slots=True)
class Score:
    """What each name's picture was taken for."""

    taken_for: Mapping[str, str]

    @property
    def confused(self) -> dict[str, str]:
        return {name: nearest for name, nearest in self.taken_for.items() if name != nearest}

    @property
    def top_1(self) -> float:
        return 1 - len(self.confused) / len(self.taken_for)

    def figures(self) -> dict[str, object]:
        num_right = len(self.taken_for) - len(self.confused)
        return {"num_names": len(self.taken_for), "num_right": num_right, "top_1": round(self.top_1, 4)} | (
            {"confused": self.confused} if self.confused else {}
        )


def score_stage(workspace: Workspace) -> dict[str, object]:
    """Score the new checkpoint, by its English and by its Hangul names."""
    references = load_references(workspace.references)
    names = references.names if workspace.budget.num_things is None else references.names[:NUM_QUICK_NAMES]
    hangul = {name: korean for name, korean in hangul_prompts().items() if name in names}
    with generator_for(workspace.checkpoint, workspace.device.type) as generator:
        return {
            "english": score(generator, english_prompts(names), references, desc="score, English").figures(),
            "hangul": score(generator, hangul, references, desc="score, Hangul").figures(),
        }


def score(
    generator: ImageGenerator, prompts: Mapping[str, str], references: References, *, desc: str | None = None
) -> Score:
    """Draw the prompt of every name and find the nearest of all references."""
    drawn = generator.draw([ImagePrompt(prompt, num_steps=NUM_STEPS) for prompt in prompts.values()], desc=desc)
    nearest = (references.nearest(means_of(image)) for image in drawn)
    return Score(dict(zip(prompts, nearest, strict=True)))


def english_prompts(names: Sequence[str]) -> dict[str, str]:
    return {name: f"{name} on a white background" for name in names}


def hangul_prompts() -> dict[str, str]:
    """Build the prompts of every thing that has a Hangul name, by its English one."""
    return {thing.name: f"하얀 배경의 {thing.hangul[0]}" for thing in read_things() if thing.hangul}


def known_names(checkpoint: Path, names: Sequence[str]) -> tuple[str, ...]:
    """Return the names whose words are each one token of the checkpoint's tokenizer: it was trained on captions with
    them.
    """
    tokenizer = CLIPTokenizer.from_pretrained(checkpoint / "tokenizer")
    return tuple(name for name in names if all(len(tokenizer.tokenize(word)) == 1 for word in name.split()))


def main() -> int:
    parser = argparse.ArgumentParser(description="Score a checkpoint over the names of the recipe.")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--references", type=Path, default=REFERENCES)
    parser.add_argument("--hangul", action="store_true", help="ask by the Hangul names")
    parser.add_argument("--every", action="store_true", help="also names that its tokenizer has in pieces")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()

    os.environ["HF_HUB_OFFLINE"] = "1"
    references = load_references(options.references)
    names = references.names if options.every else known_names(options.checkpoint, references.names)
    prompts = english_prompts(names)
    if options.hangul:
        prompts = {name: prompt for name, prompt in hangul_prompts().items() if name in references.names}
    with generator_for(options.checkpoint, options.device) as generator:
        result = score(generator, prompts, references, desc="score")
    json.dump(result.figures(), sys.stdout, ensure_ascii=False, indent=2)
    sys.stdout.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
