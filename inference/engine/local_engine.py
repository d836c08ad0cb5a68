"""The engine in this process: one thread that owns the model and runs its loop."""

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

import diffusers
import torch
import transformers

from config.logs import log_event
from config.model import DEFAULT_MODEL, ModelSettings
from inference.checkpoints.memory_plan import RESERVE_BYTES, free_bytes
from inference.device.forward_graphs import CudaCapture
from inference.engine.step_loop import StepLoop
from inference.engine.switching.engine_model import EngineModel
from inference.engine.switching.switcher import Switcher
from inference.engine.warm_up import WarmUp
from inference.errors import EngineClosed, EngineFault, EngineStartFailed, RequestFailed
from inference.lane import ActiveRequest
from inference.lora.adapter_key import AdapterKey
from inference.models.base import Family
from inference.models.loader import load_family
from inference.request import GenerationRequest, GenerationResult, IsCancelled, ModelFacts, OnLoadReport, OnStep

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.1

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def room_for_models(device: torch.device) -> int | None:
    """Return the bytes of the device that models may share; None for a CPU, in whose memory they are anyway."""
    return None if device.type == "cpu" else free_bytes(device)


class LocalEngine:
    """`Engine` in this process. Owner of the thread that the models' loops run on."""

    def __init__(
        self,
        settings: ModelSettings,
        on_load_report: OnLoadReport = lambda _: None,
        *,
        find_room: Callable[[torch.device], int | None] = room_for_models,
    ) -> None:
        """Load the models and warm them up; raise `EngineStartFailed` with the reason if that fails.

        `on_load_report` is called on the engine's thread after each turn of its loop. `find_room` returns the bytes of
        the device that several models share. The process was started with `gpu_variables`: it sees the GPU of `cuda:N`
        as its only one.
        """
        _silence_libraries()
        device = _choose_device(settings.device)
        if settings.compile == "graphs" and device.type != "cuda":
            raise EngineStartFailed("COMPILE=graphs needs a GPU, and this worker draws on the CPU: set COMPILE=blocks")
        self._settings = settings
        self._dtype = _choose_dtype(settings.dtype, device)
        self._device = device
        self._room = find_room(device) if settings.models else None
        self._on_load_report = on_load_report
        self._inbox: queue.SimpleQueue[ActiveRequest | None] = queue.SimpleQueue()
        # Every request in the inbox is answered: none may be added after the thread has read it for the last time.
        self._inbox_lock = threading.Lock()
        self._is_closing = False
        self.is_broken = False
        self._switcher = Switcher(
            num_bytes=None if self._room is None else self._room - RESERVE_BYTES,
            full_batch=settings.max_concurrent_generations,
            on_load_report=on_load_report,
        )
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        self.facts_by_model: dict[str, ModelFacts] = {}
        try:
            # The default one last: then it is on the device when the first job comes.
            for name in reversed(settings.model_names):
                self.default = self._add_model(name, settings.of_model(name))
        except EngineStartFailed as error:
            self.close()
            if name == DEFAULT_MODEL:
                raise
            raise EngineStartFailed(f"MODELS {name}: {error}") from error
        self.facts = self.facts_by_model[DEFAULT_MODEL]

    def generate(
        self, request: GenerationRequest, on_step: OnStep, is_cancelled: IsCancelled
    ) -> Future[GenerationResult]:
        """Queue `request`; see `Engine`."""
        keys = tuple(AdapterKey.of(file) for file in request.adapters)
        active = ActiveRequest(request, self._switcher.traits_of(request), on_step, is_cancelled, keys)
        self._enqueue(active)
        return active.future

    def close(self) -> None:
        """Cancel waiting requests, finish running ones, and end the thread."""
        with self._inbox_lock:
            self._is_closing = True
        self._wake()
        self._thread.join()

    def _add_model(self, name: str, settings: ModelSettings) -> EngineModel:
        """Load a model and warm it up."""
        started_at = time.monotonic()
        family = self._load(settings, self._device, self._dtype)
        loop = StepLoop(
            family,
            max_lanes=settings.max_concurrent_generations,
            num_slots=settings.adapter_slots,
            max_rank=settings.adapter_max_rank,
            preview_every=settings.preview_every,
            on_ready=self._wake,
        )
        weights = None if self._room is None else family.hosted_weights()
        model = EngineModel(name, family, loop, weights, is_on_device=weights is None)
        self._switcher.add(model)
        try:
            step_seconds = self._warm_up(model, settings)
        except RequestFailed as error:
            raise EngineStartFailed(f"MODEL_ID {settings.model_id!r} cannot draw a picture: {error}") from error
        self.facts_by_model[name] = ModelFacts(
            model=family.public_name,
            family=family.name,
            base_size=family.base_size,
            size_multiple=family.size_multiple,
            default_steps=family.default_steps,
            default_guidance=family.default_guidance,
            schedulers=family.samplers.names,
            device=str(self._device),
            dtype=str(self._dtype).removeprefix("torch."),
            load_seconds=time.monotonic() - started_at,
            step_seconds=step_seconds,
            kinds=family.kinds,
            controls=family.controlnets.names,
        )
        return model

    def _load(self, settings: ModelSettings, device: torch.device, dtype: torch.dtype) -> Family:
        return load_family(
            settings,
            device=device,
            dtype=dtype,
            free=self._room,
            num_models=len(self._settings.model_names),
            is_hosted=self._room is not None,
        )

    def _warm_up(self, model: EngineModel, settings: ModelSettings) -> float:
        """Return the seconds of a step."""
        family = model.family
        warm_up = WarmUp(family, self._enqueue, model.loop.forget, name=model.name)
        if settings.compile != "off":
            started_at = time.monotonic()
            family.compile_blocks()
            warm_up.compile_blocks(settings.max_concurrent_generations)
            family.end_compiling()
            log_event(logger, "denoiser's blocks compiled", seconds=round(time.monotonic() - started_at, 1))
        step_seconds = warm_up.measure_step()
        # On a CPU there is nothing to load: it would only delay the first job.
        if self._device.type == "cuda":
            warm_up.load_kernels(settings.max_concurrent_generations)
        if settings.compile == "graphs":
            # Not before: its forwards load kernels, and are shapes that jobs may never have.
            family.capture_forwards(CudaCapture(self._device))
        return step_seconds

    def _enqueue(self, active: ActiveRequest) -> None:
        with self._inbox_lock:
            if self._is_closing or self.is_broken:
                raise EngineClosed("the engine is closed")
            self._switcher.prepare(active)
            self._inbox.put(active)

    def _wake(self) -> None:
        self._inbox.put(None)

    # Everything below runs on the engine's thread.

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while not (self._is_closing and self._switcher.is_empty and self._inbox.empty()):
                    self._turn()
        except Exception as error:
            # The thread's boundary. After an unforeseen error, or one of the device, no state here is certain.
            logger.exception("the engine failed")
            with self._inbox_lock:
                self.is_broken = True
            while not self._inbox.empty():
                self._add_next(timeout_seconds=0.0)
            self._switcher.fail_all(EngineFault(f"the engine failed: {error}"))
        finally:
            self._switcher.close()

    def _turn(self) -> None:
        """Add the new requests, waiting for one while there is no work, and take a step."""
        if not self._switcher.has_work and not self._is_closing:
            # Requests that wait for their adapters may be cancelled at any time.
            self._add_next(timeout_seconds=None if self._switcher.is_empty else POLL_SECONDS)
        while not self._inbox.empty():
            self._add_next(timeout_seconds=0.0)
        if self._is_closing:
            self._switcher.withdraw_waiting()
        self._on_load_report(self._switcher.step())

    def _add_next(self, timeout_seconds: float | None) -> None:
        try:
            active = self._inbox.get(timeout=timeout_seconds)
        except queue.Empty:
            return
        if active is not None:
            self._switcher.add_request(active)


def _choose_device(name: str) -> torch.device:
    if name != "cpu" and torch.cuda.is_available():
        return torch.device("cuda")  # of `cuda:N` too: this process sees that GPU alone
    if name.startswith("cuda"):
        raise EngineStartFailed(f"DEVICE is {name!r} but torch sees no GPU: check the driver and CUDA_VISIBLE_DEVICES")
    return torch.device("cpu")


def _choose_dtype(name: str, device: torch.device) -> torch.dtype:
    if name != "auto":
        return DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    # Before Ampere bfloat16 is emulated, many times slower than float16.
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def _silence_libraries() -> None:
    """Silence progress bars and advice: on standard error they would break the one-line-of-JSON rule of the logs."""
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
