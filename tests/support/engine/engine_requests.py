"""A request for the demo model, for tests that call the engine without a worker around it."""

from typing import Any

from inference.request import GenerationRequest


def request_of(**fields: Any) -> GenerationRequest:
    """Build a short request with these fields changed."""
    defaults: dict[str, Any] = {
        "request_id": "r",
        "prompt": "a red fox",
        "negative_prompt": "blurry",
        "width": 128,
        "height": 128,
        "num_inference_steps": 8,
        "guidance_scale": 3.0,
        "seeds": (42,),
    }
    return GenerationRequest(**defaults | fields)
