"""The families at full size over fake CUDA tensors, with adapters, ControlNets and lanes: without memory or weights."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from inference.controlnet.guide import Guide
from inference.engine.conditioner import Conditioner
from inference.lane import ActiveRequest, Lane
from inference.lora.adapter import Adapter, LowRank
from inference.lora.bank import PackedAdapter
from inference.lora.products.rows import AppliedAdapter, RowAdapters
from inference.models.base import Family
from inference.models.families.flow import FlowFamily
from inference.models.families.flux import Flux
from inference.models.families.flux_2 import Flux2Klein
from inference.models.families.sdxl import StableDiffusionXL
from inference.models.families.stable_diffusion import StableDiffusion
from inference.models.families.z_image import ZImage
from inference.models.inputs import sampler_of
from inference.request import GenerationRequest
from tests.support.cuda.fake_cuda import DEVICE, FakeCuda
from tests.support.cuda.tally import Tally
from tests.support.models.full_pipelines import CONTROLNETS, build_pipeline

FAMILIES: dict[str, Callable[..., Family]] = {
    "sd15": StableDiffusion,
    "sdxl": StableDiffusionXL,
    "z-image": ZImage,
    "flux": Flux,
    "klein": Flux2Klein,
}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FLUX_2_LINEAR = ("ff.linear_in", "ff.linear_out", "to_qkv_mlp_proj", "attn.to_out")
LINEAR = (
    *ATTENTION,
    *FLUX_2_LINEAR,
    "ff.net.0.proj",
    "ff.net.2",
    "feed_forward.w1",
    "feed_forward.w2",
    "feed_forward.w3",
)
# Ranks and layers of ten jobs' adapters: of one page and of many, feed-forward layers in three, one job without any.
# Three different ones, written into pages of their own: packing is what takes long here.
MIX = (
    (8, ATTENTION),
    (8, ATTENTION),
    (8, ATTENTION),
    (128, ATTENTION),
    (16, LINEAR),
    (16, LINEAR),
    (8, ATTENTION),
    (16, LINEAR),
    None,
    (8, ATTENTION),
)


class OnDisk:
    """The one ControlNet there is to be loaded. No request names it."""

    names = ()

    def __init__(self, net: Any) -> None:
        self._net = net

    def check_request(self, _: object) -> None:
        """Accept every request."""

    def load(self, _: str) -> Any:
        return self._net


class FullModel:
    """A family at full size, in bf16, whose denoiser's kernels are counted apart.

    With `is_hosted` its weights come to the device only after it was made, as those of several models do.
    """

    def __init__(self, cuda: FakeCuda, name: str, *, is_hosted: bool = False) -> None:
        self.name = name
        self.cuda = cuda
        pipeline = build_pipeline(name)
        bring_all(pipeline, torch.device("cpu") if is_hosted else DEVICE)
        family = FAMILIES[name.removesuffix("-inpaint")]
        self.family: Family = family(pipeline, device=DEVICE)
        if is_hosted:
            bring_all(pipeline, DEVICE)
        self.denoiser = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
        cuda.watch(self.denoiser, "denoiser")
        self._next_page = 1
        self._conditioner = Conditioner(self.family)
        self._mix: list[RowAdapters] = []
        self._packed: dict[tuple[int, tuple[str, ...]], PackedAdapter] = {}

    def adapted(self, rank: int, endings: tuple[str, ...], scale: float = 1.0) -> RowAdapters:
        """Load a row's adapters into the bank: one of this rank on the denoiser's layers with these suffixes."""
        if (rank, endings) not in self._packed:
            with self.cuda.without_host_memory():
                self._packed[rank, endings] = self.family.pack(self._adapter(rank, endings))
        packed = self._packed[rank, endings]
        place = tuple(range(self._next_page, self._next_page + packed.num_pages))
        self._next_page += packed.num_pages
        self.family.bank.write(place, packed)
        return (AppliedAdapter(place, scale),)

    def mixed(self, num_lanes: int) -> list[RowAdapters]:
        """Choose adapters for so many lanes: all of the mix, or those from its middle, which touch the most layers."""
        if not self._mix:
            self._mix = [self.adapted(*one) if one else () for one in MIX]
        first = 0 if num_lanes > 5 else 5 - (num_lanes + 1) // 2
        return self._mix[first : first + num_lanes]

    def request(self, number: int, **fields: Any) -> GenerationRequest:
        """Build the request of job `number` of a batch, at the model's own size, with these fields changed."""
        size, is_flow = self.family.base_size, isinstance(self.family, FlowFamily)
        defaults: dict[str, Any] = {
            "request_id": str(number),
            "prompt": f"a picture of thing {number}, " + "very " * number + "red",
            "negative_prompt": "",
            "width": size,
            "height": size,
            "num_inference_steps": 8 if is_flow else 20,
            "guidance_scale": 0.0 if is_flow else 5.0,
            "seeds": (100 + number,),
        }
        return GenerationRequest(**defaults | fields)

    def join(
        self, requests: Sequence[GenerationRequest], rows: Sequence[RowAdapters], guides: Sequence[Guide | None]
    ) -> list[Lane]:
        """Prepare the requests' lanes for their first step, as the engine's loop would for requests that begin
        together.
        """
        joined = []
        for request, row, guide in zip(requests, rows, guides, strict=True):
            self.family.prepare(request)
            keys: Any = row  # embeddings are remembered by them: what they are is no matter
            joined.append(
                ActiveRequest(request, self.family.batch_traits(request), lambda _: None, lambda: False, keys)
            )
            joined[-1].row, joined[-1].guide = row, guide
        for active, conditioning in zip(joined, self._conditioner.condition(joined), strict=True):
            active.conditioning = conditioning
        lanes = [lane for active in joined for lane in active.lanes]
        for lane in lanes:
            _, lane.sampler = self.family.begin(lane)
        return lanes

    def lanes(
        self, num_lanes: int, rows: Sequence[RowAdapters] = (), guides: Sequence[Guide | None] = (), **fields: Any
    ) -> list[Lane]:
        """Prepare the lanes of so many jobs with their adapters and ControlNets, none where there are none left."""
        requests = [self.request(number, **fields) for number in range(num_lanes)]
        rows = (*rows, *[()] * num_lanes)[:num_lanes]
        guides = (*guides, *[None] * num_lanes)[:num_lanes]
        return self.join(requests, rows, guides)

    def guide(self) -> Guide:
        """Build a full-size ControlNet for the model, and its control image."""
        net = CONTROLNETS[self.name](self.denoiser)
        bring(net)
        on_disk: Any = OnDisk(net)
        self.family.controlnets = on_disk
        net = self.family.load_control("full")
        image = torch.zeros(3, self.family.base_size, self.family.base_size)
        return Guide(net, self.family.encode_control(image), scale=0.7, start=0.0, end=1.0)

    def step(self, lanes: Sequence[Lane]) -> Tally:
        """Run one denoise step of these lanes, counted."""
        with self.cuda.counting() as tally:
            predictions = self.family.denoise(lanes)
            for lane, prediction in zip(lanes, predictions, strict=True):
                sampler_of(lane).advance(prediction)
        return tally

    def _adapter(self, rank: int, endings: tuple[str, ...]) -> Adapter:
        root = "transformer" if isinstance(self.family, FlowFamily) else "unet"
        layers = {
            f"{root}.{name}": LowRank(torch.empty(rank, module.in_features), torch.empty(module.out_features, rank))
            for name, module in self.denoiser.named_modules()
            if isinstance(module, torch.nn.Linear) and name.endswith(endings)
        }
        return Adapter(layers)


def bring_all(pipeline: Any, device: torch.device) -> None:
    """Move the models of a pipeline."""
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            bring(component, device)


def bring(model: torch.nn.Module, device: torch.device = DEVICE) -> None:
    """Move a model of meta tensors to the fake device, or to its host's memory, in bf16."""

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        dtype = torch.bfloat16 if tensor.is_floating_point() else tensor.dtype
        return torch.empty(tensor.shape, dtype=dtype, device=device)

    model._apply(moved).eval()
