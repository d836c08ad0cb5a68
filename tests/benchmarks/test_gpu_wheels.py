"""What the GPU command takes along to a machine without network: exact pins, ours, and with all that they need."""

from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import has_gpu_tests
from tests.support.imports import packages_of
from tests.support.paths import ROOT

# diffusers names it and takes the standard library's.
NOT_NEEDED = {"importlib-metadata"}


def pins(path: Path) -> dict[str, str]:
    """Read the versions of a list of exact pins, by canonical names."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    pairs = [line.split("==") for line in lines]
    return {canonicalize_name(name): version for name, version in pairs}


WHEELS = pins(ROOT / "benchmarks" / "gpu" / "wheels.txt")
MACHINE = pins(ROOT / "benchmarks" / "gpu" / "machine.txt")


@pytest.mark.parametrize("name", WHEELS)
def test_a_wheel_has_the_version_that_everything_else_here_is_tested_with(name: str) -> None:
    assert WHEELS[name] == pins(ROOT / "constraints.txt")[name]


@pytest.mark.parametrize("name", WHEELS)
def test_wheel_requirements_are_met_by_other_wheels_or_by_the_machine(name: str) -> None:
    versions = MACHINE | WHEELS
    required = [Requirement(text) for text in metadata.requires(name) or () if "extra ==" not in text]
    on_the_machine = {"python_version": "3.12", "python_full_version": "3.12.1"}
    needed = [one for one in required if one.marker is None or one.marker.evaluate(on_the_machine)]

    missing = [
        str(one)
        for one in needed
        if canonicalize_name(one.name) not in NOT_NEEDED
        and not one.specifier.contains(versions.get(canonicalize_name(one.name), ""), prereleases=True)
    ]

    assert missing == []


def test_the_command_and_the_tests_for_a_gpu_import_nothing_but_the_wheels_and_what_the_machine_has() -> None:
    tests = [path for path in (ROOT / "tests").rglob("test_*.py") if has_gpu_tests(path)]
    assert {"test_parity.py", "test_families.py", "test_real_device.py"} <= {path.name for path in tests}
    command = [*(ROOT / "benchmarks" / "gpu").rglob("*.py")]
    distributions = metadata.packages_distributions()

    packages = packages_of([*command, *tests, ROOT / "tests" / "conftest.py"])

    assert {"torch", "compel", "pydantic", "pytest"} <= packages
    there = WHEELS | MACHINE
    assert {
        name for name in packages if not any(canonicalize_name(one) in there for one in distributions[name])
    } == set()
