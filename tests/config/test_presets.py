"""Presets: the built-in ones, an operator's own, what they do to a job, and what a file must not be able to do."""

import json
import logging
import os
import re
import threading
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as bounded
from hypothesis import strategies as st
from typer.testing import CliRunner

from clients.storage.location import ObjectRef
from config.images import ImageSettings
from config.model import ModelSettings
from config.presets.catalog import (
    BUILTIN_FILE,
    MAX_ADAPTER_SCALE,
    MAX_GUIDANCE,
    MAX_LOCATION_CHARS,
    MAX_STEPS,
    MAX_TEMPLATE_CHARS,
    PLACEHOLDER,
    Preset,
    Presets,
    PresetsInvalid,
    builtin_presets,
    load_presets,
)
from config.presets.plain_yaml import MAX_BYTES
from config.presets.preset_file import CHECK_SECONDS, PresetFile
from config.section import SettingsError
from config.settings import load_settings
from config.store import StoreSettings
from examples.parts.seaweedfs import SeaweedFS
from tests.support.paths import ROOT
from tests.support.world import HANG_SECONDS, eventually
from tests.worker.messages.test_decoder import job_of, message, rejection_of
from worker.cli.check.checks import CheckFailed
from worker.cli.check.files import check_presets
from worker.cli.main import app
from worker.messages.decoder import rules_from
from worker.messages.job import JobAdapter
from worker.messages.json_schemas import schema_of
from worker.messages.presets import styled
from worker.messages.rules import MAX_REASON_CHARS, JobRules
from worker.messages.schema import MAX_PROMPT_CHARS

STORE = StoreSettings(AWS_STORAGE_BUCKET_NAME="media")  # type: ignore[call-arg]
OWN = """
styles:
  neon:
    positive: "neon sign of {prompt}, glowing"
    negative: "daylight, blurry"
    guidance_scale: 9.5
    steps: 12
    adapter: {path: models/neon.safetensors, scale: 0.8}
  plain:
    positive: "{prompt}"
industries:
  cafe:
    positive: "{prompt} in a cafe"
    negative: "Blurry, crowd"
    guidance_scale: 4
    steps: 20
    adapter: {path: models/cafe/}
"""
ONE = 'styles: {{{name}: {{positive: "{positive}"{more}}}}}'


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def pass_on(self) -> None:
        self.now += CHECK_SECONDS


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "presets.yaml"
    path.write_text(OWN)
    return path


@pytest.fixture
def rules(own: Path) -> JobRules:
    """Build the rules of a worker with the operator's own presets."""
    return rules_with(own)


def rules_with(path: Path, **model: Any) -> JobRules:
    return rules_from(ModelSettings(**model), STORE, ImageSettings(PRESETS_FILE=path))  # type: ignore[call-arg]


def one(name: str = "a", positive: str = PLACEHOLDER, more: str = "") -> str:
    return ONE.format(name=name, positive=positive, more=more)


