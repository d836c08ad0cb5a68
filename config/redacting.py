"""Redact secrets in text, and quote untrusted values.

All text that leaves the worker (a log line, a webhook, a record, a dead letter's reason, a check's result) goes through
`redacted`; `quoted` quotes a value of a message, `clients.storage.location.shown_location` a location.
"""

import re

CUT = "…"
# Longest quotation of a value: names of schedulers, presets and fonts are shorter.
MAX_QUOTED_CHARS = 40

# No part of a URL or of a query. Control characters are escaped by `repr`.
_PLAIN_WORD = re.compile(r"[^@?=&%#/;$~]+")
# A key or a token has some length and digits, or much length.
_TOKEN = re.compile(r"(?=[A-Za-z_.-]*[0-9])[A-Za-z0-9_.-]{16,}|[A-Za-z0-9]{24,}")

# Pre-check for text that may hold a secret, so that a plain line costs one search.
_SUSPECT = re.compile(r"[@?=]|%(?:25)*(?:3f|3d|40)", re.IGNORECASE)
# Credentials as an Authorization header holds them. A word of fewer letters, or without a digit, may be a plain one.
_AUTHORIZATION = re.compile(r"\b(?P<scheme>bearer|basic) +(?=[\w.~+/=-]*[0-9=])[\w.~+/=-]{8,}", re.IGNORECASE)
_WORD = re.compile(r"[^\s'\"`<>]+")
# A password may hold a slash; a port may not be one.
_USER = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?:[^/?#]*|[^/?#:@]*:(?![0-9]{1,5}/)[^?#@]*)(?:@|%(?:25)*40)", re.IGNORECASE
)
_ENCODED_USER = re.compile(r"%(?:25)*3a(?:%(?:25)*2f){2}.*%(?:25)*40", re.IGNORECASE)
_USER_WITHOUT_SCHEME = re.compile(r"[^/:@=,(]+:[^/@]+@")
_QUERY = re.compile(r"(?:\?|%(?:25)*3f).*", re.IGNORECASE)
_FRAGMENT = re.compile(r"#.*")
_PARAMETER = re.compile(
    r"(?<![A-Za-z0-9])(?P<name>x-(?:amz|goog|ms)-[a-z-]+|awsaccesskeyid|googleaccessid|credential|signature|sig|"
    r"(?:[a-z]+[_-])?(?:token|secret)|(?:api|access|secret|private)[_-]?key|passw(?:or)?d)(?:=|%(?:25)*3d)[^\s&;,'\")]+",
    re.IGNORECASE,
)


def redacted(text: str) -> str:
    """Return `text` without user, query and fragment of each URL in it, and without credential parameters.

    Pure; text without any of them is returned unchanged.
    """
    text = _AUTHORIZATION.sub(rf"\g<scheme> {CUT}", text)
    if not _SUSPECT.search(text):
        return text
    return _WORD.sub(lambda found: _without_secrets(found[0]), text)


def _without_secrets(word: str) -> str:
    if not _SUSPECT.search(word):
        return word
    word = _USER.sub(rf"\g<scheme>{CUT}@", word)
    word = _ENCODED_USER.sub(f"{CUT}@", word)
    word = _USER_WITHOUT_SCHEME.sub(f"{CUT}@", word)
    if "://" in word:
        word = _FRAGMENT.sub(CUT, _QUERY.sub(CUT, word))
    elif (query := _QUERY.search(word)) is not None and ("=" in query[0] or "%" in query[0]):
        word = word[: query.start()] + CUT
    return _PARAMETER.sub(rf"\g<name>={CUT}", word)


def quoted(text: str) -> str:
    """Return the plain words that `text` begins with, in quotes, else its length: a misplaced value may be a secret."""
    end = 0
    for word in re.finditer(r"\S+", text[: MAX_QUOTED_CHARS + 1]):
        if word.end() > MAX_QUOTED_CHARS or not _PLAIN_WORD.fullmatch(word[0]) or _TOKEN.search(word[0]):
            break
        end = word.end()
    if len(text) <= MAX_QUOTED_CHARS and not text[end:].strip():
        return repr(text)
    return repr(text[:end] + CUT) if end else f"text of {len(text)} characters"
