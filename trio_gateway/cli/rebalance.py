"""``rebalance``: send clients to the process where the proxy places their tenant now."""

import http.client
import json
import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import SplitResult

import click

from .errors import Failure, settings_or_exit
from .redis_servers import RedisServers, redis_failures
from .rendering import print_table
from .url import read_url

if TYPE_CHECKING:
    import redis

_TIMEOUT: Final = 5.0  # seconds for one reply of Redis or the proxy
_REPORTS_WITHIN: Final = 3.0  # seconds in which processes report
_TENANTS_PER_REQUEST: Final = 1000
_SAMPLE: Final = 5  # tenants for which the proxy is asked several times
_ASKED_AGAIN: Final = 2

Held = Mapping[str, Mapping[int, int]]  # by process: the number of connections of each tenant


@dataclass
class Plan:
    """Which clients change their process."""

    places: dict[int, str] = field(default_factory=dict)  # of the tenants that move
    leaving: dict[str, int] = field(default_factory=dict)  # clients, by the process that they leave
    coming: dict[str, int] = field(default_factory=dict)
    staying: int = 0  # clients that are elsewhere, and for which there is no room


def plan(held: Held, places: Mapping[int, str], at_most: float) -> Plan:
    """Decide which tenants move to their place.

    A tenant stays if its place would have more than ``at_most`` times the average of connections:
    the proxy would not let its clients in there.
    """
    found = Plan()
    loads = {process: sum(tenants.values()) for process, tenants in held.items()}
    limit = at_most * sum(loads.values()) / max(1, len(loads))
    elsewhere = {
        tenant: {p: held[p][tenant] for p in held if p != place and tenant in held[p]}
        for tenant, place in places.items()
        if place in loads
    }
    for tenant, holders in sorted(elsewhere.items(), key=lambda each: -sum(each[1].values())):
        place, count = places[tenant], sum(holders.values())
        if not count:
            continue
        if loads[place] + count > limit:
            found.staying += count
            continue
        found.places[tenant] = place
        loads[place] += count
        found.coming[place] = found.coming.get(place, 0) + count
        for process, clients in holders.items():
            loads[process] -= clients
            found.leaving[process] = found.leaving.get(process, 0) + clients
    return found


