"""Fetch and check all that a job names before it uses the GPU."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TypeVar

from PIL import Image

from clients.storage.errors import ObjectChanged, ObjectNotFound, ObjectTooLarge
from clients.storage.location import ObjectRef
from inference.request import AdapterFile, ModelFacts
from watermark.decoding import ImageMode, decode_image, decode_signature
from watermark.errors import FontMissing, ImageInvalid, ImageTooLarge, OverlayInvalid, SignatureInvalid
from watermark.signature import ImageSignature, Signature, TextSignature, Unsigned
from watermark.text.headline import Headline, prepare_headlines
from worker.errors import ErrorCode, JobFailed
from worker.jobs.inputs.peft_folders import PEFT_CONFIG, PEFT_PICKLE, PEFT_WEIGHTS, WANTS_CONFIG, is_named_by_peft
from worker.jobs.inputs.references import NO_REFERENCES, References, check_mask, output_size, shrunk
from worker.jobs.inputs.source import FetchedFile, ObjectSource
from worker.messages.job import Job, JobAdapter

# Those of the engine and of the pictures' decoders, which would refuse by another code what is over them.
MAX_ADAPTER_BYTES = 1_000_000_000
MAX_CONFIG_BYTES = 64_000
MAX_SIGNATURE_BYTES = 10_000_000
MAX_IMAGE_BYTES = 50_000_000
# A folder whose config changed while its weights were fetched is fetched again, so often.
MAX_FOLDER_READS = 3

SAFETENSORS = ".safetensors"

Made = TypeVar("Made")


# A decoded one may take 200 MB for a moment: a dozen job threads must not do that at once.
_ONE_IMAGE_AT_A_TIME = Lock()


@dataclass(frozen=True, slots=True)
class JobInputs:
    """All that a job named, ready for use."""

    signature: Signature
    headlines: tuple[Headline, ...]
    references: References
    adapters: tuple[AdapterFile, ...]


@dataclass(frozen=True, slots=True)
class Fetcher:
    """Fetches what jobs name. Every method blocks, and raises `JobFailed` with the code of the fault."""

    source: ObjectSource
    font_dirs: tuple[Path, ...]
    facts: Mapping[str, ModelFacts] | None = None  # of each model; without them, reference images keep their size

    def fetch_inputs(self, job: Job, pinned: ExitStack) -> JobInputs:
        """Fetch all that the job names. Adapters stay in the cache until `pinned` closes."""
        signature = self.signature(job)
        try:
            headlines = prepare_headlines(job.overlays, self.font_dirs)
        except FontMissing as error:
            raise JobFailed(ErrorCode.FONT_MISSING, str(error)) from error
        except OverlayInvalid as error:
            raise JobFailed(ErrorCode.INVALID_INPUT, str(error)) from error
        references = self._references(job)
        adapters = tuple(self.adapter(adapter, pinned) for adapter in job.adapters)
        return JobInputs(signature=signature, headlines=headlines, references=references, adapters=adapters)

    def _references(self, job: Job) -> References:
        """Fetch the reference images, each resized before the next is decoded: a dozen jobs hold theirs to the end."""

        def at_size(references: References) -> References:
            if self.facts is None:
                return references
            return references.at(output_size(job, self.facts[job.model], references.proportions), job.fit)

        def with_mask(mask: Image.Image) -> References:
            check_mask(mask, found.proportions or mask.size)
            return at_size(replace(found, mask=mask))

        found = NO_REFERENCES
        if job.source is not None:
            ref = job.source.image_ref
            found = self._of_image(ref, "init_image_path", "RGB", lambda init: at_size(References(init)))
            if job.source.mask_ref is not None:
                found = self._of_image(job.source.mask_ref, "mask_path", "L", with_mask)
        if job.control is not None:
            found = self._of_image(
                job.control.image_ref,
                "control.image_path",
                "RGB",
                lambda control: at_size(replace(found, control=control)),
            )
        edited = [
            self._of_image(ref, f"references.{number}.image_path", "RGB", shrunk)
            for number, ref in enumerate(job.references)
        ]
        return replace(found, edited=tuple(edited))

    def image(self, ref: ObjectRef, field: str, mode: ImageMode) -> Image.Image:
        """Fetch the image that the job names in `field`, upright; a huge JPEG is decoded at a useful size."""
        return self._of_image(ref, field, mode, lambda image: image)

    def _of_image(self, ref: ObjectRef, field: str, mode: ImageMode, make: Callable[[Image.Image], Made]) -> Made:
        """Fetch an image and pass it to `make` before the next one is decoded."""
        try:
            content = self.source.read(ref, MAX_IMAGE_BYTES)
            with _ONE_IMAGE_AT_A_TIME:
                return make(decode_image(content, mode))
        except ObjectNotFound as error:
            raise JobFailed(ErrorCode.IMAGE_NOT_FOUND, f"{field}: the picture {ref} does not exist") from error
        except (ObjectTooLarge, ImageTooLarge) as error:
            raise JobFailed(ErrorCode.INPUT_TOO_LARGE, f"{field}: {error}") from error
        except ImageInvalid as error:
            raise JobFailed(ErrorCode.IMAGE_INVALID, f"{field}: {error}") from error

    def signature(self, job: Job) -> Signature:
        """Fetch the signature, ready to draw, so that a fault is found before the GPU is used."""
        try:
            if job.signature_ref is not None:
                return ImageSignature(decode_signature(self.source.read(job.signature_ref, MAX_SIGNATURE_BYTES)))
            if job.artist_name is not None:
                return TextSignature(job.artist_name, self.font_dirs)
            return Unsigned()
        except ObjectNotFound as error:
            raise JobFailed(
                ErrorCode.SIGNATURE_NOT_FOUND, f"the signature {job.signature_ref} does not exist"
            ) from error
        except ObjectTooLarge as error:
            raise JobFailed(ErrorCode.INPUT_TOO_LARGE, str(error)) from error
        except SignatureInvalid as error:
            raise JobFailed(
                ErrorCode.SIGNATURE_INVALID, f"signature {job.signature_ref or 'artist_name'}: {error}"
            ) from error
        except FontMissing as error:
            raise JobFailed(ErrorCode.FONT_MISSING, f"artist_name: {error}") from error

    def adapter(self, adapter: JobAdapter, pinned: ExitStack) -> AdapterFile:
        """Fetch the adapter's files, pinned in the cache until `pinned` closes."""
        ref = adapter.ref
        if ref.key.lower().endswith(SAFETENSORS):
            return self._adapter_file(adapter, pinned)
        # Trainers that upload a folder may name any file of it.
        folder = ref.parent if ref.name == PEFT_CONFIG else ref
        return self._of_one_version(
            partial(self._fetch, folder.child(PEFT_CONFIG), MAX_CONFIG_BYTES, pinned),
            partial(self._fetch_weights, folder, pinned),
            adapter,
        )

    def _adapter_file(self, adapter: JobAdapter, pinned: ExitStack) -> AdapterFile:
        """Fetch a single file, or the weights of a PEFT folder: these mean nothing without the config beside them.

        Some trainers write weights under PEFT's file name, with its config beside them, but by the model's own names.
        """
        fetch_weights = partial(self._fetch, adapter.ref, MAX_ADAPTER_BYTES, pinned)
        weights = fetch_weights()
        config_ref = adapter.ref.parent.child(PEFT_CONFIG)
        has_config = adapter.ref.name == PEFT_WEIGHTS and self.source.exists(config_ref)
        if not has_config and not is_named_by_peft(weights.path):
            return AdapterFile(weights.path, None, adapter.scale, weights.version)
        fetch_config = partial(self._fetch, config_ref, MAX_CONFIG_BYTES, pinned)
        try:
            return self._of_one_version(fetch_config, fetch_weights, adapter)
        except JobFailed as error:
            if error.code is not ErrorCode.LORA_NOT_FOUND:
                raise
            raise JobFailed(ErrorCode.LORA_INVALID, f"the adapter {adapter.ref} {WANTS_CONFIG}") from error

    def _of_one_version(
        self, fetch_config: Callable[[], FetchedFile], fetch_weights: Callable[[], FetchedFile], adapter: JobAdapter
    ) -> AdapterFile:
        """Both files of a PEFT folder, of one moment: a publisher may be replacing them one after the other."""
        config = fetch_config()
        for _ in range(MAX_FOLDER_READS):
            weights = fetch_weights()
            before, config = config, fetch_config()
            if config == before:
                return AdapterFile(weights.path, config.path, adapter.scale, f"{config.version} {weights.version}")
        raise ObjectChanged(f"the adapter {adapter.ref} is being replaced")

    def _fetch_weights(self, folder: ObjectRef, pinned: ExitStack) -> FetchedFile:
        try:
            return self._fetch(folder.child(PEFT_WEIGHTS), MAX_ADAPTER_BYTES, pinned)
        except JobFailed:
            if self.source.exists(folder.child(PEFT_PICKLE)):
                only = f"the adapter {folder} holds only {PEFT_PICKLE}, which may be a pickle"
                raise JobFailed(ErrorCode.LORA_UNSAFE_FORMAT, f"{only}; store {PEFT_WEIGHTS}") from None
            raise

    def _fetch(self, ref: ObjectRef, max_bytes: int, pinned: ExitStack) -> FetchedFile:
        try:
            return self.source.fetch(ref, max_bytes, pinned)
        except ObjectNotFound as error:
            raise JobFailed(ErrorCode.LORA_NOT_FOUND, f"the adapter {ref} does not exist") from error
        except ObjectTooLarge as error:
            raise JobFailed(ErrorCode.INPUT_TOO_LARGE, str(error)) from error
