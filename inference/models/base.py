"""The interface of a model family to the engine: embeddings, samplers, forwards of many lanes, decoded images."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from inference.checkpoints.offload import HostedWeights
from inference.checkpoints.safety_checker import SafetyChecker
from inference.controlnet.loader import ControlNets
from inference.device.attention import AttentionOrder
from inference.device.decoded_image import DecodedImage, image_of
from inference.device.forward_graphs import Capture, ForwardGraphs, ForwardInputs, padded_rows
from inference.device.uploads import upload
from inference.errors import EngineStartFailed
from inference.lane import BatchTraits, Embedding, Lane
from inference.latents.preview_projection import Projection, find_projection
from inference.latents.source import EncodedSource, encode
from inference.lora.adapter import Adapter, blank_adapter, check_fits, read_adapter
from inference.lora.adapter_memory import AdapterMemory
from inference.lora.bank import AdapterBank, PackedAdapter
from inference.lora.names.key_names import KeyNaming
from inference.lora.products.rows import RowAdapters
from inference.models.checks import check_control, check_kind, check_options, check_source
from inference.models.compiling import BlockCompiler
from inference.models.inputs import Prompt, sampler_of
from inference.request import USUAL_KINDS, GenerationRequest, Source
from inference.sampling.samplers import Sampler, Samplers, predict_x0
from inference.sampling.schedulers import SchedulerTable
from inference.sampling.trajectory import StepPlan


class Family(ABC):
    """Owner of the resident model and its adapter bank.

    The engine's one thread calls it; `read_adapter` and `prepare` run on any.
    """

    name: ClassVar[str]
    schedulers: ClassVar[SchedulerTable]
    # Used where neither job nor settings name any.
    default_steps: int = 50
    default_guidance: float = 7.5
    # Those of `checks.OPTIONS` that a request may set.
    options: ClassVar[Collection[str]] = ()
    # Fields of a warm-up request whose lanes have two rows.
    guided_fields: ClassVar[Mapping[str, Any]] = {"guidance_scale": 5.0}
    # The text encoders among the models that adapters change.
    text_encoders: ClassVar[tuple[str, ...]] = ()
    # The kinds of request that the checkpoint supports.
    kinds: tuple[str, ...] = USUAL_KINDS
    # True for inpainting checkpoints, whose UNet takes mask and masked image as extra channels.
    _is_inpainting = False
    # True where embeddings are chunks of one length, of which a lane's two rows must have equally many.
    is_chunked: ClassVar[bool] = False
    # True where a lane with a mask starts from noise alone at full strength, as in diffusers' inpainting.
    is_hidden_at_full_strength: ClassVar[bool] = True
    # Layers of the denoiser whose input is [tokens of all rows, in].
    concatenated_layers: ClassVar[tuple[str, ...]] = ()
    # False where the VAE's convolutions are of videos.
    is_vae_of_images: ClassVar[bool] = True
    # The class in diffusers of its ControlNets; None where there are none.
    controlnet_class: ClassVar[str | None]
    # The checkpoint's name for logs and status.
    public_name = ""

    def __init__(
        self,
        pipeline: Any,
        models: Mapping[str, torch.nn.Module],
        *,
        device: torch.device,
        memory: AdapterMemory,
    ) -> None:
        """Own `pipeline`, loaded and placed; `models` are those that adapters change, by name."""
        self.device = device
        self._pipeline = pipeline
        self._models = models
        # The dtype in which the VAE encodes a source.
        self._encoding_dtype: torch.dtype = pipeline.vae.dtype
        self._attention = AttentionOrder(device)
        self._blocks = BlockCompiler()
        # None unless forwards are captured.
        self._graphs: ForwardGraphs | None = None
        # False where the last forward was a graph's: it took no memory for its activations.
        self.ran_eagerly = True
        self.bank = AdapterBank(models, device=device, dtype=pipeline.dtype, memory=memory)
        # A pipeline is loaded without one unless SAFETY_CHECKER is on.
        is_checked = getattr(pipeline, "safety_checker", None) is not None
        self.safety_checker = SafetyChecker(pipeline, device) if is_checked else None
        self.samplers = Samplers(self.schedulers, pipeline.scheduler.config)
        self.controlnets = ControlNets({}, max_bytes=0, device=device, dtype=pipeline.dtype)
        if device.type == "cuda" and self.is_vae_of_images:
            # Convolutions run on tensor cores without a transpose around each of them.
            pipeline.vae.to(memory_format=torch.channels_last)

    @classmethod
    @abstractmethod
    def naming_of(cls, config: Mapping[str, Any]) -> KeyNaming:
        """Return the names of layers in adapter files, of the denoiser's config, which may be empty before a load."""

    @property
    @abstractmethod
    def base_size(self) -> int:
        """The side, in pixels, of the square images of the checkpoint's training."""

    @property
    @abstractmethod
    def size_multiple(self) -> int:
        """The divisor, in pixels, of width and height."""

    @abstractmethod
    def batch_traits(self, request: GenerationRequest) -> BatchTraits:
        """Return which lanes share a forward with the request's, and the number of rows each takes."""

    @abstractmethod
    def encode(self, prompts: Sequence[Prompt], adapters: Sequence[RowAdapters]) -> list[Embedding]:
        """Embed each prompt under its own adapters. `RequestFailed` where one is too long for the model."""

    @abstractmethod
    def _denoise(self, lanes: Sequence[Lane]) -> list[torch.Tensor]:
        """Run the ControlNets and the forward of `denoise`."""

    @abstractmethod
    def encode_control(self, image: torch.Tensor) -> torch.Tensor:
        """Encode a control image [3, height, width] from 0 to 1 as its ControlNet reads it, on the device."""

    @abstractmethod
    def _controlnet_mismatch(self, config: Any) -> str | None:
        """Return how a ControlNet's config does not match the model; None where it does."""

    @abstractmethod
    def _latent_shape(self, request: GenerationRequest) -> tuple[int, int, int]:
        """Return channels, height and width of the latents."""

    def _shift(self, request: GenerationRequest) -> float | None:
        """Return the shift of the noise levels by the request's size; None for families without."""
        return None

    def denoise(self, lanes: Sequence[Lane]) -> list[torch.Tensor]:
        """Run one forward for lanes of one shape. Returns a guided prediction of the sampler's shape each, fp32."""
        self.ran_eagerly = True
        with self._attention.applied(), self._blocks.applied():
            return self._denoise(lanes)

    def hosted_weights(self) -> HostedWeights:
        """Return the weights, which are in host memory, for moves to the device and back."""
        models = [one for one in self._pipeline.components.values() if isinstance(one, torch.nn.Module)]
        return HostedWeights(models, self.device)

    def compile_blocks(self) -> None:
        """Compile the denoiser's blocks in the coming forwards; see `BlockCompiler`."""
        self._blocks.compile(self._denoiser)

    def end_compiling(self) -> None:
        """Let the blocks' graphs be those that there are."""
        self._blocks.seal()

    def capture_forwards(self, capture: Capture) -> None:
        """Capture coming forwards as graphs; see `ForwardGraphs`. EngineStartFailed where the model is offloaded."""
        if hasattr(self._denoiser, "_hf_hook"):
            remedy = "free memory of the GPU, or set COMPILE=blocks"
            raise EngineStartFailed(f"COMPILE=graphs needs the whole model on the GPU, which it does not fit: {remedy}")
        self._graphs = ForwardGraphs(capture)

    @property
    def num_bytes_of_graphs(self) -> int:
        """Memory of the device that captured forwards keep although the allocator counts it as free."""
        return self._graphs.num_bytes if self._graphs else 0

    def drop_graphs(self) -> bool:
        """Free the memory of captured forwards; False where there were none."""
        return self._graphs is not None and self._graphs.drop()

    def set_controlnets(self, controlnets: ControlNets) -> None:
        """Set the ControlNets that jobs may name. EngineStartFailed where one was made for another model."""
        controlnets.check(self.controlnet_class, self._controlnet_mismatch)
        self.controlnets = controlnets

    def load_control(self, name: str) -> Any:
        """Load a ControlNet on the device, on the loading thread; `EngineFault` where it cannot be read."""
        return self.controlnets.load(name)

    def read_adapter(self, weights: Path, config: Path | None) -> Adapter:
        """Read the adapter in a file; an `AdapterError` unless it is whole and every layer fits."""
        adapter = read_adapter(weights, config, self.naming_of(self._denoiser.config))
        check_fits(adapter, self._models)
        return adapter

    def pack(self, adapter: Adapter) -> PackedAdapter:
        """Lay the adapter out in the bank's pages, on any thread."""
        return self.bank.pack(adapter)

    def blank_adapter(self) -> Adapter:
        """Return an adapter of zeros, which is computed like any other."""
        return blank_adapter({name: one for name, one in self._models.items() if name not in self.text_encoders})

    def num_steps_of(self, request: GenerationRequest) -> int:
        """Return the number of steps taken: with a source the last ones, a share of `strength`."""
        if request.source is None:
            return request.num_inference_steps
        return min(int(request.num_inference_steps * request.source.strength), request.num_inference_steps)

    def prepare(self, request: GenerationRequest) -> None:
        """Check the request, and derive its trajectory ahead of `begin`. Raises `RequestFailed`."""
        check_options(request, self.options, self.name)
        check_kind(request, self.kinds)
        check_source(request, self.num_steps_of(request))
        check_control(request, self.controlnets.names)
        self.samplers.prepare(self._step_plan(request))

    def begin(self, lane: Lane, *, in_tiles: bool = False) -> tuple[str, Sampler]:
        """Return the lane's sampler at its first step, and its scheduler's name. `in_tiles`: for a source."""
        request = lane.owner.request
        # Noise comes from the CPU and in 32 bits, so that a seed gives the same picture on any device.
        generator = torch.Generator().manual_seed(lane.seed)

        def draw() -> torch.Tensor:
            return self._uploaded(torch.randn(self._latent_shape(request), generator=generator))

        if request.source is None:
            return self.samplers.begin(self._step_plan(request), self._packed(draw()), generator)
        if lane.owner.source is None:
            lane.owner.source = self._encoded(request, request.source, in_tiles=in_tiles)
        noise, latents = lane.owner.source.begin(draw, self._scaled)
        packed = latents.packed(self._packed)
        return self.samplers.begin(self._step_plan(request), self._packed(noise), generator, packed)

    def decode(self, latents: torch.Tensor, *, in_tiles: bool = False) -> DecodedImage:
        """Launch the decoding of a sampler's latents. Tiles take less memory, and are blended.

        Raises out of memory at once; other errors of the device are raised when the image is waited for.
        """
        vae = self._vae
        vae.use_tiling = in_tiles
        unpacked = self._unpacked(latents)[None].to(vae.dtype)
        decoded = vae.decode(self._unscaled(unpacked), return_dict=False)[0][0]
        return image_of(decoded.float())

    def check_image(self, pixels: NDArray[np.uint8]) -> None:
        """Raise `RequestFailed` where a safety checker is loaded and flags the picture [height, width, 3]."""
        if self.safety_checker is not None:
            self.safety_checker.check(pixels)

    def find_projection(self) -> Projection:
        """Fit the projection of latents to previews on encodings of the VAE."""
        with torch.inference_mode():
            return find_projection(self._vae, self._unscaled, self.device)

    def predict_x0(self, lane: Lane, prediction: torch.Tensor) -> torch.Tensor:
        """Return the finished latents [channels, height, width] that `prediction` implies, before the lane's step."""
        sampler = sampler_of(lane)
        # Channels behind the latents hold no noise.
        latents = sampler.model_input()[: len(prediction)]
        return self._unpacked(predict_x0(latents, sampler.timestep, prediction, self._pipeline.scheduler))

    def _packed(self, latents: torch.Tensor) -> torch.Tensor:
        """Return latents [channels, height, width] as the sampler has them: schedulers draw noise in that order."""
        return latents

    def _unpacked(self, latents: torch.Tensor) -> torch.Tensor:
        """Return a sampler's latents as [channels, height, width]: the inverse."""
        return latents

    @property
    def _vae(self) -> Any:
        """The VAE, with the interface of an `AutoencoderKL`."""
        return self._pipeline.vae

    @property
    def _denoiser(self) -> Any:
        (denoiser,) = (model for name, model in self._models.items() if name not in self.text_encoders)
        return denoiser

    def _predict_by_graph(
        self,
        predict: Callable[[Mapping[str, torch.Tensor]], torch.Tensor],
        by_row: Mapping[str, torch.Tensor],
        adapters: Sequence[RowAdapters],
    ) -> torch.Tensor | None:
        """Return what `predict` makes of tensors [rows, ...] under these adapters, from a captured forward.

        None where it has to be run eagerly. `predict` depends on the tensors alone, their number of rows and shapes.
        """
        if self._graphs is None:
            return None
        table = self.bank.tabulate(adapters, padded_rows(len(adapters))) if any(adapters) else None
        if table is None and any(adapters):
            return None

        def forward(inputs: ForwardInputs) -> torch.Tensor:
            with self.bank.reading(inputs.table, inputs.num_rows, self.concatenated_layers):
                return predict(inputs.by_row)

        predictions = self._graphs.run(forward, ForwardInputs(by_row, table))
        self.ran_eagerly = predictions is None
        return predictions

    def _unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        """Return latents [1, channels, height, width] in the VAE's own scale."""
        return latents / float(self._pipeline.vae.config.scaling_factor)

    def _scaled(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the VAE's latents [channels, height, width] in the denoiser's scale: the inverse."""
        return latents * float(self._pipeline.vae.config.scaling_factor)

    def _step_plan(self, request: GenerationRequest) -> StepPlan:
        num_steps = request.num_inference_steps
        num_skipped = None if request.source is None else num_steps - self.num_steps_of(request)
        return StepPlan(request.scheduler, num_steps, self._shift(request), num_skipped)

    def _encoded(self, request: GenerationRequest, source: Source, *, in_tiles: bool) -> EncodedSource:
        return encode(
            self._vae,
            source,
            size=(request.height, request.width),
            is_hidden=self.is_hidden_at_full_strength and source.mask is not None and source.strength >= 1,
            is_inpainting=self._is_inpainting,
            upload=self._uploaded,
            dtype=self._encoding_dtype,
            in_tiles=in_tiles,
        )

    def _upload(self, values: Any) -> torch.Tensor:
        return self._uploaded(torch.tensor(values, dtype=torch.float32))

    def _uploaded(self, host: torch.Tensor) -> torch.Tensor:
        return upload(host, self.device)
