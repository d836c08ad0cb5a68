"""Parse a safe subset of YAML: mappings, lists and text.

No types are guessed (a key `no` stays text), no tag is resolved, no key may be repeated, and an alias is refused: a few
hundred bytes of them can expand to gigabytes.
"""

import re
from typing import Any

import yaml

# The built-in presets have 8 kB. The slowest input to parse took a second at this size.
MAX_BYTES = 128 * 1024

_NOT_TEXT = re.compile(r"[\x00\ud800-\udfff]")
_PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map")}


class YamlRefused(ValueError):
    """The bytes are no YAML, or more than plain YAML; the message says in which line."""


def parse_yaml(content: bytes) -> Any:
    """Return mappings as dicts, sequences as lists, all else as text; raise `YamlRefused`."""
    if len(content) > MAX_BYTES:
        raise YamlRefused(f"has more than {MAX_BYTES} bytes")
    try:
        root = yaml.compose(content.decode("utf-8-sig"), Loader=yaml.BaseLoader)
    except UnicodeDecodeError as error:
        raise YamlRefused(f"is not UTF-8 at byte {error.start}") from error
    except RecursionError as error:
        raise YamlRefused("is nested too deeply") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        if mark is None:  # a character that YAML does not allow: the reader has no line yet
            raise YamlRefused(f"is not YAML: {error}".splitlines()[0]) from error
        problem = getattr(error, "problem", None) or "it cannot be read"
        raise YamlRefused(f"line {mark.line + 1} is not YAML: {problem}") from error
    if root is None:
        raise YamlRefused("is empty")
    return _plain(root, set())


def _plain(node: Any, seen: set[int]) -> Any:
    """Convert one node. `seen` holds the ids of all earlier ones: a repeated node was written as an alias."""
    if id(node) in seen:
        raise _refusal(node, "is used again by an alias: write it out each time")
    seen.add(id(node))
    if node.tag not in _PLAIN_TAGS:
        raise _refusal(node, "has a tag: write plain text")
    if isinstance(node, yaml.MappingNode):
        fields: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = _plain(key_node, seen)
            if not isinstance(key, str):
                raise _refusal(key_node, "is a key that is no text")
            if key in fields:
                raise _refusal(key_node, f"has the key {key!r:.60} a second time")
            fields[key] = _plain(value_node, seen)
        return fields
    if isinstance(node, yaml.SequenceNode):
        return [_plain(child, seen) for child in node.value]
    text = str(node.value)
    if _NOT_TEXT.search(text):
        raise _refusal(node, "has a NUL or half a surrogate pair: write plain Unicode text")
    return text


def _refusal(node: Any, problem: str) -> YamlRefused:
    return YamlRefused(f"line {node.start_mark.line + 1} {problem}")
