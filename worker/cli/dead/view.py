"""Show dead letters: as a table, a line of JSON, or text with everything in them."""

import json
from collections.abc import Iterable

from rich.table import Table
from rich.text import Text

from worker.cli.dead.letters import DeadLetter, LetterKind
from worker.cli.terminal import escape_for_terminal, narrow_table
from worker.results.terminal_event import TerminalEvent

# As docs/dead-letters.md calls them; in --json they keep the names that scripts use.
KIND_WORDS = {LetterKind.JOB: "job", LetterKind.EVENT: "webhook", LetterKind.OTHER: "not a job"}
MAX_LISTED_REASON_CHARS = 160


def as_table(letters: Iterable[DeadLetter]) -> Table:
    """Return a table of one row a letter, readable at 80 columns; `show` has the attempt."""
    table = narrow_table("#", "letter", "generation", "died, UTC", "reason, and the task")
    for letter in letters:
        generation = "" if letter.generation_id is None else str(letter.generation_id)
        died_at = "" if letter.died_at is None else f"{letter.died_at:%Y-%m-%d\n%H:%M:%S}"
        last = (letter.reason[:MAX_LISTED_REASON_CHARS], str(letter.task_id))
        cells = (str(letter.number), KIND_WORDS[letter.kind], generation, died_at)
        table.add_row(*map(Text, cells), Text("\n".join(escape_for_terminal(text) for text in last if text)))
    return table


def as_json(letter: DeadLetter) -> str:
    """Return the letter as one line of JSON, for scripts."""
    fields = {
        "number": letter.number,
        "kind": letter.kind.value,
        "task_id": letter.task_id or None,
        "generation_id": letter.generation_id,
        "died_at": letter.died_at.isoformat() if letter.died_at else None,
        "attempt": letter.attempt,
        "reason": letter.reason,
        "body_bytes": len(letter.message.body),
    }
    return escape_for_terminal(json.dumps(fields))


def as_text(letter: DeadLetter) -> str:
    """Return everything about the letter, its headers and its body, escaped for a terminal."""
    fields: dict[str, object] = {
        "task": letter.task_id,
        "generation": letter.generation_id,
        "died": letter.died_at,
        "reason": letter.reason,
    }
    if isinstance(letter.content, TerminalEvent):
        fields["webhook-id"] = letter.content.webhook.webhook_id
    fields |= {f"header {name}": value for name, value in sorted(letter.message.headers.items())}
    lines = [f"letter {letter.number}: {KIND_WORDS[letter.kind]}"]
    lines += [
        f"  {escape_for_terminal(name)}: {escape_for_terminal(str(value))}"
        for name, value in fields.items()
        if value not in ("", None)
    ]
    try:
        body = json.dumps(json.loads(letter.message.body), indent=2, ensure_ascii=False)
    except (ValueError, RecursionError):
        body = letter.message.body.decode("utf-8", "backslashreplace")
    lines += [f"  body, {len(letter.message.body)} bytes:", *map(escape_for_terminal, body.split("\n"))]
    return "\n".join(lines)
