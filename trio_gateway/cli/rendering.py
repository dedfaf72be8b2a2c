"""Rendering: events as text for people, with colours on a terminal."""

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

import click
import msgspec

from ..core.printable import printable

if TYPE_CHECKING:
    from rich.text import Text

ROLE_STYLES: Final = {"waiter": "cyan", "kitchen": "yellow", "admin": "magenta", "diner": "green"}
_TYPE_STYLES: Final = {
    "ROUND": "bold yellow",
    "SERVICE": "bold magenta",
    "CHECK": "bold green",
    "PAYMENT": "bold green",
    "TABLE": "bold blue",
    "TICKET": "bold cyan",
    "CART": "bold white",
    "PRODUCT": "bold red",
}
_PLACES: Final = ("branch_id", "sector_id", "table_id", "session_id")
_MAX_FACTS: Final = 4
_MAX_CHARACTERS: Final = 40


class Screen:
    """Writes lines to stdout without buffering them.

    Nothing is dropped: a slow reader delays the task that writes, but neither the event loop nor
    the exit of the command. Raises :exc:`BrokenPipeError` when stdout is closed.
    """

    def __init__(self) -> None:
        import trio
        from rich.console import Console

        self._console = Console(soft_wrap=True, highlight=False)
        self._lock = trio.Lock()  # one writer at a time

    async def show(self, text: "Text | str" = "") -> None:
        with self._console.capture() as captured:
            self._console.print(text)
        await self.write(captured.get())

    async def write(self, text: str) -> None:
        import trio

        data = text.encode(sys.stdout.encoding, "backslashreplace")
        async with self._lock:
            await trio.to_thread.run_sync(_write, data, abandon_on_cancel=True)


def _write(data: bytes) -> None:
    # Not through sys.stdout: Python flushes it at exit, and would wait for this thread.
    fd = sys.stdout.fileno()
    while data:
        data = data[os.write(fd, data) :]


def steps_words(steps: Iterable[tuple[str, float]]) -> str:
    """Whom an event must reach, such as ``waiters within 10 s, then floor within 5 s``."""
    return ", then ".join(f"{name} within {seconds:g} s" for name, seconds in steps)


def print_table(header: Sequence[str], rows: Iterable[Sequence[str | int]]) -> None:
    """Print columns that are as wide as their widest value, with numbers on their right."""
    for line in table_lines(header, rows):
        click.echo(line)


def table_lines(header: Sequence[str], rows: Iterable[Sequence[str | int]]) -> Iterator[str]:
    """The lines of such a table."""
    found = list(rows)
    table = [[printable(str(value)) for value in row] for row in (header, *found)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    are_numbers = [isinstance(value, int) for value in (*found, header)[0]]
    for row in table:
        cells = [
            text.rjust(width) if is_number else text.ljust(width)
            for text, width, is_number in zip(row, widths, are_numbers, strict=True)
        ]
        yield "  ".join(cells).rstrip()


def json_text(message: str) -> "Text":
    """A message as it was received, coloured and indented."""
    from rich.highlighter import JSONHighlighter
    from rich.text import Text

    text = Text("  " + printable(message))
    JSONHighlighter().highlight(text)
    return text


def summary(message: str, role: str, *, places: bool = True) -> "Text":
    """One line: time, role, type, the ids of the place, and the first values of the entity.

    Without ``places`` it shows only the table.
    """
    from rich.text import Text

    event = _read(message)
    name = str(event.get("type", "message"))
    line = Text(no_wrap=True)
    line.append(f"{datetime.now():%H:%M:%S}", "dim")
    line.append(f"  {role:<8}", ROLE_STYLES.get(role, ""))
    line.append(f" {printable(name):<29}", _TYPE_STYLES.get(name.split("_")[0], "bold"))
    facts = [
        f"{key.removesuffix('_id')} {event[key]}"
        for key in (_PLACES if places else _PLACES[2:3])
        if event.get(key) is not None
    ]
    line.append(" " + printable(" · ".join([*facts, *_facts(event.get("entity"))])))
    return line


def published(message: str, channel: str) -> "Text":
    """One line for a published event, in the style of :func:`summary`."""
    from rich.text import Text

    event = _read(message)
    return Text(
        f"{datetime.now():%H:%M:%S}  {'backend':<8} {event.get('type', '')!s:<29}"
        f" tenant {event.get('tenant_id')} -> {channel}",
        "dim",
        no_wrap=True,
    )


def _read(message: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(message, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        return {}


def _facts(entity: Any) -> list[str]:
    if not isinstance(entity, dict):
        return []
    found = []
    for key, value in entity.items():
        if isinstance(value, str | int | float):
            text = str(value).lower() if isinstance(value, bool) else str(value)
            if len(text) > _MAX_CHARACTERS:
                text = text[: _MAX_CHARACTERS - 1] + "…"
            found.append(f"{key.removesuffix('_id')} {text}")
    return found[:_MAX_FACTS]
