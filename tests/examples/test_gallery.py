"""The backend of Compose's demo: webhooks in, a page of pictures out."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from examples.demo.gallery import Gallery
from examples.demo.jobs import JOBS

TOKEN = "demo"
FIRST = JOBS[0].generation_id


@pytest.fixture
def url() -> Iterator[str]:
    with Gallery(("127.0.0.1", 0), TOKEN, lambda generation_id: f"picture {generation_id}".encode()) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def tell(url: str, method: str, kind: str, *, token: str = TOKEN, **body: Any) -> int:
    headers = {"Authorization": f"Bearer {token}"}
    return requests.request(
        method, f"{url}/api/webhooks/inference/{kind}", json=body, headers=headers, timeout=60
    ).status_code


def page(url: str) -> str:
    return requests.get(url, timeout=60).text


def test_page_shows_progress_and_then_the_image(url: str) -> None:
    assert f"0 of {len(JOBS)} pictures" in page(url)
    tell(url, "PATCH", "progress", generation_id=FIRST, progress={"progress_percent": 25})
    assert "25 %" in page(url)
    assert requests.get(f"{url}/pictures/{FIRST}", timeout=60).status_code == 404

    assert tell(url, "POST", "complete", generation_id=FIRST, result_url="s3://there") == 200

    assert f"1 of {len(JOBS)} pictures" in page(url)
    assert f'src="/pictures/{FIRST}"' in page(url)
    assert requests.get(f"{url}/pictures/{FIRST}", timeout=60).content == f"picture {FIRST}".encode()


def test_end_by_a_code_is_shown_as_text(url: str) -> None:
    tell(url, "POST", "failed", generation_id=FIRST, error_code="<b>NO</b>")

    assert "failed: &lt;b&gt;NO&lt;/b&gt;" in page(url)


def test_webhook_with_another_token_or_address_changes_nothing(url: str) -> None:
    assert tell(url, "POST", "complete", token="other", generation_id=FIRST) == 401
    assert tell(url, "PATCH", "complete", generation_id=FIRST) == 404

    assert f"0 of {len(JOBS)} pictures" in page(url)