def refusal_of(path: Path, content: str | bytes) -> str:
    """Return the sentence that refuses a file with this content, without the file's own name."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(PresetsInvalid) as caught:
        load_presets(path)
    sentence = str(caught.value)
    assert sentence.startswith(str(path))
    assert len(sentence) <= 400
    assert "\n" not in sentence
    return sentence.removeprefix(str(path))


# --- The built-in ones


def all_builtin() -> Iterator[tuple[str, str, Preset]]:
    for field, known in builtin_presets().by_field.items():
        for name, preset in known.items():
            yield field, name, preset


def test_built_in_presets_are_those_documented() -> None:
    styles = "realistic anime illustration watercolor oil_painting pixel_art 3d_render minimal vintage line_art"
    industries = (
        "cafe restaurant retail service bakery beauty fashion fitness hotel real_estate education medical automotive "
        "technology travel event pet flower"
    )

    assert set(styles.split()) <= set(builtin_presets().styles)
    assert set(industries.split()) <= set(builtin_presets().industries)


@pytest.mark.parametrize(("field", "name", "preset"), [*all_builtin()], ids=lambda one: one if type(one) is str else "")
def test_a_built_in_preset_suits_every_family_and_every_other(field: str, name: str, preset: Preset) -> None:
    # What a family decides, and an adapter that no bucket has, are no business of what comes with the worker.
    assert (preset.steps, preset.guidance_scale, preset.adapter) == (None, None, None)
    # No weights, which would make a user's own parentheses mean something.
    assert not re.search(r"[()\[\]:\\]", preset.positive + preset.negative)
    # Both templates together leave the user half of the 75 tokens that are read in one go, at some five letters each.
    assert len(preset.positive) <= 130
    assert 0 < len(preset.negative) <= 100
    if field == "industry":
        assert not re.search(r"photo|paint|illustration|render|drawing", preset.positive)


def test_the_file_is_part_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())

    assert project["tool"]["setuptools"]["package-data"]["config.presets"] == [BUILTIN_FILE.name]
    assert "COPY config ./config" in (ROOT / "Dockerfile").read_text()


def test_the_limits_are_those_of_a_job() -> None:
    fields = schema_of("job")["properties"]["data"]["properties"]

    def limits(name: str) -> tuple[float, float]:
        return fields[name]["minimum"], fields[name]["maximum"]

    assert limits("num_inference_steps") == (1, MAX_STEPS)
    assert limits("guidance_scale") == (0, MAX_GUIDANCE)
    assert limits("lora_scale") == (-MAX_ADAPTER_SCALE, MAX_ADAPTER_SCALE)
    assert fields["lora_path"]["maxLength"] == MAX_LOCATION_CHARS
    assert 2 * MAX_TEMPLATE_CHARS <= MAX_PROMPT_CHARS / 2


# --- Applying


def test_the_industry_wraps_the_prompt_and_the_style_wraps_both(rules: JobRules) -> None:
    job = job_of(
        rules, message(prompt=" latte ", style="neon", industry="cafe", negative_prompt="Daylight, (a, b:1.2)")
    )

    assert job.prompt == "neon sign of latte in a cafe, glowing"
    assert job.negative_prompt == "Daylight, (a, b:1.2), blurry, crowd"
    assert (job.style, job.industry) == ("neon", "cafe")


def test_job_without_presets_is_unchanged(rules: JobRules) -> None:
    job = job_of(rules, message(prompt=" latte ", negative_prompt=" a,  a", style="", industry=None))

    assert (job.prompt, job.negative_prompt, job.style, job.industry) == ("latte", "a,  a", None, None)
    assert (job.num_inference_steps, job.guidance_scale, job.adapters) == (None, None, ())


JOB_S = {"num_inference_steps": 33, "guidance_scale": 3.3}
DOCUMENTED_S = {"parameters": {"steps": 44, "cfg_scale": 4.4}}
BOTH = {"style": "neon", "industry": "cafe"}


@pytest.mark.parametrize(
    ("fields", "steps", "guidance"),
    [
        (BOTH | JOB_S | DOCUMENTED_S, 44, 4.4),
        (BOTH | JOB_S, 33, 3.3),
        (BOTH | {"guidance_scale": 0}, 12, 0),
        (BOTH, 12, 9.5),
        ({"style": "plain", "industry": "cafe"}, 20, 4),
        ({"industry": "cafe"}, 20, 4),
        ({"style": "plain"}, 70, 7),
        ({}, 70, 7),
    ],
)
def test_steps_and_guidance_are_the_job_s_then_the_style_s_then_the_industry_s_then_the_settings(
    own: Path, fields: dict[str, Any], steps: int, guidance: float
) -> None:
    job = job_of(rules_with(own, INFERENCE_STEPS=70, GUIDANCE_SCALE=7), message(**fields))

    assert (job.num_inference_steps, job.guidance_scale) == (steps, guidance)


@pytest.mark.parametrize(
    ("fields", "adapters"),
    [
        (BOTH | {"lora_path": "models/own.safetensors"}, [("models/own.safetensors", 1.0)]),
        (BOTH | {"loras": [{"path": "models/own/", "scale": 0.5}]}, [("models/own/", 0.5)]),
        (BOTH | {"lora_path": "", "loras": []}, [("models/neon.safetensors", 0.8)]),
        ({"style": "plain", "industry": "cafe"}, [("models/cafe/", 1.0)]),
        ({"style": "plain"}, []),
    ],
)
def test_preset_s_adapter_applies_to_a_job_without_one(
    rules: JobRules, fields: dict[str, Any], adapters: list[tuple[str, float]]
) -> None:
    job = job_of(rules, message(**fields))

    assert job.adapters == tuple(JobAdapter(ObjectRef("media", key), scale) for key, scale in adapters)


@pytest.mark.parametrize("prompt", ["{prompt}", "{0.__class__} {", "a {prompt} b {{prompt}}", "%s ${prompt}", r"\1"])
def test_braces_in_a_prompt_are_text(rules: JobRules, prompt: str) -> None:
    job = job_of(rules, message(prompt=prompt, **BOTH))

    assert job.prompt == f"neon sign of {prompt} in a cafe, glowing"


TEXTS = st.text(max_size=60) | st.sampled_from([PLACEHOLDER, "{{prompt}}", "{", "a, b", ""])
TEMPLATES = st.tuples(TEXTS, TEXTS).map(PLACEHOLDER.join).filter(lambda text: text.count(PLACEHOLDER) == 1)
PRESETS = st.builds(Preset, positive=TEMPLATES, negative=TEXTS) | st.none()


@bounded(max_examples=200, deadline=1000)
@given(prompt=TEXTS, negative=TEXTS, style=PRESETS, industry=PRESETS)
def test_a_job_s_own_words_are_always_in_what_the_model_reads(
    prompt: str, negative: str, style: Preset | None, industry: Preset | None
) -> None:
    made = styled(prompt, negative, style=style, industry=industry)

    assert prompt in made.prompt
    added = sum(len(preset.positive) - len(PLACEHOLDER) for preset in (style, industry) if preset)
    assert len(made.prompt) == len(prompt) + added
    assert made.negative_prompt.startswith(negative.strip())


# --- Refusing jobs


@pytest.mark.parametrize("field", ["style", "industry"])
def test_an_unknown_preset_is_one_refusal_that_names_the_field_and_the_known_ones(rules: JobRules, field: str) -> None:
    rejected = rejection_of(rules, message(**{"style": "neon", "industry": "cafe", field: "nope\u202e"}))

    assert rejected.code == "INVALID_INPUT"
    assert f"data.{field} 'nope\\u202e'" in str(rejected)
    assert str(rejected).endswith("there are neon, plain" if field == "style" else "there are cafe")


def test_unknown_preset_lists_only_some_of_a_thousand_names(tmp_path: Path) -> None:
    path = tmp_path / "many.yaml"
    path.write_text("styles:\n" + "".join(f'  name_{number}: {{positive: "{{prompt}}"}}\n' for number in range(1000)))

    rejected = rejection_of(rules_with(path), message(style="nope"))

    assert len(str(rejected)) <= MAX_REASON_CHARS
    assert re.search(r"name_\d+, …$", str(rejected))


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_prompt_made_too_long_by_presets_is_refused_with_the_added_text(rules: JobRules, field: str) -> None:
    added = len("neon sign of , glowing" if field == "prompt" else ", daylight, blurry")
    fits = "a" * (MAX_PROMPT_CHARS - added)

    assert len(getattr(job_of(rules, message(style="neon", **{field: fits})), field)) == MAX_PROMPT_CHARS
    rejected = rejection_of(rules, message(style="neon", **{field: fits + "a"}))

    assert rejected.code == "INVALID_PROMPT"
    assert str(rejected).startswith(f"{field} has {MAX_PROMPT_CHARS + 1} characters, {added} of them added")


# --- Hostile and mistaken files


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (one(more=", postive: x"), "styles.a has an unknown key 'postive'"),
        ("style: {}", "the file has an unknown key 'style'"),
        (one(more=", adapter: {path: a.safetensors, strength: 1}"), "styles.a.adapter has an unknown key 'strength'"),
        ('styles: {a: {negative: "x"}}', "styles.a.positive: Field required"),
        ("styles: {a: anime}", "styles.a must be a mapping"),
        ("[styles]", "the file must be a mapping"),
        ("styles: [a]", "styles must be a mapping"),
        (one(positive="no place"), "styles.a.positive: must hold {prompt} exactly once"),
        (one(positive="{prompt} {prompt}"), "styles.a.positive: must hold {prompt} exactly once"),
        (one(positive="{prompt}" + "a" * MAX_TEMPLATE_CHARS), f"at most {MAX_TEMPLATE_CHARS}"),
        (one(name="Anime"), "'styles.Anime' is no name"),
        (one(name="a" * 41), "is no name"),
        (one(name='"a\\n"'), "is no name"),
        (one(more=f", steps: {MAX_STEPS + 1}"), f"styles.a.steps: Input should be less than or equal to {MAX_STEPS}"),
        (one(more=", steps: 0"), "styles.a.steps"),
        (one(more=", steps: 7.5"), "styles.a.steps"),
        (one(more=f", steps: {'9' * 5000}"), "styles.a.steps"),
        (one(more=", guidance_scale: .inf"), "styles.a.guidance_scale"),
        (one(more=", guidance_scale: 1e999"), "styles.a.guidance_scale"),
        (one(more=", guidance_scale: -1"), "styles.a.guidance_scale"),
        (one(more=", adapter: {path: ''}"), "styles.a.adapter.path"),
        (one(more=", adapter: {path: a, scale: 5}"), "styles.a.adapter.scale"),
    ],
)
def test_invalid_preset_is_refused_by_preset_and_key(tmp_path: Path, content: str, words: str) -> None:
    assert words in refusal_of(tmp_path / "presets.yaml", content)


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join(['*' + below] * 9)}]\n" for below, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"# nothing\n", "is empty"),
        (b"styles: {a: {}, a: {}}", "line 1 has the key 'a' a second time"),
        (b"styles:\n  a: {positive: x, positive: y}", "line 2 has the key 'positive' a second time"),
        (BOMB.encode(), "used again by an alias"),
        (b"a: &a {x: y}\nb: {<<: *a}", "line 1 is used again by an alias"),
        (b"styles: &a {b: *a}", "is used again by an alias"),
        (b'styles: !!python/object/apply:os.system ["touch pwned"]', "line 1 has a tag"),
        (b'!!python/name:os.system ""', "line 1 has a tag"),
        (b"--- {}\n--- {}", "line 2 is not YAML"),
        (b"styles: {a: [}", "line 1 is not YAML"),
        (b"{[a]: b}", "line 1 is a key that is no text"),
        (b"[" * 1500, "is nested too deeply"),
        (b"styles: \x00", "is not YAML"),
        (b'styles: {a: {positive: "{prompt} \\0"}}', "line 1 has a NUL"),
        (b'styles: {a: {positive: "{prompt} \\ud800"}}', "line 1 has a NUL or half a surrogate"),
        (b"styles: \xff", "is not UTF-8 at byte 8"),
        ("styles: {}".encode("utf-16"), "is not UTF-8"),
        (b"#" * (MAX_BYTES + 1), f"has more than {MAX_BYTES} bytes"),
    ],
    ids=lambda case: case if isinstance(case, str) else "",
)
def test_invalid_yaml_is_refused_by_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, words: str
) -> None:
    monkeypatch.chdir(tmp_path)

    assert words in refusal_of(tmp_path / "presets.yaml", content)
    assert [path.name for path in tmp_path.iterdir()] == ["presets.yaml"]


def test_yaml_guesses_no_types_and_takes_what_editors_make(tmp_path: Path) -> None:
    path = tmp_path / "presets.yaml"
    path.write_bytes(
        b"\xef\xbb\xbf" + b'styles:\r\n  no:\r\n    positive: >-\r\n      {prompt},\r\n      1:30\r\n    steps: "8"\r\n'
    )

    assert load_presets(path) == Presets(styles={"no": Preset(positive="{prompt}, 1:30", steps=8)})


@pytest.mark.parametrize(("path", "words"), [("/nowhere", "no file"), ("/dev/zero", "no file"), (".", "no file")])
def test_preset_path_that_is_not_a_readable_file_is_refused(path: str, words: str) -> None:
    with pytest.raises(PresetsInvalid, match=words):
        load_presets(Path(path))


# --- The start


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("s3://elsewhere/a.safetensors", "the adapter of style a: 's3://elsewhere/a.safetensors' is in a bucket"),
        ("../a.safetensors", "the adapter of style a"),
        ("models/a.bin", "may hold a pickle"),
    ],
)
def test_an_adapter_that_jobs_may_not_read_is_found_at_the_start(tmp_path: Path, path: str, words: str) -> None:
    file = tmp_path / "presets.yaml"
    file.write_text(one(more=f', adapter: {{path: "{path}"}}'))

    with pytest.raises(SettingsError) as caught:
        rules_with(file)

    assert str(caught.value).startswith("PRESETS_FILE: ")
    assert words in str(caught.value)


@pytest.mark.parametrize("more", ["", ', adapter: {path: "s3://elsewhere/a.safetensors"}'], ids=["form", "bucket"])
def test_a_command_ends_with_2_and_names_the_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: str
) -> None:
    file = tmp_path / "presets.yaml"
    file.write_text(one(name="a" if more else "A", more=more))
    variables = {"AWS_STORAGE_BUCKET_NAME": "media", "BACKEND_API_URL": "http://b", "INTERNAL_API_TOKEN": "t"}
    for name, value in (variables | {"PRESETS_FILE": str(file)}).items():
        monkeypatch.setenv(name, value)

    done = CliRunner().invoke(app, ["dead", "list"])

    assert done.exit_code == 2
    assert f"PRESETS_FILE: {'the adapter' if more else file}" in done.output.replace("\n", "")


# --- While the worker runs


def replace_atomically(path: Path, content: str) -> None:
    other = path.with_suffix(".new")
    other.write_text(content)
    other.replace(path)


def prompt_of(rules: JobRules) -> str:
    return job_of(rules, message(prompt="cat", style="neon")).prompt


def test_changed_preset_file_applies_to_the_next_job_and_a_broken_one_never(
    own: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    rules = JobRules(None, None, lambda text: ObjectRef("media", text), PresetFile(own, clock=clock).current)
    caplog.set_level(logging.INFO, "config.presets.preset_file")

    # Replaced: not within the same second, but in the next
    replace_atomically(own, OWN.replace("neon sign", "big neon sign"))
    assert prompt_of(rules) == "neon sign of cat, glowing"
    clock.pass_on()
    assert prompt_of(rules) == "big neon sign of cat, glowing"

    # Broken, twice asked, then gone: one warning for each, and what was right stays
    own.write_text(OWN.replace("positive", "postive"))
    for _ in range(2):
        clock.pass_on()
        assert prompt_of(rules) == "big neon sign of cat, glowing"
    own.unlink()
    for _ in range(2):
        clock.pass_on()
        assert prompt_of(rules) == "big neon sign of cat, glowing"

    # Mended
    own.write_text(OWN)
    clock.pass_on()
    assert prompt_of(rules) == "neon sign of cat, glowing"
    levels = [record.levelname for record in caplog.records]
    assert levels == ["INFO", "WARNING", "WARNING", "INFO"]
    assert "unknown key 'postive'" in caplog.records[1].fields["reason"]  # type: ignore[attr-defined]


def test_a_file_that_was_only_touched_or_names_a_forbidden_adapter_changes_nothing(own: Path) -> None:
    clock = Clock()

    def validate(presets: Presets) -> None:
        if "models/bad.safetensors" in {adapter.path for adapter in presets.adapters.values()}:
            raise PresetsInvalid("forbidden")

    file = PresetFile(own, validate, clock)
    first = file.current()
    os.utime(own)
    clock.pass_on()
    assert file.current() == first

    own.write_text(OWN.replace("models/neon.safetensors", "models/bad.safetensors"))
    clock.pass_on()
    assert file.current() == first


def test_reload_in_one_thread_blocks_no_other(own: Path) -> None:
    """A slow disk under one job's thread must not hold up the others."""
    clock = Clock()
    seen: list[Presets] = []

    def validate(presets: Presets) -> None:
        if clock.now:  # in the middle of reading anew: here another thread would ask
            seen.append(file.current())

    file = PresetFile(own, validate, clock)
    first = file.current()
    own.write_text(OWN.replace("neon sign", "big neon sign"))
    clock.pass_on()

    assert file.current() is not first
    assert seen == [first]


