"""The status page's own files, and the headers that keep it to itself."""

from dataclasses import dataclass
from importlib.resources import files

# No other origin is asked for anything, and what a job's message holds cannot become script or style.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
NAMES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
    "/script.js": ("script.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}


@dataclass(frozen=True, slots=True)
class StaticFile:
    """One file of the page."""

    content: bytes
    content_type: str


def load_page() -> dict[str, StaticFile]:
    """Every file of the page by the path it is served at; read once, so that an update cannot mix two versions."""
    folder = files("worker.monitoring") / "page"
    return {path: StaticFile((folder / name).read_bytes(), kind) for path, (name, kind) in NAMES.items()}