@click.command()
@click.option("--url", required=True, help="Address of the proxy, such as http://127.0.0.1:8080.")
@click.option("--dry-run", is_flag=True, help="Show what would move.")
@click.option(
    "--at-most",
    type=click.FloatRange(1),
    default=1.5,
    show_default=True,
    help="Times the average of connections that a process may get; as in the proxy.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def rebalance(url: str, dry_run: bool, at_most: float, as_json: bool) -> None:
    """Send clients away that belong to another process; they reconnect there and resume.

    For after processes were added or came back. It asks each process on this Redis which tenants
    it has, and the proxy where each of them belongs. Each process then closes the connections that
    are elsewhere, at most 100 a second, with 1001 and a retry hint.
    """
    from ..core.control_messages import placement_channel
    from ..redis_url import RedisUrl

    proxy = _Proxy(read_url(url))
    redis_url = settings_or_exit().redis_url
    servers = RedisServers(redis_url)
    channel = placement_channel(RedisUrl.from_url(redis_url).data.db)
    client = servers.primary(channel)
    with redis_failures():
        held, asked = _ask_processes(servers, client, channel)
    if not asked:
        raise Failure("no gateway listens on this Redis: check REDIS_URL")
    if len(held) < asked:
        click.echo(f"{asked - len(held)} of {asked} processes did not report", err=True)
    tenants = sorted({tenant for each in held.values() for tenant in each})
    with proxy:
        proxy.verify(tenants[:_SAMPLE], len(held))
        places = {tenant: proxy.ask(tenant) for tenant in tenants}
    if unknown := set(places.values()) - held.keys():
        raise Failure(
            f"the proxy leads to {len(unknown)} process{'es' if len(unknown) > 1 else ''} that did"
            " not report: do they use this Redis?"
        )
    found = plan(held, places, at_most)
    if not dry_run:
        with redis_failures():
            _send(client, channel, found.places)
    _show(held, found, dry_run=dry_run, as_json=as_json)


class _Proxy:
    """Asks a proxy for the process of a tenant, over one connection."""

    def __init__(self, url: SplitResult) -> None:
        kind = http.client.HTTPSConnection if url.scheme == "wss" else http.client.HTTPConnection
        self._connection = kind(url.hostname or "", url.port, timeout=_TIMEOUT)
        self._path = url.path
        self._where = url.netloc

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def ask(self, tenant: int) -> str:
        """The process where the proxy places this tenant. Raises :exc:`Failure`."""
        # It has the form of a ticket, whose first part is the tenant.
        target = f"{self._path}/ws/placement?ticket={tenant}."
        try:
            self._connection.request("GET", target)
            response = self._connection.getresponse()
            body = response.read(1 << 16)
            process = json.loads(body)["process"] if response.status == 200 else None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise Failure(f"can't ask {self._where}: {reason}") from None
        except (ValueError, KeyError, TypeError, RecursionError):
            process = None
        if not isinstance(process, str):
            raise Failure(
                f"{self._where} answers /ws/placement with HTTP {response.status}: no gateway is"
                " there, or an older one"
            )
        return process

    def verify(self, tenants: Iterable[int], processes: int) -> None:
        """Raise :exc:`Failure` if the proxy does not choose the process by the tenant."""
        differ = [
            len({self.ask(tenant) for _ in range(1 + _ASKED_AGAIN)}) > 1 for tenant in tenants
        ]
        # A process at its bound may give a different answer, so one does not count.
        if processes > 1 and differ and sum(differ) * 2 >= len(differ):
            raise Failure(
                f"{self._where} does not choose the process by the tenant: see deploy/haproxy.cfg"
            )


def _ask_processes(
    servers: RedisServers, client: "redis.Redis", channel: str
) -> tuple[dict[str, dict[int, int]], int]:
    """The tenants of each process that reports in time, and the number of processes asked."""
    import msgspec

    from ..core.control_messages import PlacementReport, PlacementRequest

    report_to = f"{channel}:{secrets.token_hex(8)}"
    held: dict[str, dict[int, int]] = {}
    subscription: Any = client.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call]
    with subscription as reports:
        reports.subscribe(report_to)
        request = msgspec.json.encode(PlacementRequest(report_to=report_to))
        asked: Any = client.publish(channel, request)
        if servers.is_cluster:  # a node counts only those that are subscribed there
            counts: list[Any] = [each.pubsub_numsub(channel) for each in servers.all()]
            asked = sum(number for ((_, number),) in counts)
        deadline = time.monotonic() + _REPORTS_WITHIN
        while len(held) < asked and (left := deadline - time.monotonic()) > 0:
            message = reports.get_message(timeout=left)
            if message is not None:
                report = msgspec.json.decode(message["data"], type=PlacementReport)
                held[report.process] = report.tenants
    return held, asked


def _send(client: "redis.Redis", channel: str, places: Mapping[int, str]) -> None:
    import msgspec

    from ..core.control_messages import PlacementRequest

    items = list(places.items())
    for start in range(0, len(items), _TENANTS_PER_REQUEST):
        request = PlacementRequest(places=dict(items[start : start + _TENANTS_PER_REQUEST]))
        client.publish(channel, msgspec.json.encode(request))


def _show(held: Held, found: Plan, *, dry_run: bool, as_json: bool) -> None:
    rows: list[dict[str, str | int]] = [
        {
            "process": process,
            "tenants": len(tenants),
            "clients": sum(tenants.values()),
            "leaving": found.leaving.get(process, 0),
            "coming": found.coming.get(process, 0),
        }
        for process, tenants in sorted(held.items())
    ]
    moving = sum(found.leaving.values())
    summary = {
        "processes": rows,
        "tenants_moving": len(found.places),
        "clients_moving": moving,
        "clients_without_room": found.staying,
        "dry_run": dry_run,
    }
    if as_json:
        click.echo(json.dumps(summary))
        return
    print_table(tuple(rows[0]), [tuple(row.values()) for row in rows])
    what = "would be" if dry_run else "are"
    click.echo(f"{moving} clients of {len(found.places)} tenants {what} sent to another process")
    if found.staying:
        click.echo(f"{found.staying} clients stay: their process has no room for them")
