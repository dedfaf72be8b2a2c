"""The presence feed: tells admins who is present in a branch, and each change of that."""

import math
from collections.abc import Iterable, Sequence
from typing import Final, NoReturn

import msgspec
import structlog
import trio

from ..broker.commands import Unavailable
from ..core.audiences import BranchId, Endpoint, TenantId
from ..core.messages import presence_change, presence_state
from ..core.presence import (
    GONE,
    Change,
    Present,
    change,
    combine,
    items_of,
    read_record,
)
from ..runtime.connection import Connection
from ..runtime.throttled_log import ThrottledLog
from . import presence_scripts as scripts

log = structlog.get_logger()

_RETRY: Final = 1.0  # seconds; also until a slow client is looked at again
_MOST_PENDING: Final = 1000  # messages that wait for a tenant's state; with more, it is read again
# The number of the change, and of each user or session: its key, since when it is present, and
# what each process holds of it. One that is gone has a key alone.
_decode: Final = msgspec.json.Decoder(tuple[int, list[list[str]]]).decode
_Changes = tuple[int, list[tuple[str, Present | None]]]


class _Tenant:
    """A tenant with watchers, and who is present in it."""

    def __init__(self) -> None:
        self.watchers: dict[BranchId, dict[Connection, None]] = {}
        self.present: dict[str, Present] | None = None  # None: to be read from Redis
        self.rev = 0  # of the last change that is known
        self.pending: list[_Changes] = []  # while it is read
        self.losses = 0  # how often changes may have been missed


