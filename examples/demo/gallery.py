"""The demo's backend in `deploy/compose.yaml`: take the webhooks, and show the pictures on a page.

`python -m examples.demo.gallery` listens on port 8000 of every interface and reads the worker's own variables.
"""

import hmac
import html
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import typer

from config.backend import BackendSettings
from config.section import load_section
from config.store import StoreSettings
from examples.demo.jobs import JOBS
from examples.demo.publish import store_client
from examples.parts.backend import WEBHOOKS

PORT = 8000
PROMPTS = {str(job.generation_id): job.prompt for job in JOBS}
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="2">
<title>Darkroom: {num_done} of {num_known}</title>
<style>body {{ font: 15px sans-serif; margin: 2em; background: #fafafa }}
div {{ display: inline-block; width: 160px; margin: 8px; vertical-align: top }} img {{ width: 160px }}</style>
<h1>{num_done} of {num_known} pictures</h1>{cards}</html>"""


class Gallery(ThreadingHTTPServer):
    """The server. `read_image` returns the file of a generation that is complete."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], token: str, read_image: Callable[[str], bytes]) -> None:
        super().__init__(address, _Handler)
        self._authorization = f"Bearer {token}".encode()
        self.read_image = read_image
        self._lock = threading.Lock()
        self._states = dict.fromkeys(PROMPTS, "waiting")

    def is_authorized(self, header: str) -> bool:
        return hmac.compare_digest(header.encode(), self._authorization)

    def take(self, kind: str, body: dict[str, Any]) -> None:
        """Note what a webhook says. To note an end a second time changes nothing."""
        match kind:
            case "progress":
                state = f"{body['progress']['progress_percent']} %"
            case "failed":
                state = f"failed: {body['error_code']}"
            case _:
                state = "complete"
        with self._lock:
            self._states[str(body["generation_id"])] = state

    def is_complete(self, generation_id: str) -> bool:
        return self._states.get(generation_id) == "complete"

    def page(self) -> str:
        """Return the page of this moment."""
        with self._lock:
            states = dict(self._states)
        cards = "".join(_card(generation_id, state) for generation_id, state in states.items())
        num_done = sum(state == "complete" for state in states.values())
        return PAGE.format(num_done=num_done, num_known=len(states), cards=cards)


def _card(generation_id: str, state: str) -> str:
    name = html.escape(generation_id, quote=True)
    shown = f'<img src="/pictures/{name}" alt="">' if state == "complete" else f"<p>{html.escape(state)}</p>"
    return f"<div>{shown}<br>{html.escape(PROMPTS.get(generation_id, ''))}</div>\n"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Gallery

    def do_GET(self) -> None:
        generation_id = unquote(self.path.removeprefix("/pictures/"))
        if self.path == "/":
            self._answer(200, self.server.page().encode(), "text/html; charset=utf-8")
        elif self.server.is_complete(generation_id):
            self._answer(200, self.server.read_image(generation_id), "image/png")
        else:
            self._answer(404, b"not here", "text/plain")

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        kind = WEBHOOKS.get((self.command, self.path))
        if not self.server.is_authorized(self.headers.get("Authorization", "")):
            self._answer(401, b"wrong token", "text/plain")
        elif kind is None:
            self._answer(404, b"no such webhook", "text/plain")
        else:
            self.server.take(kind, json.loads(content))
            self._answer(200, b'{"success": true}', "application/json")

    do_PATCH = do_POST  # noqa: N815 - a name the standard library looks for

    def _answer(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Write nothing: the page tells all of it."""


def main() -> None:
    store, backend = load_section(StoreSettings), load_section(BackendSettings)
    client = store_client(store)

    def read_image(generation_id: str) -> bytes:
        key = f"generations/gen-{generation_id}.png"
        return client.get_object(Bucket=store.results_bucket, Key=key)["Body"].read()  # type: ignore[no-any-return]

    typer.echo(f"the pictures: http://localhost:{PORT}/")
    Gallery(("", PORT), backend.token.get_secret_value(), read_image).serve_forever()


if __name__ == "__main__":
    main()
