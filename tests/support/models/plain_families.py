"""What plain diffusers draws for a request, whatever the checkpoint's family, by none of the engine's own choices."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import diffusers
import numpy as np
import torch
from compel import CompelForSD, CompelForSDXL
from PIL import Image

from inference.request import GenerationRequest, Source
from tests.support.images.parity import pipe_with


class Choice(NamedTuple):
    """A scheduler as its users set it up: a class, and what they change in the checkpoint's own configuration."""

    scheduler: Any
    changes: Mapping[str, Any] = MappingProxyType({})


DIFFUSION_CHOICES = {
    "dpm++": Choice(diffusers.DPMSolverMultistepScheduler),
    "dpm++_karras": Choice(diffusers.DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "euler": Choice(diffusers.EulerDiscreteScheduler),
    "euler_a": Choice(diffusers.EulerAncestralDiscreteScheduler),
    "ddim": Choice(diffusers.DDIMScheduler),
    "unipc": Choice(diffusers.UniPCMultistepScheduler),
    "heun": Choice(diffusers.HeunDiscreteScheduler),
    "lcm": Choice(diffusers.LCMScheduler),
}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
FLOW_CHOICES = {
    "euler": Choice(diffusers.FlowMatchEulerDiscreteScheduler),
    "lcm": Choice(diffusers.FlowMatchLCMScheduler),
    "unipc": Choice(diffusers.UniPCMultistepScheduler, FLOW),
    "dpm++": Choice(diffusers.DPMSolverMultistepScheduler, FLOW),
    "heun": Choice(diffusers.FlowMatchHeunDiscreteScheduler),
}
DEFAULTS = {
    "StableDiffusionPipeline": "dpm++",
    "StableDiffusionXLPipeline": "euler",
    "ZImagePipeline": "euler",
    "FluxPipeline": "euler",
    "ChromaPipeline": "euler",
    "QwenImagePipeline": "euler",
    "Flux2KleinPipeline": "euler",
    "Krea2Pipeline": "euler",
    "StableDiffusionInpaintPipeline": "dpm++",
    "StableDiffusionXLInpaintPipeline": "euler",
}
FLOW_PIPELINES = (
    diffusers.ZImagePipeline,
    diffusers.FluxPipeline,
    diffusers.ChromaPipeline,
    diffusers.QwenImagePipeline,
    diffusers.Flux2KleinPipeline,
    diffusers.Krea2Pipeline,
)
# The pipelines that begin with a picture, and those that repaint a part of one, by the pipeline that draws from text.
FROM_IMAGE = {
    "StableDiffusionPipeline": diffusers.StableDiffusionImg2ImgPipeline,
    "StableDiffusionXLPipeline": diffusers.StableDiffusionXLImg2ImgPipeline,
    "ZImagePipeline": diffusers.ZImageImg2ImgPipeline,
    "FluxPipeline": diffusers.FluxImg2ImgPipeline,
    "ChromaPipeline": diffusers.ChromaImg2ImgPipeline,
    "QwenImagePipeline": diffusers.QwenImageImg2ImgPipeline,
}
REPAINTING = {
    "StableDiffusionPipeline": diffusers.StableDiffusionInpaintPipeline,
    "StableDiffusionInpaintPipeline": diffusers.StableDiffusionInpaintPipeline,
    "StableDiffusionXLPipeline": diffusers.StableDiffusionXLInpaintPipeline,
    "StableDiffusionXLInpaintPipeline": diffusers.StableDiffusionXLInpaintPipeline,
    "ZImagePipeline": diffusers.ZImageInpaintPipeline,
    "FluxPipeline": diffusers.FluxInpaintPipeline,
    "ChromaPipeline": diffusers.ChromaInpaintPipeline,
    "QwenImagePipeline": diffusers.QwenImageInpaintPipeline,
}


def alone(checkpoint: Path, request: GenerationRequest, **embeddings: torch.Tensor) -> Image.Image:
    """Generate the request's first image with a pipeline that has the request's own adapters alone.

    `embeddings` take the prompts' place. No negative prompt is None, as a diffusers user leaves it out.
    """
    return drawn_by(pipe_with(checkpoint, *request.adapters), request, **embeddings)


def drawn_by(pipe: Any, request: GenerationRequest, **embeddings: torch.Tensor) -> Image.Image:
    """Generate it with a pipeline that has the adapters already, in the dtype that it was loaded in."""
    generator = torch.Generator().manual_seed(request.seeds[0])
    arguments: dict[str, Any] = {
        "width": request.width,
        "height": request.height,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "generator": generator,
    }
    if request.guidance_rescale:
        arguments["guidance_rescale"] = request.guidance_rescale
    if embeddings:
        arguments |= embeddings
    else:
        arguments |= {"prompt": request.prompt, "negative_prompt": request.negative_prompt or None}
    if isinstance(pipe, diffusers.Flux2KleinPipeline):
        # Its own negative prompt is empty; another comes as its embedding.
        negative = arguments.pop("negative_prompt", None)
        if negative and request.guidance_scale > 1 and not pipe.config.is_distilled:
            arguments["negative_prompt_embeds"] = pipe.encode_prompt(negative)[0]
    if request.references:
        arguments["image"] = [Image.frombytes("RGB", (one.width, one.height), one.rgb) for one in request.references]
    name = request.scheduler or DEFAULTS[type(pipe).__name__]
    is_flow = isinstance(pipe, FLOW_PIPELINES)
    if pipe.dtype != torch.float32:
        arguments["latents"] = noise_of(pipe, request, generator)
    if request.source is not None:
        # Before the scheduler is chosen: some of them change the configuration of the one they are made with.
        pipe = _with_source(pipe, scheduler=name, is_masked=request.source.mask is not None)
        arguments |= _source_arguments(request, request.source)
        if request.kind == "image2image" and not is_flow:
            # They take the picture's size.
            del arguments["width"], arguments["height"]
    if is_flow:
        arguments |= _guidance(pipe, request)
        pipe.scheduler = _flow_scheduler(name, pipe.scheduler.config, generator)
    else:
        choice = DIFFUSION_CHOICES[name]
        pipe.scheduler = choice.scheduler.from_config(pipe.scheduler.config, **choice.changes)
    return pipe(**arguments).images[0]  # type: ignore[no-any-return]


def _guidance(pipe: Any, request: GenerationRequest) -> dict[str, Any]:
    """Return the options of guidance that only one family has, and how much FLUX.1 schnell reads of a prompt."""
    if isinstance(pipe, diffusers.Flux2KleinPipeline):
        return {}
    if hasattr(pipe, "text_encoder_2"):
        max_tokens = 512 if pipe.transformer.config.guidance_embeds else 256
        return {"true_cfg_scale": request.true_cfg_scale or 1.0, "max_sequence_length": max_tokens}
    if isinstance(pipe.transformer, diffusers.ChromaTransformer2DModel | diffusers.Krea2Transformer2DModel):
        return {}
    if isinstance(pipe.transformer, diffusers.QwenImageTransformer2DModel):
        return {
            "guidance_scale": None,
            "true_cfg_scale": request.guidance_scale if request.true_cfg_scale is None else request.true_cfg_scale,
            "negative_prompt": request.negative_prompt or " ",
        }
    return {"cfg_normalization": request.cfg_normalization, "cfg_truncation": request.cfg_truncation}


def embeddings_by_compel(pipe: Any, request: GenerationRequest) -> dict[str, torch.Tensor]:
    """Encode the prompts with compel's own wrapper, whatever their length, for `drawn_by`."""
    compel = (CompelForSDXL if hasattr(pipe, "text_encoder_2") else CompelForSD)(pipe)
    with torch.no_grad():
        made = compel(request.prompt, negative_prompt=request.negative_prompt)
    embeddings = {"prompt_embeds": made.embeds, "negative_prompt_embeds": made.negative_embeds}
    if made.pooled_embeds is not None:
        embeddings |= {
            "pooled_prompt_embeds": made.pooled_embeds,
            "negative_pooled_prompt_embeds": made.negative_pooled_embeds,
        }
    return embeddings


def noise_of(pipe: Any, request: GenerationRequest, generator: torch.Generator) -> torch.Tensor:
    """Generate the initial noise for a pipeline of 16 bits: sampled in fp32, as the engine samples it in every dtype.

    The pipelines with a UNet, and FLUX.1's, sample it in their own dtype. Before torch 2.12 the CPU's generator makes
    other noise of a seed in 16 bits than in 32: without this the images are as different as those of two seeds.
    """
    if isinstance(pipe, diffusers.Flux2KleinPipeline):
        channels, (height, width) = pipe.transformer.config.in_channels, (request.height // 16, request.width // 16)
        return torch.randn((1, channels, height, width), generator=generator)
    is_krea2 = isinstance(pipe, diffusers.Krea2Pipeline)
    channels = pipe.vae.config.z_dim if is_krea2 else pipe.vae.config.latent_channels
    height, width = (side // pipe.vae_scale_factor for side in (request.height, request.width))
    noise = torch.randn((1, channels, height, width), generator=generator)
    if is_krea2 or isinstance(pipe, diffusers.FluxPipeline | diffusers.ChromaPipeline):
        return pipe._pack_latents(noise, 1, channels, height, width)  # type: ignore[no-any-return]
    return noise if isinstance(pipe, diffusers.ZImagePipeline) else noise.to(pipe.dtype)


def _with_source(pipe: Any, *, scheduler: str, is_masked: bool) -> Any:
    """Put the pipeline's models into the pipeline that takes a source image."""
    made = (REPAINTING if is_masked else FROM_IMAGE)[type(pipe).__name__].from_pipe(pipe, dtype=torch.float32)
    made.set_progress_bar_config(disable=True)
    if isinstance(made, diffusers.ChromaInpaintPipeline):
        # It asks for an entry of FLUX.1's config (diffusers 0.42).
        made.transformer.register_to_config(guidance_embeds=False)
    if scheduler == "heun" and isinstance(pipe, FLOW_PIPELINES):
        # It counts two timesteps to a step; the pipeline takes them for as many steps.
        plain = made.get_timesteps
        made.get_timesteps = lambda num_timesteps, *rest: plain((num_timesteps + 1) // 2, *rest)
    return made


def _source_arguments(request: GenerationRequest, source: Source) -> dict[str, Any]:
    size = (request.width, request.height)
    arguments: dict[str, Any] = {"image": Image.frombytes("RGB", size, source.rgb), "strength": source.strength}
    if source.mask is not None:
        arguments["mask_image"] = Image.frombytes("L", size, source.mask)
    return arguments


def _flow_scheduler(name: str, config: Any, generator: torch.Generator) -> Any:
    """Adapt the scheduler to the arguments of `ZImagePipeline`. Only its own ("euler") needs no adapting."""
    choice = FLOW_CHOICES[name]
    shift = {"flow_shift": config.shift} if choice.changes is FLOW else {}
    scheduler = choice.scheduler.from_config(config, **choice.changes, **shift)
    if name in {"euler_a", "lcm"}:
        # The pipeline would have them draw from the process's own noise.
        scheduler.step = partial(scheduler.step, generator=generator)
    elif name == "unipc":
        scheduler.set_timesteps = _with_array(scheduler.set_timesteps)
        scheduler.scale_noise = _with_its_own_name(scheduler.add_noise)
    elif name == "dpm++":
        scheduler.set_timesteps = _with_own_steps(scheduler.set_timesteps, takes_mu=config.use_dynamic_shifting)
        scheduler.scale_noise = _with_its_own_name(scheduler.add_noise)
    elif name == "heun":
        scheduler.set_timesteps = _with_own_steps(scheduler.set_timesteps, takes_mu=False)
    return scheduler


def _with_its_own_name(add_noise: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Make a `scale_noise` of the scheduler's `add_noise`, which takes its arguments in another order."""

    def scale_noise(sample: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return add_noise(sample, noise, timestep)

    return scale_noise


def _with_array(set_timesteps: Callable[..., None]) -> Callable[..., None]:
    """Pass UniPC an array, which it calculates with; Z-Image's pipeline gives a list, FLUX.1's from text none."""

    def set_by_array(num_steps: int | None = None, *, sigmas: Any = None, mu: float, device: Any) -> None:
        set_timesteps(num_steps, sigmas=None if sigmas is None else np.array(sigmas), mu=mu, device=device)

    return set_by_array


def _with_own_steps(set_timesteps: Callable[..., None], *, takes_mu: bool) -> Callable[..., None]:
    """Drop the noise levels for a scheduler that takes none and spaces its own."""

    def set_by_number(num_steps: int | None = None, *, sigmas: Any = (), mu: float, device: Any) -> None:
        set_timesteps(num_steps or len(sigmas), device=device, **({"mu": mu} if takes_mu else {}))

    return set_by_number
