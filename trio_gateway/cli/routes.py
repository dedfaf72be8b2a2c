"""``routes``: the routing table in force."""

from typing import TYPE_CHECKING, Final

import click

from .errors import settings_or_exit
from .rendering import steps_words

if TYPE_CHECKING:
    from ..core.routing import Route, Routing, To

_COLUMNS: Final = {
    "WAITERS": "W",
    "FLOOR": "F",
    "KITCHEN": "K",
    "ADMINS": "A",
    "DINERS": "D",
    "BRANCH_DINERS": "B",
}
_LEGEND: Final = """\
W  waiters of the event's sector, or of the branch if it names none
F  floor: every waiter of the branch     K  kitchen of the branch
A  admins of the branch                  D  diners of the event's session
B  every diner of the branch
Publish durable types on a stream. An unknown type goes to the admins and is not durable."""

_WIDEST: Final = 1_000  # columns


@click.command()
@click.option(
    "--json", "as_json", is_flag=True, help="Print JSON, with the names of the TOML file."
)
def routes(as_json: bool) -> None:
    """Print the routing table in force: the audiences of each event type, with WS_ROUTES_FILE."""
    settings = settings_or_exit()
    if as_json:
        _print_json(settings.routes)
        return
    _print_table(settings.routes)
    if settings.ws_routes_file is not None:
        click.echo(f"With {settings.ws_routes_file}.")


def _difference(name: str, route: "Route") -> str | None:
    from ..core.routing import ROUTES

    if name not in ROUTES:
        return "new"
    return None if route == ROUTES[name] else "changed"


def _names(to: "To") -> list[str]:
    return [column for column in _COLUMNS if column in {each.name for each in to}]


def _print_json(table: "Routing") -> None:
    import msgspec

    found = {
        name: {
            "to": [column.lower() for column in _names(route.to)],
            "durable": route.durable,
            "receipt": route.receipt,
            "steps": [{"to": step.name, "within": step.within} for step in route.steps],
            "differs": _difference(name, route),
        }
        for name, route in table.items()
    }
    click.echo(msgspec.json.format(msgspec.json.encode(found)).decode())


def _print_table(table: "Routing") -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    grid.add_column("type", no_wrap=True)
    for letter in _COLUMNS.values():
        grid.add_column(letter, justify="center")
    grid.add_column("durable", justify="center")
    grid.add_column("")
    for name, route in table.items():
        columns = _names(route.to)
        difference = _difference(name, route)
        grid.add_row(
            name,
            *("●" if column in columns else "·" for column in _COLUMNS),
            "yes" if route.durable else "no",
            difference or "",
            style="yellow" if difference else None,
        )
    console = Console(highlight=False)
    # In a narrow terminal its lines are broken: rich would leave out the audiences instead.
    wide = console.options.update(max_width=_WIDEST)
    console.width = max(console.width, console.measure(grid, options=wide).maximum)
    console.print(grid)
    console.print(_LEGEND, soft_wrap=True)
    for name in sorted(table.tracked_types):
        steps = steps_words((step.name, step.within) for step in table[name].steps)
        promise = f"; must reach {steps}" if steps else ""
        console.print(f"{name}: receipts{promise}", soft_wrap=True)
