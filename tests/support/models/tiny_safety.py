"""A tiny random safety checker in a checkpoint's folder, with a threshold of the tests' choice."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker, cosine_distance
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor

WIDTH = 16
PIXELS = 32
# A cosine is never above 1, nor below -1.
NOTHING, EVERYTHING = 2.0, -2.0


def add_tiny_checker(folder: Path, threshold: float, *, seed: int = 0) -> Path:
    """Give the Stable Diffusion in `folder` a checker that flags what is nearer to its one concept than `threshold`."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": PIXELS,
        "patch_size": 8,
    }
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        checker = StableDiffusionSafetyChecker(CLIPConfig(projection_dim=WIDTH, vision_config=vision))
        checker.concept_embeds.normal_()
        checker.concept_embeds_weights.fill_(NOTHING)
        checker.concept_embeds_weights[0] = threshold
        checker.special_care_embeds_weights.fill_(NOTHING)
    checker.save_pretrained(folder / "safety_checker")
    CLIPImageProcessor(size={"shortest_edge": PIXELS}, crop_size=PIXELS).save_pretrained(folder / "feature_extractor")
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def nearness(pipe: Any, image: Image.Image) -> float:
    """Compute the similarity of the image to the concept of a plain pipeline's checker, -1 to 1."""
    checker, extractor = pipe.safety_checker, pipe.feature_extractor
    with torch.no_grad():
        seen = checker.vision_model(extractor(image, return_tensors="pt").pixel_values)[1]
        return float(cosine_distance(checker.visual_projection(seen), checker.concept_embeds)[0, 0])
