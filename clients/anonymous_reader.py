"""Read an address as one who has it and nothing else: no credentials, no proxy, no cookie."""

from typing import NamedTuple

import requests
import urllib3.exceptions

TIMEOUT_SECONDS = 10.0


class Answer(NamedTuple):
    """Status and the first bytes of a response."""

    status: int
    content: bytes


def read_anonymously(url: str, *, max_bytes: int) -> Answer | None:
    """GET `url` once and follow no redirect; None where no response comes."""
    with requests.Session() as session:
        session.trust_env = False
        try:
            answer = session.get(url, timeout=TIMEOUT_SECONDS, allow_redirects=False, stream=True)
            return Answer(answer.status_code, answer.raw.read(max_bytes, decode_content=True) or b"")
        except (requests.RequestException, urllib3.exceptions.HTTPError):
            return None
