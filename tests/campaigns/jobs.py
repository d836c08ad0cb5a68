"""The jobs of a campaign: the same seed makes the same ones, so that a campaign can go on where it broke off."""

import json
import random
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

ADAPTERS = ("neon", "blueprint", "sepia")
PROMPTS = ("a red fox", "a lighthouse", "a blue house", "a green tree", "a yellow boat")
# One job in so many …
MUST_FAIL_EVERY = 20
TWO_IMAGES_EVERY = 8
SIGNED_EVERY = 4


@dataclass(frozen=True)
class PlannedJob:
    """One job; `num_steps` are the steps of one picture."""

    generation_id: int
    task_id: str
    prompt: str
    num_steps: int
    num_images: int
    adapter: str | None
    is_signed: bool
    must_fail: bool

    def message(self, bucket: str) -> bytes:
        """Build the message as the backend would publish it."""
        fields: dict[str, Any] = {
            "generation_id": self.generation_id,
            "prompt": self.prompt,
            "num_inference_steps": self.num_steps,
            "num_images": self.num_images,
        }
        if self.adapter is not None:
            fields["lora_path"] = f"s3://{bucket}/models/{self.adapter}.safetensors"
        if self.is_signed:
            fields["artist_name"] = "서울 아틀리에"
        return json.dumps({"task_id": self.task_id, "type": "image_generation", "data": fields}).encode()


def plan_jobs(num_jobs: int, *, seed: int, steps: tuple[int, int]) -> list[PlannedJob]:
    """Plan jobs 1 to `num_jobs`: most with an adapter, some signed, some of two images, some that cannot be done."""
    rng = random.Random(seed)
    return [_plan(number, rng, steps) for number in range(1, num_jobs + 1)]


def poisoned_of(jobs: Iterable[PlannedJob]) -> frozenset[int]:
    """Choose the generations whose ends the backend of some campaigns never takes: one of each kind of end."""
    jobs = list(jobs)
    fails, completes = [job for job in jobs if job.must_fail], [job for job in jobs if not job.must_fail]
    return frozenset(job.generation_id for job in (*fails[:1], *completes[:1]))


def _plan(number: int, rng: random.Random, steps: tuple[int, int]) -> PlannedJob:
    must_fail = number % MUST_FAIL_EVERY == MUST_FAIL_EVERY // 2
    return PlannedJob(
        generation_id=number,
        task_id=str(uuid.UUID(int=rng.getrandbits(128), version=4)),
        prompt=rng.choice(PROMPTS),
        num_steps=rng.randint(*steps),
        num_images=2 if number % TWO_IMAGES_EVERY == 0 else 1,
        adapter="missing" if must_fail else rng.choice((None, *ADAPTERS)),
        is_signed=number % SIGNED_EVERY == 1,
        must_fail=must_fail,
    )
