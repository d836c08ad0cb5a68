"""The libraries of the extra `engine`, which a light install leaves out."""

from importlib.util import find_spec

# By the names under which they are imported: those without which no model is loaded.
REQUIRED = ("torch", "diffusers", "transformers", "accelerate", "compel", "huggingface_hub", "safetensors")
NUM_NAMED = 2


def missing_libraries() -> list[str]:
    """List the libraries that the engine cannot do without and that are not installed here; imports none."""
    return [library for library in REQUIRED if find_spec(library) is None]


def engine_needs() -> list[str]:
    """Return the sentence on an engine that is not installed here; nothing where it is."""
    missing = missing_libraries()
    if not missing:
        return []
    names = ", ".join(missing[:NUM_NAMED]) + (" …" if len(missing) > NUM_NAMED else "")
    cure = "install the extra `engine`, in a checkout by pip install '.[engine]'"
    return [f"the engine is not installed here ({names}): {cure}"]
