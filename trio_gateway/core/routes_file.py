"""The routes file: a TOML text that overrides and extends the routing table."""

import math
import tomllib
from typing import Any, Final

from .escalation import ESCALATED
from .routing import ROUTES, UNHEARD, Route, Routing, Step, To

_KEYS: Final = ("to", "durable", "receipt", "must_reach", "within", "then")
_NAMES: Final = {member.name.lower(): member for member in To if member.name}
_LONGEST: Final = 86_400.0  # seconds of all steps of an event


class InvalidRoutes(ValueError):  # noqa: N818 - reads better where it is raised
    """A routes file is invalid; the text names the place."""


def read_routes(text: str) -> Routing:
    """Read a TOML text that overrides and extends :data:`ROUTES`.

    Raises :exc:`InvalidRoutes` for anything but ``[routes.TYPE]`` tables with

    - ``to``, a list of audience names;
    - ``durable``, a bool. Both default to what the type had before;
    - ``receipt``, a bool: whether it is known who has received the events;
    - ``must_reach`` and ``within``: an audience of which somebody must have received an event, and
      within how many seconds. Then ``receipt`` is true;
    - ``then``, a list of tables ``{to, within}``: which audiences are sent the event if nobody had.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidRoutes(f"not TOML: {error}") from None
    if unknown := sorted(document.keys() - {"routes"}):
        raise InvalidRoutes(f"unknown table: {unknown[0]} (only [routes.TYPE] is known)")
    tables = document.get("routes", {})
    if not isinstance(tables, dict):
        raise InvalidRoutes("routes: a table per event type, like [routes.ROUND_READY]")
    return Routing(dict(ROUTES) | {name: _read(name, t) for name, t in tables.items()})


def _read(name: str, table: Any) -> Route:
    where = f"routes.{name}"
    if not name:
        raise InvalidRoutes('routes."": the type of an event is never empty')
    if name == ESCALATED:
        raise InvalidRoutes(f"{where}: is made by the gateway, and goes to the audience of a step")
    if not isinstance(table, dict):
        raise InvalidRoutes(f"{where}: must be a table")
    _check_keys(where, table, _KEYS)
    before = ROUTES.route_of(name)
    durable = _read_bool(where, table, "durable", before.durable)
    if name == UNHEARD and not durable:
        raise InvalidRoutes(f"{where}.durable: must be true: who is away must get the report later")
    to = before.to
    if "to" in table:
        names = table["to"]
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            raise InvalidRoutes(f"{where}.to: must be a list of audience names")
        to = To(0)
        for each in names:
            to |= _audience(f"{where}.to", each)
    steps = _read_steps(where, table)
    if steps and name == UNHEARD:
        raise InvalidRoutes(f"{where}.must_reach: a report must not make another one")
    if steps and steps[0].to not in to:
        raise InvalidRoutes(
            f"{where}.must_reach: {table['must_reach']!r} is not one of the audiences in `to`"
        )
    receipt = _read_bool(where, table, "receipt", bool(steps))
    if steps and not receipt:
        raise InvalidRoutes(f"{where}.receipt: must be true with must_reach")
    if receipt and not durable:
        key = "must_reach" if steps else "receipt"
        raise InvalidRoutes(f"{where}.{key}: only for a durable type")
    return Route(to, durable, receipt, steps)


def _read_steps(where: str, table: dict[str, Any]) -> tuple[Step, ...]:
    if "must_reach" not in table:
        for key in ("within", "then"):
            if key in table:
                raise InvalidRoutes(f"{where}.{key}: only with must_reach")
        return ()
    steps = [
        Step(_audience(f"{where}.must_reach", table["must_reach"]), _read_within(where, table))
    ]
    then = table.get("then", [])
    if not isinstance(then, list) or not all(isinstance(each, dict) for each in then):
        raise InvalidRoutes(f'{where}.then: must be a list like [{{to = "floor", within = 10}}]')
    for number, each in enumerate(then, 1):
        place = f"{where}.then[{number}]"
        _check_keys(place, each, ("to", "within"))
        if "to" not in each:
            raise InvalidRoutes(f"{place}.to: is missing")
        to = _audience(f"{place}.to", each["to"])
        if any(to == earlier.to for earlier in steps):
            raise InvalidRoutes(f"{place}.to: {each['to']!r} is an earlier step already")
        steps.append(Step(to, _read_within(place, each)))
    if sum(step.within for step in steps) > _LONGEST:
        raise InvalidRoutes(f"{where}: all steps together take more than {_LONGEST:g} seconds")
    return tuple(steps)


def _read_within(where: str, table: dict[str, Any]) -> float:
    if "within" not in table:
        raise InvalidRoutes(f"{where}.within: is missing (seconds)")
    within = table["within"]
    if (
        isinstance(within, bool)
        or not isinstance(within, int | float)
        or not (math.isfinite(within) and within > 0)
    ):
        raise InvalidRoutes(f"{where}.within: must be a number of seconds above 0")
    return float(within)


def _read_bool(where: str, table: dict[str, Any], key: str, default: bool) -> bool:
    found = table.get(key, default)
    if not isinstance(found, bool):
        raise InvalidRoutes(f"{where}.{key}: must be true or false")
    return found


def _audience(where: str, name: Any) -> To:
    if not isinstance(name, str):
        raise InvalidRoutes(f"{where}: must be the name of an audience")
    if name not in _NAMES:
        raise InvalidRoutes(f"{where}: unknown audience {name!r} (known: {', '.join(_NAMES)})")
    return _NAMES[name]


def _check_keys(where: str, table: dict[str, Any], known: tuple[str, ...]) -> None:
    if unknown := sorted(table.keys() - set(known)):
        raise InvalidRoutes(f"{where}: unknown key {unknown[0]!r} (known: {', '.join(known)})")
