"""Who may import whom, read from the source."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("worker", "inference", "watermark", "clients", "config")
SIBLINGS = {"inference", "watermark", "clients"}
MAY_IMPORT = {
    "worker": {"worker", "inference", "watermark", "clients", "config"},
    "inference": {"inference", "config"},
    "watermark": {"watermark", "config"},
    "clients": {"clients", "config"},
    "config": {"config"},
}
# Where all three siblings meet: a job's story, what is fetched for it, and its local twin.
MEETINGS = {"worker.story", "worker.fetching", "worker.local"}
TORCH = {"torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "compel"}


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of our packages by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            found[name] = ast.parse(path.read_text(), str(path))
    return found


def imports_of(name: str) -> Iterator[str]:
    """Every dotted name that the module imports, wherever in the file it does; a module where the name is one."""
    for node in ast.walk(modules()[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in modules() else str(node.module)


def packages_of(name: str) -> set[str]:
    return {imported.split(".")[0] for imported in imports_of(name)}


def importers_of(*packages: str) -> set[str]:
    return {name for name in modules() if packages_of(name) & set(packages)}


def test_the_packages_are_found() -> None:
    assert {name.split(".")[0] for name in modules()} == set(PACKAGES)
    assert {
        "worker.story",
        "inference.engine.local_engine",
        "watermark.signature",
        "clients.storage",
        "config.settings",
    } <= set(modules())


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_run_from_the_worker_to_its_parts_to_the_settings(name: str) -> None:
    package = name.partition(".")[0]
    ours = packages_of(name) & {*PACKAGES, "tests", "benchmarks"}

    assert ours <= MAY_IMPORT[package]


def test_only_the_command_line_knows_the_examples() -> None:
    assert importers_of("examples") == {"worker.cli"}


def test_the_siblings_meet_only_where_a_job_s_story_is_told() -> None:
    meeting = {name for name in modules() if packages_of(name) >= SIBLINGS}

    assert "worker.story" in meeting
    assert meeting <= MEETINGS


def test_pika_lives_in_five_files_for_work_its_refusals_decoding_inspection_and_the_check() -> None:
    names = ("broker", "broker_refusals", "content_headers", "inspection", "checks.broker")
    assert importers_of("pika") == {f"worker.{name}" for name in names}


def test_torch_lives_in_the_engine() -> None:
    importers = importers_of(*TORCH)

    assert importers
    assert {name.split(".")[0] for name in importers} == {"inference"}


@pytest.mark.parametrize(
    ("library", "package"),
    [
        ("boto3", "clients"),
        ("botocore", "clients"),
        ("requests", "clients"),
        ("fontTools", "watermark"),
        ("c2pa", "watermark"),
        ("cryptography", "watermark"),
    ],
)
def test_a_client_library_stays_in_its_package(library: str, package: str) -> None:
    assert {name.split(".")[0] for name in importers_of(library)} == {package}


def test_no_modules_import_one_another_in_a_circle() -> None:
    graph = {name: {imported for imported in imports_of(name) if imported in modules()} for name in modules()}

    # Take away what imports nothing that is left; what remains at the end is in a circle or behind one.
    while leaves := {name for name, imported in graph.items() if not imported}:
        graph = {name: imported - leaves for name, imported in graph.items() if name not in leaves}

    assert graph == {}


def test_the_supervisor_loads_no_torch() -> None:
    code = "import sys, worker.cli, worker.supervisor; print(*sorted(m for m in sys.modules if '.' not in m))"

    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )

    loaded = set(ended.stdout.split())
    assert {"worker", "inference", "clients", "pika"} <= loaded
    assert loaded & TORCH == set()
    # For those alone who have a certificate
    assert loaded & {"c2pa", "cryptography"} == set()


def test_every_module_says_what_it_is_for() -> None:
    silent = {name for name, tree in modules().items() if tree.body and ast.get_docstring(tree) is None}

    assert silent == set()
