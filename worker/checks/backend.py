"""The backend: does it answer, and does it take the token? No webhook is sent for it, so not all can be known."""

from clients.webhooks import BackendUnreachable, Reach, reach
from config.settings import BackendSettings
from worker.checks.finding import CheckFailed

REFUSALS = frozenset({401, 403})
NOT_FOUND = 404
NOT_IMPLEMENTED = 501  # what a server without a GET answers to one


def look_at_backend(settings: BackendSettings) -> str:
    """GET a webhook's address with the token and without: what is told apart was judged."""
    try:
        found = reach(settings)
    except BackendUnreachable as error:
        asked = f"{settings.base_url} gives no answer: {error}"
        raise CheckFailed(f"{asked}. Is it running? Look at BACKEND_API_URL") from error
    return judge_backend(settings.base_url, found)


def judge_backend(url: str, found: Reach) -> str:
    """What the two statuses say; raises `CheckFailed` for what no webhook would get past."""
    status = found.status
    if status in REFUSALS:
        raise CheckFailed(f"{url} answers {status}: set INTERNAL_API_TOKEN to the token that it expects")
    if 300 <= status < 400:
        raise CheckFailed(
            f"{url} answers {status}, a redirect, which is never followed: name the final address instead"
        )
    if status >= 500 and status != NOT_IMPLEMENTED:
        raise CheckFailed(f"{url} answers {status}, so webhooks would wait in the outbox: look at the backend's log")
    if found.stranger_status in REFUSALS:
        return f"{url} takes the token, and answers {found.stranger_status} without it"
    said = f"{url} answers {status} to a GET, with the token as without"
    if status == NOT_FOUND:
        return f"{said}: it looks at no token before, or BACKEND_API_URL has a wrong path; the first webhook will tell"
    return f"{said}: whether it takes the token, the first webhook will tell"
