"""Describe an invalid setting in one sentence: the variable, the rule, and the value unless it is secret."""

import re
from collections.abc import Mapping
from typing import Any

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from config.redacting import redacted

MAX_VALUE_CHARS = 80
MAX_SENTENCE_CHARS = 500
KUBERNETES_LINK = re.compile(r"tcp://[^/]+:\d+")

# By pydantic's error type; {…} are filled from the error's context.
SENTENCES = {
    "bool_parsing": "must be true or false",
    "finite_number": "must be a finite number",
    "float_parsing": "must be a number",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "int_from_float": "must be an integer",
    "int_parsing": "must be an integer",
    "int_parsing_size": "must be an integer of fewer digits",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be {expected}",
    "missing": "is not set and has no default",
    "multiple_of": "must be a multiple of {multiple_of}",
    "string_pattern_mismatch": "must match the pattern {pattern}",
    "string_too_long": "must have at most {max_length} characters",
    "string_too_short": "must have at least {min_length} characters",
    "value_error": "{error}",
}


def describe(problem: Mapping[str, Any], fields: Mapping[str, FieldInfo], meant_by: Mapping[str, str]) -> str:
    """Return the sentence for one of pydantic's errors, without secrets, also without those in URLs.

    `fields` are the section's by variable; `meant_by` maps a variable to the near name that is set in its place.
    """
    variable = str(problem["loc"][0]) if problem["loc"] else ""
    context = dict(problem.get("ctx", {}))
    if "expected" in context:
        context["expected"] = context["expected"].replace("'", "")
    sentence = SENTENCES.get(problem["type"], problem["msg"]).format(**context)
    if problem["type"] == "missing":
        hint = (
            f" ({meant_by[variable]} is set, which is no setting: is this one meant?)" if variable in meant_by else ""
        )
        return f"{variable}: {sentence}{hint}"
    value = problem["input"]
    field = fields.get(variable)
    is_secret = field is None or SecretStr in (field.annotation, *getattr(field.annotation, "__args__", ()))
    if not is_secret and isinstance(value, str | int | float) and str(value) not in sentence:
        shown = repr(redacted(str(value)))
        sentence += f"; it is {shown if len(shown) <= MAX_VALUE_CHARS else shown[:MAX_VALUE_CHARS] + '…'}"
        if KUBERNETES_LINK.fullmatch(str(value)):
            sentence += ", as Kubernetes sets it for a Service of that name: set it in the container"
    return redacted(f"{variable}: {sentence}".removeprefix(": "))[:MAX_SENTENCE_CHARS]
