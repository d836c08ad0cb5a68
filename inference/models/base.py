"""What the engine's loop wants of a model: conditioning, a lane's first step, forwards of many lanes, pictures."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from config.redacting import quoted
from inference.checkpoints.safety_checker import SafetyChecker
from inference.controlnet.guide import Guide
from inference.controlnet.loader import ControlNets
from inference.device.attention import AttentionOrder
from inference.device.decoded_image import DecodedImage, image_of
from inference.device.uploads import upload
from inference.errors import RequestFailed
from inference.lane import BatchTraits, Embedding, Lane
from inference.latents.preview_projection import Projection, find_projection
from inference.latents.source import EncodedSource, check_size, encode
from inference.lora.adapter import Adapter, blank_adapter, check_fits, read_adapter
from inference.lora.adapter_memory import AdapterMemory
from inference.lora.bank import AdapterBank, PackedAdapter, RowAdapters
from inference.lora.key_names import KeyNaming
from inference.request import KINDS, GenerationRequest, Source
from inference.sampling.samplers import Sampler, Samplers, predict_x0
from inference.sampling.schedulers import SchedulerTable
from inference.sampling.trajectory import StepPlan


class Prompt(NamedTuple):
    """A text. `is_left_out`: an empty negative prompt, which is none at all to some families."""

    text: str
    is_left_out: bool = False


class Family(ABC):
    """Owner of the resident model and its adapter bank.

    The engine's one thread calls it; `read_adapter` and `prepare` run on any.
    """

    name: ClassVar[str]
    schedulers: ClassVar[SchedulerTable]
    # Where neither job nor settings name any.
    default_steps: ClassVar[int] = 50
    default_guidance: ClassVar[float] = 7.5
    # Those of the models that adapters change.
    text_encoders: ClassVar[tuple[str, ...]] = ()
    # The kinds of request that the checkpoint can draw.
    kinds: tuple[str, ...] = KINDS
    # Does its denoiser read the mask, and what is to be kept of the picture?
    _is_inpainting = False
    # Do embeddings come in chunks of one length, of which a lane's two rows must have equally many?
    is_chunked: ClassVar[bool] = False
    # diffusers' class of the ControlNets that it takes.
    controlnet_class: ClassVar[str]
    # The checkpoint's, as everybody may hear it.
    public_name = ""

    def __init__(
        self,
        pipeline: Any,
        models: Mapping[str, torch.nn.Module],
        naming: KeyNaming,
        *,
        device: torch.device,
        memory: AdapterMemory,
    ) -> None:
        """`pipeline` is loaded and where it is to stay; `models` are those that adapters change, by name."""
        self.device = device
        self._pipeline = pipeline
        self._models = models
        self._naming = naming
        self._attention = AttentionOrder(device)
        self.bank = AdapterBank(models, device=device, dtype=pipeline.dtype, memory=memory)
        # None unless it was asked for: a pipeline is loaded without.
        is_checked = getattr(pipeline, "safety_checker", None) is not None
        self.safety_checker = SafetyChecker(pipeline, device) if is_checked else None
        self.samplers = Samplers(self.schedulers, pipeline.scheduler.config)
        self.controlnets = ControlNets({}, max_bytes=0, device=device, dtype=pipeline.dtype)
        if device.type == "cuda":
            # Convolutions run on tensor cores without a transpose around each of them.
            pipeline.vae.to(memory_format=torch.channels_last)

    @property
    @abstractmethod
    def base_size(self) -> int:
        """The side, in pixels, of the square picture the checkpoint was trained for."""

    @property
    @abstractmethod
    def size_multiple(self) -> int:
        """Width and height, in pixels, are multiples of it."""

    @abstractmethod
    def batch_traits(self, request: GenerationRequest) -> BatchTraits:
        """Whom the request's lanes may share a forward with, and how many rows they take in it."""

    @abstractmethod
    def encode(self, prompts: Sequence[Prompt], adapters: Sequence[RowAdapters]) -> list[Embedding]:
        """Each prompt's embedding, under its own adapters. `RequestFailed` where the model cannot read one whole."""

    @abstractmethod
    def _denoise(self, lanes: Sequence[Lane]) -> list[torch.Tensor]:
        """Run the forward of `denoise`, the ControlNets' before it."""

    @abstractmethod
    def encode_control(self, picture: torch.Tensor) -> torch.Tensor:
        """What a ControlNet reads at every step for a picture [3, height, width] from 0 to 1, on the device."""

    @abstractmethod
    def _controlnet_mismatch(self, config: Any) -> str | None:
        """What of a ControlNet's config does not go with the model; None where all does."""

    @abstractmethod
    def _latent_shape(self, request: GenerationRequest) -> tuple[int, int, int]:
        """Channels, height and width of a picture's latents."""

    def _shift(self, request: GenerationRequest) -> float | None:
        """What the request's size moves its noise levels by, where it does."""
        return None

    def denoise(self, lanes: Sequence[Lane]) -> list[torch.Tensor]:
        """One forward for lanes of one shape: a guided prediction [channels, height, width] each, fp32."""
        with self._attention.applied():
            return self._denoise(lanes)

    def check(self, request: GenerationRequest) -> None:
        """Raise `RequestFailed` where the request asks for what the family cannot do."""
        if request.cfg_normalization or request.cfg_truncation != 1:
            reason = f"cfg_normalization and cfg_truncation belong to Z-Image; this worker runs {self.name}"
            raise RequestFailed("INVALID_INPUT", reason)

    def set_controlnets(self, controlnets: ControlNets) -> None:
        """Let jobs name these. EngineStartFailed where one was not made for this model."""
        controlnets.check(self.controlnet_class, self._controlnet_mismatch)
        self.controlnets = controlnets

    def load_control(self, name: str) -> Any:
        """The ControlNet, ready on the device. On the loading thread; `EngineFault` where it cannot be read."""
        return self.controlnets.load(name)

    def check_control(self, request: GenerationRequest) -> None:
        """Raise `RequestFailed` where the request asks for a ControlNet that is not there."""
        names = self.controlnets.names
        if request.control is not None and request.control.model not in names:
            known = f"has {', '.join(names)}" if names else "has none"
            reason = f"control model {quoted(request.control.model)} is not known; this worker {known}"
            raise RequestFailed("UNSUPPORTED_BY_MODEL", reason)

    def read_adapter(self, weights: Path, config: Path | None) -> Adapter:
        """The adapter in a file; an `AdapterError` unless it is whole and every layer fits."""
        adapter = read_adapter(weights, config, self._naming)
        check_fits(adapter, self._models)
        return adapter

    def pack(self, adapter: Adapter) -> PackedAdapter:
        """The adapter as the bank takes it."""
        return self.bank.pack(adapter)

    def blank_adapter(self) -> Adapter:
        """An adapter that changes nothing and is computed like any other."""
        return blank_adapter({name: one for name, one in self._models.items() if name not in self.text_encoders})

    def num_steps_of(self, request: GenerationRequest) -> int:
        """The steps that are taken of those asked for: with a source the last ones, as many as its strength says."""
        if request.source is None:
            return request.num_inference_steps
        return min(int(request.num_inference_steps * request.source.strength), request.num_inference_steps)

    def prepare(self, request: GenerationRequest) -> None:
        """Find the request's course of noise levels ahead of `begin`. Raises what it ends with."""
        self.check(request)
        self._check_kind(request)
        self.check_control(request)
        self.samplers.prepare(self._step_plan(request))

    def begin(self, lane: Lane, *, in_tiles: bool = False) -> tuple[str, Sampler]:
        """The lane's sampler at its first step, and its scheduler's name. `in_tiles`: how a source is encoded."""
        request = lane.owner.request
        # Noise comes from the CPU and in 32 bits, so that a seed gives the same picture on any device.
        generator = torch.Generator().manual_seed(lane.seed)

        def draw() -> torch.Tensor:
            return self._uploaded(torch.randn(self._latent_shape(request), generator=generator))

        if request.source is None:
            return self.samplers.begin(self._step_plan(request), draw(), generator)
        if lane.owner.source is None:
            lane.owner.source = self._encoded(request, request.source, in_tiles=in_tiles)
        noise, origin = lane.owner.source.begin(draw, self._scaled)
        return self.samplers.begin(self._step_plan(request), noise, generator, origin)

    def decode(self, latents: torch.Tensor, *, in_tiles: bool = False) -> DecodedImage:
        """Launch the decoding of latents [channels, height, width]. Tiles take less memory and blend where they meet.

        Raises out of memory at once; what else goes wrong on the device shows when the image is waited for.
        """
        vae = self._pipeline.vae
        vae.use_tiling = in_tiles
        decoded = vae.decode(self._unscaled(latents[None].to(vae.dtype)), return_dict=False)[0][0]
        return image_of(decoded.float())

    def check_picture(self, pixels: NDArray[np.uint8]) -> None:
        """Raise `RequestFailed` where a safety checker is loaded and flags the picture [height, width, 3]."""
        if self.safety_checker is not None:
            self.safety_checker.check(pixels)

    def find_projection(self) -> Projection:
        """What makes a small picture of latents, by a small encoding of the VAE's."""
        with torch.inference_mode():
            return find_projection(self._pipeline.vae, self._unscaled, self.device)

    def predict_x0(self, lane: Lane, prediction: torch.Tensor) -> torch.Tensor:
        """The finished latents as far as they can be told before the lane takes its step by `prediction`."""
        sampler = sampler_of(lane)
        # What it read behind the latents tells nothing of the noise.
        latents = sampler.model_input()[: len(prediction)]
        return predict_x0(latents, sampler.timestep, prediction, self._pipeline.scheduler)

    def _unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [1, channels, height, width] in the VAE's own scale."""
        return latents / float(self._pipeline.vae.config.scaling_factor)

    def _scaled(self, latents: torch.Tensor) -> torch.Tensor:
        """The VAE's latents [channels, height, width] in the denoiser's scale: the way back."""
        return latents * float(self._pipeline.vae.config.scaling_factor)

    def _step_plan(self, request: GenerationRequest) -> StepPlan:
        num_steps = request.num_inference_steps
        num_skipped = None if request.source is None else num_steps - self.num_steps_of(request)
        return StepPlan(request.scheduler, num_steps, self._shift(request), num_skipped)

    def _begins_from_noise(self, source: Source) -> bool:
        """Does a lane at full strength leave its picture out, but for what is kept? diffusers' inpainting does."""
        return source.mask is not None and source.strength >= 1

    def _encoded(self, request: GenerationRequest, source: Source, *, in_tiles: bool) -> EncodedSource:
        return encode(
            self._pipeline.vae,
            source,
            size=(request.height, request.width),
            is_hidden=self._begins_from_noise(source),
            is_inpainting=self._is_inpainting,
            upload=self._uploaded,
            dtype=self._encoding_dtype,
            in_tiles=in_tiles,
        )

    @property
    def _encoding_dtype(self) -> torch.dtype:
        """What the VAE encodes a source in."""
        dtype: torch.dtype = self._pipeline.vae.dtype
        return dtype

    def _check_kind(self, request: GenerationRequest) -> None:
        if request.kind not in self.kinds:
            reason = f"this worker's model draws {', '.join(self.kinds)} and nothing else: not {request.kind}"
            raise RequestFailed("UNSUPPORTED_BY_MODEL", reason)
        if request.source is None:
            return
        check_size(request.source, size=(request.height, request.width))
        if self.num_steps_of(request) < 1:
            given = f"strength {request.source.strength} of {request.num_inference_steps} steps"
            raise RequestFailed("INVALID_INPUT", f"{given} leaves no step: ask for a higher strength or for more steps")

    def _upload(self, values: Any) -> torch.Tensor:
        return self._uploaded(torch.tensor(values, dtype=torch.float32))

    def _uploaded(self, host: torch.Tensor) -> torch.Tensor:
        return upload(host, self.device)


def sampler_of(lane: Lane) -> Sampler:
    """A joined lane's sampler."""
    assert lane.sampler is not None, "a lane has its sampler from joining on"  # noqa: S101
    return lane.sampler


def guides_of(rows: Sequence[Lane]) -> dict[int, Guide]:
    """What each row, by its number, follows at the coming step, where it has something to follow."""
    guides = {number: lane.guide for number, lane in enumerate(rows)}
    return {number: guide for number, guide in guides.items() if guide is not None}


def embedding_of(lane: Lane, *, is_negative: bool) -> Embedding:
    """What guides one of a joined lane's rows."""
    conditioning = lane.owner.conditioning
    assert conditioning is not None, "a lane has its conditioning from joining on"  # noqa: S101
    embedding = conditioning.negative if is_negative else conditioning.positive
    assert embedding is not None, "a guided lane has a negative prompt's embedding"  # noqa: S101
    return embedding