def test_hanging_disk_blocks_no_decoding(own: Path) -> None:
    """Messages are decoded where heartbeats are sent."""
    clock, is_read = Clock(), threading.Event()

    def validate(_presets: Presets) -> None:
        if clock.now:
            is_read.wait(HANG_SECONDS)

    file = PresetFile(own, validate, clock)
    first = file.current()
    own.write_text(OWN.replace("neon sign", "big neon sign"))
    clock.pass_on()
    began_at = time.monotonic()

    assert file.current() is first
    clock.pass_on()
    assert file.current() is first
    assert time.monotonic() - began_at < 60
    is_read.set()
    eventually(lambda: file.current() is not first)


# --- The command


def test_the_command_lists_every_preset_as_a_table_and_as_json(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    builtin = CliRunner().invoke(app, ["presets"])
    monkeypatch.setenv("PRESETS_FILE", str(own))
    lines = CliRunner().invoke(app, ["presets", "--json"])

    assert builtin.exit_code == 0, builtin.output
    assert all(f" {name} " in builtin.output for _, name, _ in all_builtin())
    rows = [json.loads(line) for line in lines.stdout.splitlines()]
    assert [(row["kind"], row["name"]) for row in rows] == [("style", "neon"), ("style", "plain"), ("industry", "cafe")]
    assert rows[0]["adapter"] == {"path": "models/neon.safetensors", "scale": 0.8}


# --- The page


def test_documented_job_and_preset_file_work_as_documented(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "presets.md").read_text()
    [job], [file] = (re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL) for kind in ("json", "yaml"))
    [read] = re.findall(r"^> (.*?)\n\n", page, re.DOTALL | re.MULTILINE)
    own = tmp_path / "presets.yaml"
    own.write_text(file)

    assert job_of(rules_from(ModelSettings(), STORE), json.loads(job)).prompt == read.replace("\n> ", " ")
    assert rules_with(own).presets().adapters["industry tteok"].path == "styles/tteok/"


# --- darkroom check


def test_check_finds_the_adapter_that_is_not_in_the_store(
    own: Path, s3_server: SeaweedFS, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = s3_server.env(bucket) | {"BACKEND_API_URL": "http://b", "INTERNAL_API_TOKEN": "t"}
    for name, value in (variables | {"PRESETS_FILE": str(own)}).items():
        monkeypatch.setenv(name, value)
    s3_server.client().put_object(Bucket=bucket, Key="models/neon.safetensors", Body=b"x")

    with pytest.raises(CheckFailed, match=r"the adapter of industry cafe: .*models/cafe/adapter_model.safetensors"):
        check_presets(load_settings())
    s3_server.client().put_object(Bucket=bucket, Key="models/cafe/adapter_model.safetensors", Body=b"x")

    assert check_presets(load_settings()) == f"2 styles and 1 industries in {own}"
