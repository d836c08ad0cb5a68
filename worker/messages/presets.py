"""What a job's style and industry add to it.

The industry wraps the prompt first and the style wraps both: an industry says what is shown and where, a style how all
of it is drawn.
"""

import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from clients.storage.location import LocationForbidden, ObjectRef
from config.images import PictureSettings
from config.presets.catalog import Preset, PresetAdapter, Presets, PresetsInvalid, builtin_presets
from config.presets.preset_file import PresetFile
from config.redacting import quoted
from config.section import SettingsError
from worker.messages.job import JobAdapter
from worker.messages.rules import MAX_REASON_CHARS, JobRules, Rejection, is_pickle, located
from worker.messages.schema import MAX_PROMPT_CHARS, WireData


@dataclass(frozen=True, slots=True)
class Styled:
    """A job's wording with its presets, and what they say where the job says nothing."""

    prompt: str
    negative_prompt: str
    steps: int | None
    guidance_scale: float | None
    adapter: PresetAdapter | None


def presets_in_force(
    pictures: PictureSettings | None, locate: Callable[[str], ObjectRef] | None
) -> Callable[[], Presets]:
    """Asked at each job: the operator's presets, else the built-in ones. A broken file raises `SettingsError`.

    Without `locate` their adapters are not judged before a job wants them.
    """
    if pictures is None or pictures.presets_file is None:
        return builtin_presets

    def judge(presets: Presets) -> None:
        if locate is not None:
            _check_adapters(presets, locate)

    try:
        return PresetFile(pictures.presets_file, judge).current
    except PresetsInvalid as error:
        raise SettingsError(f"PRESETS_FILE: {error}") from error


def _check_adapters(presets: Presets, locate: Callable[[str], ObjectRef]) -> None:
    """Jobs must not be the first to find that an adapter may not be read."""
    for place, adapter in presets.adapters.items():
        try:
            ref = locate(adapter.path)
        except LocationForbidden as error:
            raise PresetsInvalid(f"the adapter of {place}: {error}") from error
        if is_pickle(ref):
            raise PresetsInvalid(f"the adapter of {place}: {ref} may hold a pickle; only .safetensors is read")


def styled(prompt: str, negative_prompt: str, *, style: Preset | None, industry: Preset | None) -> Styled:
    """A job's wording as its presets make it; the style's opinion goes before the industry's."""
    for preset in (industry, style):
        prompt = preset.around(prompt) if preset else prompt
    presets = [preset for preset in (style, industry) if preset]
    return Styled(
        prompt=prompt,
        negative_prompt=_joined(negative_prompt, *(preset.negative for preset in presets)),
        steps=next((preset.steps for preset in presets if preset.steps is not None), None),
        guidance_scale=next((preset.guidance_scale for preset in presets if preset.guidance_scale is not None), None),
        adapter=next((preset.adapter for preset in presets if preset.adapter is not None), None),
    )


def _joined(own: str, *added: str) -> str:
    """The job's own words as they are, and behind them each phrase that is not yet there."""
    phrases = [own.strip()] if own.strip() else []
    seen = {phrase.strip().casefold() for phrase in own.split(",")}
    for phrase in (phrase.strip() for text in added for phrase in text.split(",")):
        if phrase and phrase.casefold() not in seen:
            seen.add(phrase.casefold())
            phrases.append(phrase)
    return ", ".join(phrases)


def styled_of(wire: WireData, rules: JobRules, reject: Rejection) -> Styled:
    """The wording of the job in `wire`; refuses presets that nobody knows, and what they make too long."""
    presets = rules.presets()
    style = _known("style", wire.style, presets.styles, reject)
    industry = _known("industry", wire.industry, presets.industries, reject)
    prompt, negative_prompt = wire.prompt.strip(), wire.negative_prompt or ""
    made = styled(prompt, negative_prompt, style=style, industry=industry)
    _check_length("prompt", prompt, made.prompt, reject)
    _check_length("negative_prompt", negative_prompt, made.negative_prompt, reject)
    return made


def adapters_of(made: Styled, rules: JobRules, reject: Rejection) -> tuple[JobAdapter, ...]:
    """The presets' adapter, for a job that names none itself."""
    if made.adapter is None:
        return ()
    ref = located("the preset's adapter", made.adapter.path, rules, reject)
    return () if ref is None else (JobAdapter(ref, made.adapter.scale),)


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
