"""The site of docs/: it builds without a broken link, finds what readers look for, and needs nothing from elsewhere."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from tests.support.browsing import PageSession, chromium
from tests.support.long import long
from tests.support.paths import ROOT

BUILD = [sys.executable, "-m", "mkdocs", "build", "--strict"]
# A word that a reader types, and a page that answers.
LOOKED_FOR = [
    ("generation_id", "messages.html"),
    ("GCS", "google-cloud-storage.html"),
    pytest.param("refund", "messages.html", marks=long),
    pytest.param("priority", "rabbitmq.html", marks=long),
]
BROKEN = ("nowhere.md", "messages.md#no-heading", "../examples/nowhere.py", "/messages.md")


def build(site: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    """Build the site into a folder; its complaints are on standard error."""
    return subprocess.run(
        [*BUILD, "--site-dir", str(site), *options], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site as `make docs` does."""
    folder = tmp_path_factory.mktemp("site")
    built = build(folder)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Start one browser for all searches."""
    with chromium() as started:
        yield started


@pytest.mark.parametrize(("word", "page"), LOOKED_FOR)
def test_search_finds_what_readers_look_for_and_asks_no_other_server(
    site: Path, browser: Browser, word: str, page: str
) -> None:
    with PageSession(browser) as session:
        # As a file: a reader may have no server.
        session.page.goto((site / "index.html").as_uri())
        session.page.locator("input[name=query]").fill(word, force=True)

        expect(session.page.locator(f".md-search-result__link[href*='/{page}']").first).to_be_attached()
        assert session.origins == {"file:///"}
        assert session.complaints == []


def test_a_nested_list_stays_nested(site: Path) -> None:
    text = (site / "architecture.html").read_text()

    assert "<ul>\n<li><code>__main__.py</code>" in text
    assert "<ol>\n<li><code>worker/messages/schema.py</code>" in text


def test_files_outside_of_docs_are_on_the_site(site: Path) -> None:
    assert "amqplib" in (site / "source" / "examples" / "node" / "publisher.mjs.html").read_text()
    assert (site / "source" / "examples" / "index.html").is_file()


def test_the_changelog_is_on_the_site_and_not_in_its_search(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text())

    found = {entry["location"].partition("#")[0] for entry in index["docs"]}
    assert (site / "source" / "CHANGELOG.html").is_file()
    assert "source/CHANGELOG.html" not in found
    assert "source/CONTRIBUTING.html" in found


def test_broken_links_fail_the_build_which_names_each(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# Start\n\n" + "\n".join(f"[a link]({link})" for link in BROKEN))
    (tmp_path / "docs" / "messages.md").write_text("# Messages\n")
    config = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[0]
    (tmp_path / "mkdocs.yml").write_text(config.replace("[tests/", f"[{ROOT}/tests/"))

    built = build(tmp_path / "site", "--config-file", str(tmp_path / "mkdocs.yml"))

    assert built.returncode == 1
    warnings = [line for line in built.stderr.splitlines() if line.startswith("WARNING")]
    assert [link for link in BROKEN if not any(f" '{link}'" in line for line in warnings)] == []
