"""Tables in Markdown."""

from collections.abc import Iterable


def table(*rows: Iterable[str]) -> str:
    """Make a table; the first row is the header."""
    head, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in (head, *body)]
    lines.insert(1, "|---" * len(head) + "|")
    return "".join(f"{line}\n" for line in lines)
