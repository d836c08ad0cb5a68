"""Names that were replaced by the field's words do not come back, in code, tests or pages."""

import re
from collections.abc import Iterator

import pytest

from tests.support.paths import ROOT

FOLDERS = ("worker", "inference", "watermark", "clients", "config", "tests", "examples", "benchmarks", "deploy", "docs")
PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "Makefile", "Dockerfile", "pyproject.toml")
SUFFIXES = {".py", ".md", ".yaml", ".toml", ".html", ".js", ".mjs"}
# Old name, as a regular expression for a whole identifier, and today's. Only what no other thing can be called.
REPLACED = {
    r"Storyteller|storytelling": "JobHandler, worker.wiring",
    r"ProductTeller": "ProductGeneration",
    r"Processor": "Dispatcher and JobRunner",
    r"settling\.py|jobs\.settling": "disposition",
    r"_Ending": "RunOutcome",
    r"part_from_deliveries": "detach_deliveries",
    r"_?bury": "dead_letter",
    r"_elsewhere_first": "_publish_then_ack",
    r"_surely": "_publish_until_confirmed",
    r"_follow_lease": "_start_unless_leased",
    r"_note_arrival|_note_departure": "_log_start, _log_end",
    r"\.insist|def insist": "retry_while_denied",
    r"_look_twice": "_retry_once",
    r"SECOND_LOOK_SECONDS": "NOT_FOUND_RETRY_, LEASE_RECHECK_, LOCK_RETRY_SECONDS",
    r"Drawer": "EngineClient",
    r"go_on_or_leave": "raise_if_unwanted",
    r"class Leg|Leg\(": "ProgressSpan",
    r"class Drawn|Drawn\(": "GeneratedImages",
    r"finishing": "postprocess",
    r"Labeller|labeller|labelling\.py": "ImageEncoder, image_encoder, image_metadata.py",
    r"PictureStore|storing\.py": "ImageStore, image_store.py",
    r"IdleWatch": "IdleTimer",
    r"class Inspection|Inspection\(": "QueueBrowser",
    r"(?:def|import) legible|legible\(": "escape_for_terminal",
    r"with_order": "with_generate_options",
    r"look_at_\w+": "check_*",
    r"stands_on": "depends_on",
    r"try_each": "run_checks",
    r"class Drawing|Drawing\(": "ActiveRequest",
    r"Lineup|suspects\.py": "Quarantine, quarantine.py",
    r"Vitals": "ChildHealth",
    r"_live_one_life": "_run_child",
    r"_defeat": "_on_crash",
    r"wire\.py|process\.wire": "protocol",
    r"dialects\.py|lora\.dialects": "key_names",
    r"ControlDesk": "ControlNetAdmission",
    r"_Backdrop": "SourceBlend",
    r"origins\.py": "latents/source.py",
    r"stepping\.py": "step_loop.py",
    r"courses\.py|foresight": "trajectory.py, samplers.py",
    r"residuals\.py|hints\.py|controls/": "controlnet/",
    r"class Seat|Seat\(": "DeviceSlot",
    r"take_turns": "offload_in_turns",
    r"Residence": "Placement",
    r"_?foresee": "plan_and_warn",
    r"Occupancy": "EngineLoad",
    r"(?:def|import) calmest|calmest\(|calm\.py": "quietest_region",
    r"_?put_back|protecting\.py": "restore_masked, masks.py",
    r"Workshop": "GenerationContext",
    r"class Making|Making\(": "ProductComposer",
    r"class (?:Verdict|Attempt|Shelf|Held|Letter|Finding|Dialect|Applied|Board|Course|Brought|Child|_Lane)": (
        "Decision, WebhookResult, WebhookAttempt, Guarded, StageStore, ControlNetCache, BrowsedMessage, DeadLetter, "
        "CheckResult, KeyNaming, AppliedAdapter, StatusBuilder, StepPlan, ProductInputs, ChildHandle, "
        "_KindQueue"
    ),
    r"Verdict|Readings": "Decision, WebhookResult, MetricsSnapshot",
    r"def wear|def trace|def unrest|unrest\(": ("route_adapters, derive_trajectory, gradient_energy"),
    r"keep_png": "save_png",
    r"told =": "what it holds: events, a message, fields",
    # In code a picture is an image; pages and messages to people may say picture.
    r"\w+_pictures?|_?pictures?_\w+|\w*(?:[a-z]Picture|Picture[A-Z])\w*|\w*PICTURE\w*": "image",
}
NAMES = re.compile(rf"\b(?<!-)(?:{'|'.join(REPLACED)})(?:(?<=\W)|(?![\w-]))")


def files() -> Iterator[tuple[str, str]]:
    """Yield path and text of every file but the changelog, which is history, and this one."""
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    for path in [*found, *(ROOT / page for page in PAGES)]:
        if path.is_file() and path.name != "test_names.py":
            yield path.relative_to(ROOT).as_posix(), path.read_text()


def uses(text: str) -> list[tuple[int, str]]:
    """Find each use of an old name: the line's number and the name."""
    return [(number, match[0]) for number, line in enumerate(text.splitlines(), 1) for match in NAMES.finditer(line)]


def test_no_file_uses_a_name_that_was_replaced() -> None:
    found = [f"{path}:{number} {name}" for path, text in files() for number, name in uses(text)]

    assert "\n".join(found) == ""


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("self._processor = Processor(runs)", ["Processor"]),
        ("look_at_store(client)", ["look_at_store"]),
        ("see `controls/` and worker/jobs/storing.py", ["controls/", "storing.py"]),
        ("class Leg(NamedTuple):", ["class Leg"]),
        ("Drawing takes a minute; image_storing.py is another", []),
        ("torch.nn.DataProcessor", []),
        ("ImageProcessor", []),
        ("_PICTURE_BYTES = len(decode_picture(content))", ["_PICTURE_BYTES", "decode_picture"]),
        ("A picture, PictureFormat and pictures; picture-wise.", ["PictureFormat"]),
    ],
)
def test_an_old_name_is_found_as_a_whole_identifier(text: str, found: list[str]) -> None:
    assert [name for _, name in uses(text)] == found
