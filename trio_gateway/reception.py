"""Reception: serve one client, from its accepted upgrade to the log line about its end."""

import math
from dataclasses import replace
from functools import partial

import structlog
import trio

from .access.admission import PendingAdmission
from .core.audiences import BranchId, Endpoint, Principal, SectorId
from .core.client_request import ClientRequest
from .core.close_codes import Close, Rejected
from .core.messages import (
    Command,
    Message,
    Reauthenticate,
    WatchPresence,
    auth_ok,
    intervals,
    sectors_updated,
)
from .parts import Parts
from .runtime.concurrency_limiter import Overloaded
from .runtime.connection import Connection, ConnectionLimits
from .runtime.socket import Socket
from .runtime.throttled_log import ThrottledLog
from .stats_feed import StatsFeed
from .transports.sse import EventStream

log = structlog.get_logger()


class Reception:
    """Admits clients, runs their connections and answers their requests, on every transport."""

    def __init__(self, parts: Parts, stats_feed: StatsFeed) -> None:
        settings = parts.settings
        self._parts = parts
        self._throttled_log = ThrottledLog(log)
        self._stats_feed = stats_feed
        self._limits = ConnectionLimits(
            stale_after=settings.ws_heartbeat_timeout,
            receive_timeout=settings.ws_receive_timeout,
            write_timeout=settings.ws_write_timeout,
            rate_limit=settings.ws_message_rate_limit,
            rate_window=settings.ws_message_rate_window,
            outbox_bytes=settings.ws_outbox_bytes,
            outbox_messages=settings.ws_outbox_messages,
        )
        self._intervals = intervals(
            heartbeat_timeout=settings.ws_heartbeat_timeout,
            receive_timeout=settings.ws_receive_timeout,
            ping_interval=settings.ws_ping_interval,
            receipts=settings.routes.tracked_types,
        )
        # A client that cannot send has no heartbeat: a dead one is found by writing to it.
        self._one_way_limits = replace(self._limits, stale_after=math.inf, receive_timeout=math.inf)

    @property
    def draining(self) -> bool:
        """Whether the gateway closes its clients and admits no new ones."""
        return self._parts.draining

    def count_refusal(self, status: int) -> None:
        """Count an upgrade that was refused with this HTTP status."""
        self._parts.counts.refused[status] += 1

    async def serve_connection(self, request: ClientRequest, socket: Socket) -> None:
        """Serve one client whose upgrade was accepted, on any transport.

        Returns when the connection is closed. A bug ends only this client, with 1011.
        """
        parts = self._parts
        endpoint = request.endpoint
        accepted_at, accepted_time = parts.extent.end, trio.current_time()
        address, entered = "", False
        try:
            try:
                address = parts.addresses.of(request.peer, request.headers.get("x-forwarded-for"))
                parts.addresses.enter(address, accepted_time)
                entered = True
                with await self._admit(request) as pending:
                    principal = await self._confirm(pending, socket)
                # No await between this and joining the hub: what was checked still holds.
                connection = Connection(
                    principal,
                    self._one_way_limits if request.one_way else self._limits,
                    self._handle,
                    self._on_trios_clock(principal.expires_at),
                    replays=parts.replays,
                    receipts=parts.receipts,
                    deadlines=parts.deadlines,
                    resume_from=request.last_event_id,
                    accepted_at=accepted_at,
                    # Of a shard that is not read yet there is no place, but a time.
                    accepted_time=accepted_time if parts.settings.sharding.by_tenant else None,
                    supports_deflate=request.supports_deflate,
                )
            except Rejected as rejected:
                if rejected.close is Close.AUTH_FAILED:
                    parts.addresses.failed(address, trio.current_time())
                await self._reject(endpoint, socket, rejected)
                return
            except Exception:
                self._throttled_log.exception("admission failed by a bug", endpoint=endpoint.label)
                bug = Rejected(Close.INTERNAL_ERROR, "internal error", "internal_error")
                await self._reject(endpoint, socket, bug)
                return
            del request, pending  # free a long head and its token while the client is connected
            try:  # not in a method of its own: each client would hold one frame more
                with parts.following.client_of(principal.tenant):
                    await connection.run(socket, parts.hub)
            except Exception:
                self._throttled_log.exception("connection ended by a bug", endpoint=endpoint.label)
            finally:
                _log_close(connection)
        finally:
            if entered:
                parts.addresses.leave(address)

    async def _admit(self, request: ClientRequest) -> PendingAdmission:
        admission, admissions = self._parts.admission, self._parts.admissions
        if admissions.try_enter():
            try:
                if (found := await admission.try_admit(request)) is not None:
                    return found
            finally:
                admissions.leave()
        accept_timeout = self._parts.settings.ws_accept_timeout
        try:
            admitted = await admissions.run(
                partial(admission.admit, request),
                accept_timeout,
                patience=accept_timeout / 2,
            )
        except Overloaded:
            raise Rejected(
                Close.SERVER_OVERLOADED, "too many handshakes", "handshake_limit"
            ) from None
        if admitted is None:
            raise _timed_out()
        return admitted

    async def _confirm(self, pending: PendingAdmission, socket: Socket) -> Principal:
        """Return the principal that joins the hub, or raise :exc:`Rejected`.

        What was checked holds until the next await.
        """
        admission = self._parts.admission
        self._refuse_while_draining()
        if (place := pending.take_place()) is None:
            try:
                place, waited = await self._parts.room.find(pending.principal, socket.has_left)
                pending.watch.stale |= waited
            except Rejected:
                self._refuse_while_draining()
                raise
        with place:
            self._refuse_while_draining()  # a drain may have begun during an await
            if pending.ticket is None and (principal := admission.confirm(pending)) is not None:
                return principal
            return await self._confirm_slowly(pending)

    async def _confirm_slowly(self, pending: PendingAdmission) -> Principal:
        admission = self._parts.admission
        with trio.move_on_after(self._parts.settings.ws_accept_timeout):
            while True:
                self._refuse_while_draining()
                if (principal := admission.confirm(pending)) is None:
                    await admission.recheck(pending)
                elif pending.ticket is None:
                    return principal
                else:
                    await admission.redeem(pending.ticket)
                    pending.ticket = None
        raise _timed_out()

    def _refuse_while_draining(self) -> None:
        if self.draining:
            raise Rejected(Close.GOING_AWAY, self._parts.drain.hint(), "draining")

    async def _reject(self, endpoint: Endpoint, socket: Socket, rejected: Rejected) -> None:
        self._parts.counts.rejected[rejected.label] += 1
        self._parts.hub.count_close(rejected.close)
        self._throttled_log.info(
            "rejected",
            kind=f"rejected {rejected.label}",
            endpoint=endpoint.label,
            code=int(rejected.close),
            reason=rejected.text,
        )
        with trio.CancelScope(shield=True):  # bounded by the socket
            if isinstance(socket, EventStream):
                await socket.refuse(rejected)
            else:
                await socket.close(rejected.close, rejected.text)

    async def _handle(self, connection: Connection, message: Message) -> None:
        """Answer a message that the connection cannot answer by itself."""
        match message:
            case Reauthenticate(token):
                await self._reauthenticate(connection, token)
            case Command.REFRESH_SECTORS | Command.REFRESH_SECTORS_JSON as form:
                await self._refresh_sectors(connection, form)
            case Command.INTERVALS:
                connection.send(self._intervals)
            case Command.WATCH | Command.UNWATCH as command:
                self._stats_feed.command(connection, command)
            case WatchPresence(branch, on):
                self._watch_presence(connection, branch, on=on)

    def _watch_presence(self, connection: Connection, branch: BranchId | None, *, on: bool) -> None:
        if (cluster := self._parts.cluster) is None or cluster.presence is None:
            return
        feed = cluster.presence.feed
        if on and branch is not None:
            feed.watch(connection, branch)
        else:
            feed.unwatch(connection, branch)

    async def _reauthenticate(self, connection: Connection, token: str | None) -> None:
        parts = self._parts
        try:
            with trio.move_on_after(parts.settings.ws_accept_timeout):
                principal = await parts.admission.renew(connection.principal, token)
                parts.hub.move(connection, principal)
                connection.renew(self._on_trios_clock(principal.expires_at))
                connection.send(auth_ok(principal.expires_at))
        except Rejected as rejected:
            # Live connections stay while Redis is down: the old credential holds until it expires.
            if rejected.close is not Close.SERVER_OVERLOADED:
                connection.close(rejected.close, rejected.text)

    async def _refresh_sectors(self, connection: Connection, form: Command) -> None:
        if connection.principal.endpoint is not Endpoint.WAITER:
            return
        if (assignments := self._parts.sector_assignments) is not None:
            await assignments.refresh(connection)
        sectors = frozenset[SectorId]().union(*connection.principal.sectors.values())
        connection.send(sectors_updated(sectors, form))

    def _on_trios_clock(self, unix_time: float) -> float:
        return trio.current_time() + unix_time - self._parts.clock()


def _log_close(connection: Connection) -> None:
    principal = connection.principal
    log.info(
        "closed",
        endpoint=principal.endpoint.label,
        tenant=principal.tenant,
        user=principal.user,
        session=principal.session,
        code=connection.code,
        reason=connection.close_reason,
        seconds=round(trio.current_time() - connection.joined_at, 1),
    )


def _timed_out() -> Rejected:
    return Rejected(Close.SERVER_OVERLOADED, "can't check the credential now", "accept_timeout")
