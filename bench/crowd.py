"""The crowd: the clients of a run, the events, and which client must receive which event.

Events repeat with a period: the i-th is of kind ``i % period``, and names its kind in two
characters at a fixed offset. So a client must receive a fixed text of two characters per event, and
two comparisons check a whole buffer of frames.

The receivers are computed here from the contract's table, not with the gateway's code.
"""

import base64
import hashlib
import hmac
import json
import random
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from .baselines import CHANNEL

JWT_SECRET: Final = "0123456789abcdef" * 4
TABLE_SECRET: Final = "fedcba9876543210" * 4

# Characters that need no escape in a JSON string.
_DIGITS: Final = bytes(c for c in range(0x23, 0x7F) if c != 0x5C)
MAX_PERIOD: Final = len(_DIGITS) ** 2
RECEIVE: Final = 1 << 18  # bytes that a client reads at a time
_LEAST_FRAME: Final = 200


class Expected:
    """The events that a client must receive: their indices in a period, and their characters."""

    __slots__ = ("first", "indices", "period", "second", "size")

    def __init__(self, indices: Sequence[int], period: int) -> None:
        self.indices = list(indices)
        self.period = period
        self.size = len(self.indices)
        first = bytes(_DIGITS[i // len(_DIGITS)] for i in self.indices)
        second = bytes(_DIGITS[i % len(_DIGITS)] for i in self.indices)
        repeat = 2 + RECEIVE // _LEAST_FRAME // max(1, self.size)
        self.first, self.second = first * repeat, second * repeat

    def before(self, n: int) -> int:
        """How many of the first ``n`` events the client must receive."""
        periods, rest = divmod(n, self.period)
        return periods * self.size + bisect_left(self.indices, rest)

    def includes(self, n: int) -> bool:
        at = bisect_left(self.indices, n % self.period)
        return at < self.size and self.indices[at] == n % self.period


@dataclass(frozen=True)
class Kind:
    """One kind of event: its channel, and the keys that decide who receives it."""

    channel: str
    keys: dict[str, Any]


@dataclass
class Crowd:
    """``targets`` and ``expects`` are per client, ``kinds`` is one period of events."""

    targets: list[str]
    expects: list[Expected]
    kinds: list[Kind]
    audience: float = field(init=False)  # of an event, on average

    def __post_init__(self) -> None:
        self.audience = sum(each.size for each in self.expects) / len(self.kinds)


class Template:
    """The payloads of a crowd's events, all of one size: ``{"t":…,"n":…,"c":"…","type":…}``.

    ``t`` is CLOCK_MONOTONIC in ns, ``n`` the event's number, ``c`` its two characters.
    """

    def __init__(self, kinds: Sequence[Kind], size: int) -> None:
        if not _LEAST_FRAME <= size < 1 << 16:
            raise ValueError(f"an event is {_LEAST_FRAME} to 65535 bytes here, not {size}")
        self.size = size
        self.frame_size = size + 4  # RFC 6455, 5.2: such a payload has a header of four bytes
        head = b'{"t":%20d,"n":%10d,"c":"' % (0, 0)
        self.code_at = 4 + len(head)  # in the frame
        self.number_at = 4 + len(b'{"t":%20d,"n":' % 0)
        self._commands = []
        self._rests = []
        for i, kind in enumerate(kinds):
            code = bytes((_DIGITS[i // len(_DIGITS)], _DIGITS[i % len(_DIGITS)]))
            keys = {**kind.keys, "ts": "2026-05-20T12:00:00.000000+00:00"}
            rest = code + b'",' + json.dumps(keys, separators=(",", ":")).encode()[1:-1]
            rest += b',"entity":{"note":"'
            room = size - len(head) - len(rest) - 3
            if room < 0:
                raise ValueError(f"events of this scenario need {size - room} bytes")
            text = (b"Milanesa napolitana, " * (room // 21 + 1))[:room]
            self._rests.append(rest + text + b'"}}\r\n')
            channel = kind.channel.encode()
            self._commands.append(
                b'*3\r\n$7\r\nPUBLISH\r\n$%d\r\n%b\r\n$%d\r\n{"t":' % (len(channel), channel, size)
            )

    def command(self, n: int, now: int) -> bytes:
        """The n-th event as a PUBLISH."""
        i = n % len(self._rests)
        return b'%b%20d,"n":%10d,"c":"%b' % (self._commands[i], now, n, self._rests[i])

    def payload(self, n: int, now: int) -> bytes:
        i = n % len(self._rests)
        return b'{"t":%20d,"n":%10d,"c":"%b' % (now, n, self._rests[i][:-2])


def token(secret: str, **claims: Any) -> str:
    """Make a JWT, HS256. Ten thousand of them with pyjwt would take longer than connecting."""
    now = int(time.time())
    body = json.dumps({"iat": now, "exp": now + 7200, **claims}, separators=(",", ":")).encode()
    text = _base64(b'{"alg":"HS256","typ":"JWT"}') + b"." + _base64(body)
    signature = hmac.digest(secret.encode(), text, hashlib.sha256)
    return (text + b"." + _base64(signature)).decode()


def _base64(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def staff(
    endpoint: str, user: int, tenant: int, branches: Sequence[int], role: str, **claims: Any
) -> str:
    """The target of a staff member's connection."""
    claims |= {"sub": str(user), "tenant_id": tenant, "branch_ids": list(branches)}
    return f"/ws/{endpoint}?token={token(JWT_SECRET, roles=[role], **claims)}"


def diner(tenant: int, branch: int, session: int) -> str:
    found = token(
        TABLE_SECRET, tenant_id=tenant, branch_id=branch, table_id=session, session_id=session
    )
    return f"/ws/diner?table_token={found}"


def one_branch(clients: int, *, elsewhere: int = 0) -> Crowd:
    """All waiters of one branch, and others in branches without events."""
    period = 4000
    kinds = [Kind(CHANNEL, {"type": "ROUND_READY", "tenant_id": 1, "branch_id": 1})] * period
    everything, nothing = Expected(range(period), period), Expected((), period)
    return Crowd(
        [staff("waiter", i + 1, 1, [1], "WAITER") for i in range(clients)]
        + [staff("waiter", i + 1, 2, [100_000 + i], "WAITER") for i in range(elsewhere)],
        [everything] * clients + [nothing] * elsewhere,
        kinds,
    )


def small_branches(branches: int) -> Crowd:
    """A waiter and a kitchen in each of many branches, five branches to a tenant."""
    targets, expects, kinds = [], [], []
    for i in range(branches):
        tenant, branch = 1 + i // 5, 1 + i
        kinds.append(
            Kind(
                f"channel:branch:{branch}:waiters",
                {"type": "ROUND_READY", "tenant_id": tenant, "branch_id": branch},
            )
        )
        mine = Expected([i], branches)
        targets.append(staff("waiter", 2 * i + 1, tenant, [branch], "WAITER"))
        targets.append(staff("kitchen", 2 * i + 2, tenant, [branch], "KITCHEN"))
        expects += [mine, mine]
    return Crowd(targets, expects, kinds)


_W, _F, _K, _A, _D, _B = "sector", "floor", "kitchen", "admins", "session", "branch diners"
# type, audiences by the contract's table, sector, session (of the branch)
_MIX: Final[list[tuple[str, frozenset[str], int | None, int | None]]] = [
    ("ROUND_READY", frozenset({_W, _K, _A, _D}), 1, 1),
    ("ROUND_READY", frozenset({_W, _K, _A, _D}), 2, 2),
    ("ROUND_SERVED", frozenset({_W, _A, _D}), 3, 1),
    ("ROUND_PENDING", frozenset({_F, _A, _D}), 1, 2),
    ("TICKET_READY", frozenset({_F, _K, _A}), None, None),
    ("SERVICE_CALL_CREATED", frozenset({_W, _A}), 2, None),
    ("ENTITY_UPDATED", frozenset({_A}), None, None),
    ("CART_SYNC", frozenset({_D}), None, 1),
    ("PRODUCT_AVAILABILITY_CHANGED", frozenset({_F, _K, _A, _B}), None, None),
]
# endpoint, role, sectors, session of the branch
_ROLES: Final[list[tuple[str, str, frozenset[int], int | None]]] = [
    ("waiter", "WAITER", frozenset({1}), None),
    ("waiter", "WAITER", frozenset({2}), None),
    ("waiter", "WAITER", frozenset({1, 2}), None),
    ("waiter", "WAITER", frozenset({3}), None),
    ("waiter", "MANAGER", frozenset(), None),
    ("kitchen", "KITCHEN", frozenset(), None),
    ("kitchen", "KITCHEN", frozenset(), None),
    ("admin", "ADMIN", frozenset(), None),
    ("diner", "", frozenset(), 1),
    ("diner", "", frozenset(), 2),
]


def mixed(clients: int, branches: int, each: int) -> Crowd:
    """The staff of one tenant in all roles, each in several branches, and its diners.

    With many branches each, almost no two clients receive the same events: a bad case for the
    engine.
    """
    chance = random.Random(17)
    order = [(b, m) for b in range(1, branches + 1) for m in range(len(_MIX))]
    chance.shuffle(order)
    kinds = []
    for b, m in order:
        type_, to, sector, session = _MIX[m]
        keys: dict[str, Any] = {"type": type_, "tenant_id": 1, "branch_id": b}
        if sector is not None:
            keys["sector_id"] = sector
        if session is not None:
            keys["session_id"] = 10 * b + session
        only_admins = to == {_A}
        kinds.append(Kind(f"channel:branch:{b}:{'admin' if only_admins else 'waiters'}", keys))
    targets, expects = [], []
    known: dict[tuple[Any, ...], Expected] = {}
    for i in range(clients):
        endpoint, role, sectors, session = _ROLES[i % len(_ROLES)]
        home = 1 + i // len(_ROLES) % branches
        mine = {home}
        if endpoint == "diner":
            assert session is not None
            targets.append(diner(1, home, 10 * home + session))
        else:
            others = [b for b in range(1, branches + 1) if b != home]
            mine.update(chance.sample(others, min(each, branches) - 1))
            targets.append(
                staff(endpoint, i + 1, 1, sorted(mine), role, sector_ids=sorted(sectors))
            )
        key = (endpoint, role, sectors, session, frozenset(mine))
        if key not in known:
            received = [
                n for n, (b, m) in enumerate(order)
                if b in mine and _receives(endpoint, role, sectors, session, *_MIX[m][1:])
            ]  # fmt: skip
            known[key] = Expected(received, len(order))
        expects.append(known[key])
    return Crowd(targets, expects, kinds)


def _receives(
    endpoint: str, role: str, sectors: frozenset[int], mine: int | None,
    to: frozenset[str], sector: int | None, session: int | None,
) -> bool:  # fmt: skip
    match endpoint:
        case "diner":
            return _B in to or (_D in to and session == mine)
        case "kitchen":
            return _K in to
        case "admin":
            return _A in to
    floor = _F in to or (_W in to and sector is None)
    return floor or (_W in to and sector in sectors) or (_A in to and role == "MANAGER")