class PresenceFeed:
    """Sends presence to its watchers. Without watchers it does nothing.

    ``run_script`` runs a script, and raises :exc:`Unavailable`. The state of a tenant is read once,
    and then follows what the scripts publish. When a change may have been missed, it is read and
    sent again. A client that is slow gets no changes, but the whole state when it has caught up.
    """

    def __init__(self, run_script: scripts.Run) -> None:
        self._run = run_script
        self._tenants: dict[TenantId, _Tenant] = {}
        self._branches: dict[Connection, set[BranchId]] = {}
        self._behind: dict[tuple[Connection, BranchId], None] = {}
        self._rev: int | None = None  # of the last message
        self._wake = trio.Event()
        self._throttled_log = ThrottledLog(log)

    def watch(self, connection: Connection, branch: BranchId) -> None:
        """Tell an admin of this branch from now on, the present state first.

        One that may not know it gets no answer.
        """
        if not _may_watch(connection, branch):
            return
        tenant = self._tenants.setdefault(connection.principal.tenant, _Tenant())
        tenant.watchers.setdefault(branch, {})[connection] = None
        self._branches.setdefault(connection, set()).add(branch)
        if tenant.present is None:
            self._wake.set()
        else:
            self._send_state(tenant.present, branch, [connection])

    def unwatch(self, connection: Connection, branch: BranchId | None = None) -> None:
        """Tell it no more of this branch; None: of any."""
        if (watched := self._branches.get(connection)) is None:
            return
        for each in [branch] if branch is not None else list(watched):
            if each not in watched:
                continue
            watched.discard(each)
            self._behind.pop((connection, each), None)
            tenant = self._tenants[connection.principal.tenant]
            del tenant.watchers[each][connection]
            if not tenant.watchers[each]:
                del tenant.watchers[each]
            if not tenant.watchers:
                del self._tenants[connection.principal.tenant]
        if not watched:
            del self._branches[connection]
        if not self._branches:
            self._rev = None  # messages are not read any more

    def moved(self, connection: Connection) -> None:
        """It has another principal: end what it may not watch any more."""
        for branch in list(self._branches.get(connection, ())):
            if not _may_watch(connection, branch):
                self.unwatch(connection, branch)

    def receive(self, payload: bytes) -> None:
        """Changes were published."""
        if not self._tenants:
            return
        try:
            rev, changes = _decode(payload)
            found: dict[TenantId, list[tuple[str, Present | None]]] = {}
            for key, *values in changes:
                number = TenantId(int(key.partition(":")[0]))
                if number in self._tenants:
                    after = _read_one(values[0], values[1:]) if values else None
                    found.setdefault(number, []).append((key, after))
        except (msgspec.DecodeError, ValueError):
            self._throttled_log.warning("presence message is invalid")
            return
        was, self._rev = self._rev, rev
        if rev != was + 1 if was is not None else rev > self._newest_read + 1:
            self._read_again()
            return
        for number, theirs in found.items():
            tenant = self._tenants[number]
            if tenant.present is not None:
                self._apply(tenant, (rev, theirs))
            elif len(tenant.pending) < _MOST_PENDING:
                tenant.pending.append((rev, theirs))

    def on_subscribed(self) -> None:
        """Read everything again: changes may have been lost until now."""
        self._rev = None
        self._read_again()

    @property
    def _newest_read(self) -> float:
        """The last change that is known of a tenant: later messages may say it again."""
        read = [each.rev for each in self._tenants.values() if each.present is not None]
        return max(read, default=math.inf)

    def _read_again(self) -> None:
        for tenant in self._tenants.values():
            tenant.present = None
            tenant.pending.clear()
            tenant.losses += 1
        self._wake.set()

    async def run(self) -> NoReturn:
        """Read what is not known, and look after slow clients; returns only when cancelled."""
        while True:
            self._wake = trio.Event()
            failed = False
            for number, tenant in list(self._tenants.items()):
                if tenant.present is None and not await self._read(number, tenant):
                    failed = True
            for connection, branch in list(self._behind):
                tenant = self._tenants[connection.principal.tenant]
                if tenant.present is not None and not connection.waiting_bytes:
                    self._send_state(tenant.present, branch, [connection])
            if failed or self._behind:
                await trio.sleep(_RETRY)
            else:
                await self._wake.wait()

    async def _read(self, number: TenantId, tenant: _Tenant) -> bool:
        """Read the state and send it; whether that succeeded, and nothing was lost meanwhile."""
        tenant.pending.clear()
        losses = tenant.losses
        try:
            rev, present, *held = await self._run(scripts.READ, ["", str(number)])
        except Unavailable:
            return False
        if tenant.losses != losses or len(tenant.pending) >= _MOST_PENDING:
            return False
        tenant.rev = int(rev)
        tenant.present = _read_state(present, held)
        for branch, watchers in tenant.watchers.items():
            self._send_state(tenant.present, branch, watchers)
        pending, tenant.pending = tenant.pending, []
        for each in pending:
            self._apply(tenant, each)
        return True

    def _apply(self, tenant: _Tenant, changes: _Changes) -> None:
        rev, found = changes
        if rev <= tenant.rev:
            return
        tenant.rev = rev
        assert tenant.present is not None
        told: dict[BranchId, list[Change]] = {}
        for key, after in found:
            before = tenant.present.pop(key, None)
            if after is not None:
                tenant.present[key] = after
            for branch in tenant.watchers:
                if (each := change(before, after, branch)) is not None:
                    told.setdefault(branch, []).append(each)
        for branch, seen in told.items():
            joined = [each.joined for each in seen if each.joined is not None]
            left = [each.left for each in seen if each.left is not None]
            self._send(presence_change(branch, joined, left), branch, tenant.watchers[branch])

    def _send_state(
        self, present: dict[str, Present], branch: BranchId, watchers: Iterable[Connection]
    ) -> None:
        text = presence_state(branch, items_of(present.values(), branch))
        for each in watchers:
            self._behind.pop((each, branch), None)
        self._send(text, branch, watchers)

    def _send(self, text: bytes, branch: BranchId, watchers: Iterable[Connection]) -> None:
        for each in watchers:
            if (each, branch) in self._behind:
                continue
            if each.waiting_bytes:
                self._behind[each, branch] = None
                self._wake.set()
            else:
                each.send(text)


def _may_watch(connection: Connection, branch: BranchId) -> bool:
    principal = connection.principal
    return principal.endpoint is Endpoint.ADMIN and branch in principal.branches


def _read_state(present: Sequence[bytes], held: Sequence[Sequence[bytes]]) -> dict[str, Present]:
    """Read the answer of the script: keys and values, and what each process holds of them."""
    found: dict[str, Present] = {}
    for at in range(0, len(present), 2):
        since, _, record = present[at + 1].decode().partition("\n")
        values = [process[at // 2].decode() for process in held if process[at // 2]]
        try:
            one = _read_one(since, values) or read_record(record, GONE, float(since))
        except ValueError:
            log.warning("record of presence is invalid", key=present[at].decode())
        else:
            found[present[at].decode()] = one
    return found


def _read_one(since: str, values: Sequence[str]) -> Present | None:
    """What the processes hold of one user or session; None if none holds it."""
    one: Present | None = None
    for value in values:
        connections, _, record = value.partition("\n")
        found = read_record(record, int(connections), float(since))
        one = found if one is None else combine(one, found)
    return one
