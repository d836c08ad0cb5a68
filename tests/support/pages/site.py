"""The hook of mkdocs.yml: pages read the same on GitHub and on the site.

On GitHub a page may link to any file of the repository. The site gets a copy of each such file, below `source/`, so
that no link leads out of it.
"""

import posixpath
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[3]
DOCS, SOURCE = PurePosixPath("docs"), PurePosixPath("source")
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)[^)#\s]+")
ITEM = r"(?:[-*]|\d+\.) "
TIGHT_LIST = re.compile(rf"^(?!{ITEM})(\S.*)\n(?={ITEM})", re.MULTILINE)
NESTED_ITEM = re.compile(rf"^( +)(?={ITEM})", re.MULTILINE)
# The search of a page that is opened as a file needs it in place of a web worker; material would load it from a CDN.
SHIM = ROOT / "node_modules" / "iframe-worker" / "shim" / "index.js"
SHIM_URI = "assets/iframe-worker.js"
# It names everything, and would be found before the page that says it.
CHANGELOG = str(SOURCE / "CHANGELOG.md")
IMAGES = {".png", ".jpg", ".svg"}
# What a folder's page links to; folders in it and weights it only names.
SHOWN = {".md", ".py", ".mjs", ".php", ".rb", ".go", ".java", ".json", ".yaml", ".toml", ".txt", ".sh"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Have the pages load the shim from the site."""
    config.extra["polyfills"] = [SHIM_URI]
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add what the pages link to outside of docs/, and what those link to."""
    files.append(File.generated(config, SHIM_URI, abs_src_path=str(SHIM)))
    waiting = [(file.src_uri, file.content_string) for file in files.documentation_pages()]
    while waiting:
        uri, text = waiting.pop()
        for link in LINK.findall("".join(FENCE.split(text)[::2])):
            target = target_of(uri, link)
            if (ROOT / target).exists() and files.get_file_from_path(uri_of(target)) is None:
                added = copy_of(target, config)
                files.append(added)
                if added.is_documentation_page():
                    waiting.append((added.src_uri, added.content_string))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at the site's copies, and write lists as Python-Markdown wants them."""
    if page.file.src_uri == CHANGELOG:
        page.meta["search"] = {"exclude": True}
    parts = FENCE.split(markdown)
    parts[::2] = [with_lists(with_links(page.file.src_uri, part)) for part in parts[::2]]
    return "".join(parts)


def with_lists(text: str) -> str:
    """Put a blank line before each list, and indent nested items by four: what GitHub's Markdown does not need."""
    return NESTED_ITEM.sub(r"\1\1", TIGHT_LIST.sub(r"\1\n\n", text))


def with_links(uri: str, text: str) -> str:
    """Replace each link to a file of the repository by one to its place on the site."""

    def replace(found: re.Match[str]) -> str:
        target = target_of(uri, found[0])
        if not (ROOT / target).exists():
            return found[0]
        return posixpath.relpath(uri_of(target), posixpath.dirname(uri) or ".")

    return LINK.sub(replace, text)


def target_of(uri: str, link: str) -> PurePosixPath:
    """Return the path in the repository that a link on the page of this address on the site means."""
    page = PurePosixPath(uri)
    folder = page.relative_to(SOURCE).parent if page.is_relative_to(SOURCE) else DOCS / page.parent
    return PurePosixPath(posixpath.normpath(folder / link))


def uri_of(path: PurePosixPath) -> str:
    """Return the place on the site of a file or folder of the repository."""
    if path.is_relative_to(DOCS) and (ROOT / path).is_file():
        return str(path.relative_to(DOCS))
    # A name that begins with a dot would be left out.
    shown = SOURCE.joinpath(*(part.lstrip(".") for part in path.parts))
    if (ROOT / path).is_dir():
        return str(shown / ("README.md" if (ROOT / path / "README.md").exists() else "index.md"))
    return str(shown) + ("" if path.suffix in {".md", *IMAGES} else ".md")


def copy_of(path: PurePosixPath, config: MkDocsConfig) -> File:
    """Make the site's copy of a file; of code a page that shows it, of a folder one that lists it."""
    uri, real = uri_of(path), ROOT / path
    if uri.endswith("/README.md"):
        return File.generated(config, uri, abs_src_path=str(ROOT / PurePosixPath(uri).relative_to(SOURCE)))
    if path.suffix in {".md", *IMAGES}:
        return File.generated(config, uri, abs_src_path=str(real))
    if real.is_dir():
        names = sorted(one.name for one in real.iterdir() if not one.name.startswith(("_", ".")))
        shown = "\n".join(f"- [{name}]({name})" if Path(name).suffix in SHOWN else f"- {name}" for name in names)
    else:
        shown = f"```{path.suffix.lstrip('.')}\n{real.read_text().rstrip()}\n```"
    return File.generated(config, uri, content=f"---\nsearch:\n  exclude: true\n---\n\n# {path}\n\n{shown}\n")
