"""Who may import whom, read from the source."""

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT

PACKAGES = ("worker", "inference", "watermark", "clients", "config")
SIBLINGS = {"inference", "watermark", "clients"}
MAY_IMPORT = {
    "worker": {"worker", "inference", "watermark", "clients", "config"},
    "inference": {"inference", "config"},
    "watermark": {"watermark", "config"},
    "clients": {"clients", "config"},
    "config": {"config"},
}
# Where all three siblings meet: what is fetched for a job, and its local twin.
MEETINGS = {"worker.jobs.inputs.fetcher", "worker.cli.generate"}
# From top to bottom: each may import those below it. A module that is named stands apart from its folder.
ORDER = (
    "worker.__main__",
    "worker.cli",
    "worker.cli.check",
    "worker.cli.report",
    "worker.cli.dead",
    "worker.cli.outbox",
    "worker.cli.exits",
    "worker.cli.terminal",
    "worker.supervisor",
    "worker.wiring",
    "worker.product",
    "worker.monitoring",
    "worker.jobs",
    "worker.jobs.inputs",
    "worker.progress",
    "worker.results",
    "worker.messages",
    "worker.amqp",
    "worker.tracing",
    "worker",
    "inference.process",
    "inference.engine",
    "inference.models",
    "inference.lane",
    "inference.controlnet",
    "inference.latents",
    "inference.lora",
    "inference.sampling",
    "inference.device",
    "inference.checkpoints",
    "inference",
    "watermark.product",
    "watermark.signature",
    "watermark.text",
    "watermark.provenance",
    "watermark",
    "clients",
    "config",
)
MAX_MODULES = 13
# Who may use a product's own parts: what builds the worker, its local twin, and the check of its cutter.
USERS_OF_PRODUCT = {"worker.wiring", "worker.cli.generate", "worker.cli.check.models"}
# What the supervisor may load of the engine.
TORCH_FREE = (
    "inference.errors",
    "inference.request",
    "inference.engine.batcher",
    "inference.lora.slots",
    "inference.controlnet.cache",
    "inference.process.engine_process",
    "inference.process.child_handle",
    "inference.process.protocol",
    "inference.process.parent_death",
    "inference.process.pending",
    "inference.process.quarantine",
    "inference.process.health",
)
TORCH = {"torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "compel"}


@cache
def modules() -> dict[str, ast.Module]:
    """Map every module of our packages by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            found[name] = ast.parse(path.read_text(), str(path))
    return found


@cache
def imports_of(name: str) -> frozenset[str]:
    """Return every dotted name that the module imports, wherever in the file; a module where the name is one."""
    return frozenset(_imports_of(name))


def _imports_of(name: str) -> Iterator[str]:
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


def is_package(name: str) -> bool:
    return (ROOT / name.replace(".", "/")).is_dir()


def folder_of(name: str) -> str:
    return name if is_package(name) else name.rpartition(".")[0]


def place_of(name: str) -> int:
    """Return the position in `ORDER` of the longest entry that names the module or a folder around it."""
    around = [place for place in ORDER if f"{name}.".startswith(f"{place}.")]
    return ORDER.index(max(around, key=len))


def circle_in(graph: Mapping[Any, set[Any] | frozenset[Any]]) -> set[Any]:
    """Return the modules in a circle or importing one; empty where there is none."""
    left = dict(graph)
    while leaves := {name for name, imported in left.items() if not imported & left.keys()}:
        left = {name: imported for name, imported in left.items() if name not in leaves}
    return set(left)


def test_the_packages_are_found() -> None:
    assert {name.split(".")[0] for name in modules()} == set(PACKAGES)
    assert {
        "worker.jobs.handler",
        "inference.engine.local_engine",
        "watermark.signature",
        "clients.storage.client",
        "config.settings",
    } <= set(modules())


def test_imports_run_from_the_worker_to_its_parts_to_the_settings() -> None:
    ours = {name: packages_of(name) & {*PACKAGES, "tests", "benchmarks"} for name in modules()}

    assert {name: found for name, found in ours.items() if not found <= MAY_IMPORT[name.partition(".")[0]]} == {}


def test_only_the_command_line_imports_the_examples() -> None:
    assert importers_of("examples") == {"worker.cli.main"}


def test_sibling_folders_are_imported_together_only_where_inputs_are_loaded() -> None:
    meeting = {name for name in modules() if packages_of(name) >= SIBLINGS}

    assert "worker.jobs.inputs.fetcher" in meeting
    assert meeting <= MEETINGS


def test_pika_is_imported_in_amqp_and_in_the_broker_check_alone() -> None:
    importers = importers_of("pika")

    assert importers
    assert {name for name in importers if folder_of(name) != "worker.amqp"} <= {"worker.cli.check.broker"}


def test_a_folder_imports_only_folders_below_it() -> None:
    places = {name: place_of(name) for name in modules()}
    upward = {
        (name, one) for name in modules() for one in imports_of(name) & modules().keys() if places[one] < places[name]
    }

    assert upward == set()


def test_kinds_of_jobs_are_imported_by_the_wiring_alone() -> None:
    users = {name for name in modules() if any(one.startswith("worker.product.") for one in imports_of(name))}

    assert "worker.wiring" in users
    assert {name for name in users if folder_of(name) != "worker.product"} <= USERS_OF_PRODUCT


def test_no_folders_import_one_another_in_a_circle() -> None:
    graph: dict[int, set[int]] = {}
    for name in modules():
        graph.setdefault(place_of(name), set()).update(map(place_of, imports_of(name) & modules().keys()))

    assert circle_in({place: imported - {place} for place, imported in graph.items()}) == set()


@pytest.mark.parametrize("folder", sorted({folder_of(name) for name in modules()}))
def test_a_folder_holds_no_more_modules_than_a_page_lists(folder: str) -> None:
    inside = {name for name in modules() if folder_of(name) == folder and not is_package(name)}

    assert len(inside) <= MAX_MODULES


@pytest.mark.parametrize("name", TORCH_FREE)
def test_engine_modules_loaded_by_the_supervisor_are_free_of_torch(name: str) -> None:
    reached, new = set[str](), {name}
    while new:
        reached |= new
        new = {imported for one in new for imported in imports_of(one) & modules().keys()} - reached

    assert not {one for one in reached if packages_of(one) & TORCH}


def test_torch_is_imported_in_the_engine_alone() -> None:
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
    assert circle_in({name: imports_of(name) & modules().keys() for name in modules()}) == set()


def test_the_supervisor_loads_no_torch() -> None:
    code = "import sys, worker.cli.main, worker.supervisor; print(*sorted(m for m in sys.modules if '.' not in m))"

    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )

    loaded = set(ended.stdout.split())
    assert {"worker", "inference", "clients", "pika"} <= loaded
    assert loaded & TORCH == set()
    # For those alone who have a certificate
    assert loaded & {"c2pa", "cryptography"} == set()
    # For those alone who trace
    assert "opentelemetry" not in loaded


def test_opentelemetry_is_imported_where_it_is_known_to_be_there() -> None:
    assert importers_of("opentelemetry") == {"worker.tracing.otel", "worker.tracing.exporting"}


def test_no_child_is_started_with_the_working_directory_on_its_path() -> None:
    """A user's config.py or worker.py there would be imported in place of ours."""
    files = [path for package in (*PACKAGES, "examples") for path in (ROOT / package).rglob("*.py")]
    ours = {path.relative_to(ROOT): path.read_text() for path in files}
    # It starts itself anew, from where it was started.
    starters = {path for path, text in ours.items() if '"-m"' in text} - {
        Path("examples/demo_model/recipe/__main__.py")
    }

    assert Path("inference/process/child_handle.py") in starters
    assert {path for path in starters if "path_variables()" not in ours[path]} == set()


def test_every_module_has_a_docstring() -> None:
    silent = {name for name, tree in modules().items() if tree.body and ast.get_docstring(tree) is None}

    assert silent == set()
