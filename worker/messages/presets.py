"""Apply the presets of a job's style and industry.

The industry wraps the prompt first and the style wraps both: an industry says what is shown and where, a style how all
of it is drawn.
"""

import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from clients.storage.location import LocationForbidden, ObjectRef
from config.images import ImageSettings
from config.presets.catalog import PLACEHOLDER, Preset, PresetAdapter, Presets, PresetsInvalid, builtin_presets
from config.presets.preset_file import PresetFile
from config.redacting import quoted
from config.section import SettingsError
from worker.messages.rules import MAX_REASON_CHARS, JobRules, Rejection, is_pickle
from worker.messages.schema import MAX_PROMPT_CHARS, WireData


@dataclass(frozen=True, slots=True)
class Styled:
    """A job's prompts with its presets applied, and the presets' defaults for what the job leaves open."""

    prompt: str
    negative_prompt: str
    steps: int | None
    guidance_scale: float | None
    adapter: PresetAdapter | None


def presets_in_force(images: ImageSettings | None, locate: Callable[[str], ObjectRef] | None) -> Callable[[], Presets]:
    """Return a function, called once a job, for the operator's presets or the built-in ones.

    Raises `SettingsError` for a broken file. Without `locate` their adapters are not checked before a job uses them.
    """
    if images is None or images.presets_file is None:
        return builtin_presets

    def check(presets: Presets) -> None:
        """Raise `PresetsInvalid` for an adapter that may not be read, before a job meets it."""
        if locate is None:
            return
        for place, adapter in presets.adapters.items():
            try:
                ref = locate(adapter.path)
            except LocationForbidden as error:
                raise PresetsInvalid(f"the adapter of {place}: {error}") from error
            if is_pickle(ref):
                raise PresetsInvalid(f"the adapter of {place}: {ref} may hold a pickle; only .safetensors is read")

    try:
        return PresetFile(images.presets_file, check).current
    except PresetsInvalid as error:
        raise SettingsError(f"PRESETS_FILE: {error}") from error


def styled(prompt: str, negative_prompt: str, *, style: Preset | None, industry: Preset | None) -> Styled:
    """Apply the presets to a job's prompts; the style's defaults win over the industry's."""
    for preset in (industry, style):
        # Only the template is searched: a prompt's own braces are text.
        prompt = preset.positive.replace(PLACEHOLDER, prompt) if preset else prompt
    presets = [preset for preset in (style, industry) if preset]
    return Styled(
        prompt=prompt,
        negative_prompt=_joined(negative_prompt, *(preset.negative for preset in presets)),
        steps=next((preset.steps for preset in presets if preset.steps is not None), None),
        guidance_scale=next((preset.guidance_scale for preset in presets if preset.guidance_scale is not None), None),
        adapter=next((preset.adapter for preset in presets if preset.adapter is not None), None),
    )


def _joined(own: str, *added: str) -> str:
    """Append to the job's own text each phrase that it does not hold yet."""
    phrases = [own.strip()] if own.strip() else []
    seen = {phrase.strip().casefold() for phrase in own.split(",")}
    for phrase in (phrase.strip() for text in added for phrase in text.split(",")):
        if phrase and phrase.casefold() not in seen:
            seen.add(phrase.casefold())
            phrases.append(phrase)
    return ", ".join(phrases)


def styled_of(wire: WireData, rules: JobRules, reject: Rejection) -> Styled:
    """Apply the presets that `wire` names. Raises `JobRejected` for an unknown one and for prompts too long."""
    presets = rules.presets()
    style = _known("style", wire.style, presets.styles, reject)
    industry = _known("industry", wire.industry, presets.industries, reject)
    prompt, negative_prompt = wire.prompt.strip(), wire.negative_prompt or ""
    made = styled(prompt, negative_prompt, style=style, industry=industry)
    _check_length("prompt", prompt, made.prompt, reject)
    _check_length("negative_prompt", negative_prompt, made.negative_prompt, reject)
    return made


def _known(field: str, name: str | None, presets: Mapping[str, Preset], reject: Rejection) -> Preset | None:
    if not name:
        return None
    if name not in presets:
        there_are = f"there are {', '.join(sorted(presets))}" if presets else "there is none"
        sentence = f"data.{field} {quoted(name)} is not known to this worker; {there_are}"
        raise reject("INVALID_INPUT", textwrap.shorten(sentence, MAX_REASON_CHARS, placeholder=" …"))
    return presets[name]


def _check_length(field: str, own: str, made: str, reject: Rejection) -> None:
    if len(made) > MAX_PROMPT_CHARS:
        raise reject(
            "INVALID_PROMPT",
            f"{field} has {len(made)} characters, {len(made) - len(own)} of them added by the job's presets; "
            f"at most {MAX_PROMPT_CHARS} are read: shorten it",
        )
