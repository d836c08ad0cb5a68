"""`python -m tests.support.pages.asyncapi`: write docs/asyncapi.md, the contract of docs/asyncapi.yaml for people."""

import json
from typing import Any

from tests.support.contract_schemas import DOCS, document

PAGE = DOCS / "asyncapi.md"
INTRO = """# The contract: queue, exchange, webhooks

<!-- Written by `python -m tests.support.pages.asyncapi` from docs/asyncapi.yaml. -->

What [asyncapi.yaml](asyncapi.yaml) says, for people. [All fields](fields.md) has the limits of each field.
"""


def resolve(loaded: dict[str, Any], node: dict[str, Any]) -> Any:
    """Return what a reference within the document means; any other node as it is."""
    found: Any = node
    while "$ref" in found:
        path, found = found["$ref"].removeprefix("#/").split("/"), loaded
        for name in path:
            found = found[name]
    return found


def render() -> str:
    """Write the page: servers, each operation with the examples of its messages, and the headers of webhooks."""
    loaded = document()
    servers = [server(name, described) for name, described in loaded["servers"].items()]
    parts = [INTRO, loaded["info"]["description"], "## Servers", "\n".join(servers)]
    for operation in loaded["operations"].values():
        parts += operation_parts(loaded, operation)
    for name, bindings in loaded["components"]["messageBindings"].items():
        parts += [f"## Headers of every {name}", headers_table(bindings["http"]["headers"])]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def server(name: str, described: dict[str, Any]) -> str:
    """Write one line of the list of servers."""
    address = described["host"] + described.get("pathname", "")
    text = " ".join(described["description"].split())
    return f"- **{name}**: `{described['protocol']}://{address}`. {text}"


def operation_parts(loaded: dict[str, Any], operation: dict[str, Any]) -> list[str]:
    """Write an operation, from its title to its examples."""
    channel = resolve(loaded, operation["channel"])
    messages = [resolve(loaded, message) for message in channel["messages"].values()]
    does = "The worker receives" if operation["action"] == "receive" else "The worker sends"
    parts = [f"## {channel.get('title') or messages[0]['title']}"]
    parts.append(f"{does}: {address_of(loaded, operation, channel)}. {operation['summary']}")
    parts += [channel["description"]] if "description" in channel else []
    for message in messages:
        parts += message_parts(message)
    return parts


def address_of(loaded: dict[str, Any], operation: dict[str, Any], channel: dict[str, Any]) -> str:
    """Return a channel's address with its method, or as the queue or exchange that it is."""
    method = resolve(loaded, operation.get("bindings", {})).get("http", {}).get("method")
    if method:
        return f"`{method} {channel['address']}`"
    is_queue = resolve(loaded, channel["bindings"])["amqp"]["is"] == "queue"
    return f"{'queue' if is_queue else 'exchange'} `{channel['address']}`"


def message_parts(message: dict[str, Any]) -> list[str]:
    """Write a message's description and examples."""
    parts = [message["description"]] if "description" in message else []
    for example in message["examples"]:
        parts.append(
            f"**{example['name']}**: {example['summary']}" if "summary" in example else f"**{example['name']}**:"
        )
        parts.append(f"```json\n{json.dumps(example['payload'], indent=2, ensure_ascii=False)}\n```")
    return parts


def headers_table(schema: dict[str, Any]) -> str:
    """Write the table of headers."""
    lines = ["| header | is |", "|---|---|"]
    for name, header in schema["properties"].items():
        is_always = "" if name in schema["required"] else "Not always. "
        text = f"`{header['const']}`" if "const" in header else " ".join(header["description"].split())
        lines.append(f"| `{name}` | {is_always}{text} |")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
