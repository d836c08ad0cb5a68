"""The demo's jobs: a dozen of text to image in both dialects of the message contract, and one of each other kind."""

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

FIRST_GENERATION_ID = 101
# Names are made of the ids, not drawn: running the demo again gives the same seeds and so the same pictures.
NAMESPACE = uuid.UUID("0d3f6c1e-92f4-4a53-8f53-6c3c1f4de0b1")


@dataclass(frozen=True, slots=True)
class DemoJob:
    """One job; `style` is an adapter's name or empty, `signature` a picture's name or empty. `more` are fields of its
    message that only its kind has, and `kind` what the sheet calls it."""

    subject: str
    style: str
    steps: int
    guidance: float
    seed: int | None
    signature: str
    artist: str
    position: str = "bottom-right"
    size: str = "medium"
    generation_id: int = 0
    kind: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        return f"{self.style}: {self.subject}" if self.style else self.subject


_JOBS = (
    DemoJob("a red fox on a blue background", "", 20, 3.0, 42, "monogram", ""),
    DemoJob("a rocket", "blueprint", 16, 3.0, 7, "", "서울 아틀리에"),
    DemoJob("a robot", "neon", 24, 3.0, 11, "seal", "", "bottom-left", "small"),
    DemoJob("an owl", "sepia", 12, 3.0, 5, "", "Atelier Nord", "bottom-left"),
    DemoJob("hamburger on a yellow background", "", 8, 2.5, None, "seal", "", "top-right"),
    DemoJob("a castle", "neon", 20, 3.0, 21, "", "서울 아틀리에", "bottom-center"),
    DemoJob("a sailboat", "blueprint", 30, 3.0, 5, "monogram", "", "bottom-left"),
    DemoJob("a cup of coffee", "sepia", 20, 3.0, 9, "seal", "", "bottom-right", "small"),
    DemoJob("a snowman on a purple background", "", 14, 3.0, 77, "", "Mina K.", "top-center", "large"),
    DemoJob("a pineapple", "pixel", 12, 3.0, None, "monogram", "", "top-right"),
    DemoJob("a bicycle", "blueprint", 18, 3.0, 13, "", "서울 아틀리에", "bottom-right", "large"),
    DemoJob("a penguin on a green background", "", 25, 3.0, 1, "monogram", "", "bottom-left", "small"),
    DemoJob(
        "a basketball",
        "",
        20,
        3.0,
        1,
        "",
        "Mina K.",
        kind="image to image",
        more={"kind": "image2image", "init_image_path": "uploads/ball.png", "strength": 0.6},
    ),
    DemoJob(
        "a red apple",
        "",
        20,
        3.0,
        1,
        "",
        "Mina K.",
        kind="left half repainted",
        more={"kind": "inpaint", "init_image_path": "uploads/ball.png", "mask_path": "uploads/left-half.png"},
    ),
    DemoJob(
        "a rocket on a blue background",
        "",
        20,
        3.0,
        1,
        "seal",
        "",
        size="small",
        kind="a headline",
        more={"text_overlay": {"text": "출발", "position": "auto"}},
    ),
    DemoJob(
        "a rainbow on a blue background",
        "",
        20,
        3.0,
        3,
        "",
        "Atelier Nord",
        "top-right",
        kind="a product on it",
        more={
            "kind": "product",
            "product": {"cutout_path": "uploads/bottle.png", "layout": {"scale": 0.6, "position": "bottom-center"}},
        },
    ),
)

JOBS = tuple(
    DemoJob(**{name: getattr(job, name) for name in job.__slots__} | {"generation_id": FIRST_GENERATION_ID + index})
    for index, job in enumerate(_JOBS)
)


def message(job: DemoJob, bucket: str) -> bytes:
    """Build the job's message as a backend publishes it: odd ids in the documented dialect, even ones in the flat
    one.
    """
    fields = _documented(job, bucket) if job.generation_id % 2 else _flat(job, bucket)
    body = {
        "task_id": str(uuid.uuid5(NAMESPACE, str(job.generation_id))),
        "type": "image_generation",
        "data": fields,
        "created_at": datetime.now(UTC).isoformat(),
    }
    return json.dumps(body, ensure_ascii=False).encode()


def _documented(job: DemoJob, bucket: str) -> dict[str, Any]:
    parameters = {"steps": job.steps, "cfg_scale": job.guidance, "seed": job.seed, "scheduler": "dpm++"}
    return _common(job) | {
        "lora_path": f"s3://{bucket}/models/{job.style}.safetensors" if job.style else "",
        "signature_path": f"s3://{bucket}/signatures/{job.signature}.png" if job.signature else "",
        "parameters": parameters,
    }


def _flat(job: DemoJob, bucket: str) -> dict[str, Any]:
    del bucket  # bare keys: the default bucket
    return _common(job) | {
        "lora_path": f"models/{job.style}.safetensors" if job.style else "",
        "signature_path": f"signatures/{job.signature}.png" if job.signature else "",
        "num_inference_steps": job.steps,
        "guidance_scale": job.guidance,
        "seed": job.seed,
    }


def _common(job: DemoJob) -> dict[str, Any]:
    return {
        "generation_id": job.generation_id,
        "prompt": job.prompt,
        "lora_scale": 1.0,
        "aspect_ratio": "1:1",
        "artist_name": job.artist,
        "signature_config": {"position": job.position, "size": job.size, "opacity": 0.8},
        "prompt_tags": job.subject.split(),
        **job.more,
    }
