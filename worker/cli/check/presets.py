"""The presets: how many there are, and whether the adapters they name are in the store."""

from clients.storage.client import Storage
from clients.storage.errors import StorageError
from clients.storage.location import ObjectRef
from config.settings import Settings
from worker.cli.check.checks import CheckFailed
from worker.jobs.inputs.peft_folders import PEFT_CONFIG, PEFT_WEIGHTS
from worker.messages.decoder import rules_from


def check_presets(settings: Settings) -> str:
    """Can every preset be drawn with?"""
    rules = rules_from(settings.model, settings.store, settings.pictures)
    presets, storage = rules.presets(), Storage(settings.store)
    for place, adapter in presets.adapters.items():
        try:
            storage.head(_weights_of(rules.locate(adapter.path)))
        except StorageError as error:
            raise CheckFailed(
                f"the adapter of {place}: {error}. Store the adapter there, or take it out of PRESETS_FILE"
            ) from error
    source = settings.pictures.presets_file or "the built-in file"
    return f"{len(presets.styles)} styles and {len(presets.industries)} industries in {source}"


def _weights_of(ref: ObjectRef) -> ObjectRef:
    if ref.key.lower().endswith(".safetensors"):
        return ref
    return (ref.parent if ref.name == PEFT_CONFIG else ref).child(PEFT_WEIGHTS)
