"""Static files of the status page, and the security headers they are served with."""

from dataclasses import dataclass
from importlib.resources import files

# Nothing is loaded from another origin, and no text of a job's message can become script or style.
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
    """Return every file of the page by URL path; read once, so that an update cannot mix two versions."""
    folder = files("worker.monitoring") / "page"
    return {path: StaticFile((folder / name).read_bytes(), kind) for path, (name, kind) in NAMES.items()}
