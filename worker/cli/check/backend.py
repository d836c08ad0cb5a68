"""Check that the backend answers and accepts the token. No webhook is sent, so some answers stay unsure."""

from urllib.parse import urlsplit

from clients.backend_probe import NOT_FOUND, BackendProbe, BackendUnreachable, probe_backend
from clients.webhooks import DEFAULT_ROUTES, DEFAULT_SETTING, Route, WebhookKind, route_of
from config.backend import BackendSettings
from config.redacting import redacted
from worker.cli.check.checks import CheckFailed, CheckUnsure
from worker.results.address_breaker import ADDRESS_STATUSES, explain_status

REFUSALS = frozenset({401, 403})
BAD_REQUEST, NOT_ALLOWED = 400, 405
# Statuses of a wrong address that a right one may give to a GET as well.
AMBIGUOUS_FOR_GET = frozenset({NOT_FOUND, NOT_ALLOWED, 415})
NOT_IMPLEMENTED = 501  # what a server without a GET answers to one
LATER = frozenset({408, 425, 429})


def check_backend(settings: BackendSettings) -> str:
    """GET each webhook address with the token and without: two different answers mean that the token was checked."""
    findings = []
    for route in _routes(settings):
        # Of the default one the base is enough: its path is the contract's.
        shown = settings.base_url if route.setting == DEFAULT_SETTING else redacted(route.url)
        try:
            found = probe_backend(settings, route)
        except BackendUnreachable as error:
            seen = f"{shown} gives no answer: {error}"
            raise CheckFailed(f"{seen}. Is it running? Look at {route.setting}") from error
        findings.append(classify_answer(shown, found, route.setting))
    return "; ".join(findings)


def _routes(settings: BackendSettings) -> list[Route]:
    """Return one route for each address that a setting names. The three default ones stand for each other."""
    by_address: dict[str, Route] = {}
    for kind in (WebhookKind.COMPLETE, WebhookKind.FAILED, WebhookKind.PROGRESS):
        route = route_of(settings, kind)
        by_address.setdefault(DEFAULT_SETTING if route.setting == DEFAULT_SETTING else route.url, route)
    return list(by_address.values())


def classify_answer(url: str, found: BackendProbe, setting: str = DEFAULT_SETTING) -> str:
    """Classify the statuses. Raises `CheckFailed` where every webhook would fail, else `CheckUnsure` for a doubt."""
    status = found.status
    if status in REFUSALS:
        raise CheckFailed(f"{url} answers {status}: set INTERNAL_API_TOKEN to the token that it expects")
    if 300 <= status < 400:
        raise CheckFailed(
            f"{url} answers {status}, a redirect, which is never followed: name the final address instead"
        )
    if status == BAD_REQUEST:
        raise CheckFailed(
            f"{url} answers 400 to a GET, as it would to every end: {explain_status(status, setting)}. "
            f"Name {urlsplit(url).hostname} there, or set {setting} to a name that is in it"
        )
    if status in ADDRESS_STATUSES - AMBIGUOUS_FOR_GET:
        meaning = explain_status(status, setting)
        raise CheckFailed(f"{url} answers {status} to a GET, as it would to every end: {meaning}")
    if status >= 500 and status != NOT_IMPLEMENTED:
        raise CheckFailed(f"{url} answers {status}, so webhooks would wait in the outbox: look at the backend's log")
    _check_ambiguous(url, found, setting)
    if found.unauthenticated_status in REFUSALS:
        return f"{url} takes the token, and answers {found.unauthenticated_status} without it"
    said = f"{url} answers {status} to a GET, with the token as without"
    return f"{said}: whether it takes the token, the first webhook will tell"


def _check_ambiguous(url: str, found: BackendProbe, setting: str) -> None:
    """Raise `CheckUnsure` for an answer that both a wrong and a right address may give."""
    status, path = found.status, DEFAULT_ROUTES[WebhookKind.COMPLETE][1]
    follow_up_status = found.follow_up_status or 0
    # After a 404 this is the answer to OPTIONS.
    is_route = 200 <= follow_up_status < 300 or follow_up_status == NOT_ALLOWED
    if status == NOT_FOUND and not is_route:
        at, advice = "", "."
        if setting == DEFAULT_SETTING:
            at, advice = f" at {path}", ". That path is added to it, so it must not end in a part of it, like /api."
        raise CheckUnsure(
            f"{url} answers 404{at}, as it would to every end where {setting} has a wrong path{advice} A server whose "
            "routes take nothing but POST may answer so too: then the first webhook will tell"
        )
    if 200 <= status < 300 and 200 <= follow_up_status < 300:
        raise CheckUnsure(
            f"{url} answers {status} to every address, there or not: is it the web pages' server? {setting} must "
            "name the one that has the API"
        )
    if status in LATER:
        raise CheckUnsure(f"{url} answers {status}: it asks to be called later, and so webhooks would wait")
