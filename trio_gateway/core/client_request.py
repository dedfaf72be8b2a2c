"""A client's request for a connection, in one form for every transport."""

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import msgspec

from .audiences import Endpoint

SUBPROTOCOL: Final = "gateway.v1"
_BEARER: Final = "bearer."
# Query parameters (in lower case) in which EventSource polyfills and other clients that cannot set
# headers send the last event id.
_LAST_EVENT_ID: Final = frozenset({"lasteventid", "last-event-id", "evs_last_event_id"})


class ClientRequest(msgspec.Struct, frozen=True):
    """What a client sent to open a WebSocket or an event stream.

    ``query`` has the first value of each parameter. ``headers`` has names in lower case; the
    values of a repeated header are joined by commas.
    """

    endpoint: Endpoint
    query: Mapping[str, str]
    headers: Mapping[str, str]
    key: str = ""  # of the opening handshake (RFC 6455, 4.1)
    # Returns the address of the peer, which may be a proxy. Called only if it is needed.
    peer: Callable[[], str] = str
    one_way: bool = False  # an event stream: the client cannot send messages
    supports_deflate: bool = False  # permessage-deflate was negotiated

    @property
    def origin(self) -> str | None:
        """The page's origin, if a browser sent one."""
        return self.headers.get("origin")

    @property
    def host(self) -> str:
        """The name or address, and perhaps the port, under which the client reached us."""
        return self.headers.get("host", "")

    @property
    def ticket(self) -> str | None:
        """A one-time ticket that replaces the token."""
        return self.query.get("ticket")

    @property
    def credential(self) -> str:
        """The token from the query, ``Authorization`` or the subprotocols; empty if there is none.

        The first place that has one counts.
        """
        if found := self.query.get("token" if self.endpoint.staff else "table_token"):
            return found
        if found := bearer(self.headers.get("authorization")):
            return found
        for offered in self._subprotocols:
            if offered.startswith(_BEARER):
                return offered.removeprefix(_BEARER)
        return ""

    @property
    def last_event_id(self) -> str | None:
        """The position to resume from, if the client asks to; empty asks for the current one.

        The header takes precedence over the query, and the parameter of a polyfill over ours:
        both are set at each attempt by code that knows the last event, while the rest of a URL
        does not change.
        """
        by_polyfill = [text for name, text in self.query.items() if name.lower() in _LAST_EVENT_ID]
        found = (self.headers.get("last-event-id"), *by_polyfill, self.query.get("last_event_id"))
        named = [text for text in found if text is not None]
        return next(filter(None, named), "") if named else None

    @property
    def extensions(self) -> str:
        """The WebSocket extensions that the client offers."""
        return self.headers.get("sec-websocket-extensions", "")

    @property
    def subprotocol(self) -> str | None:
        """The subprotocol to answer with."""
        return SUBPROTOCOL if SUBPROTOCOL in self._subprotocols else None

    @property
    def same_origin(self) -> bool:
        """Whether a browser says that this gateway served the page; its GET then has no Origin.

        No page can set this header (https://w3c.github.io/webappsec-fetch-metadata/).
        """
        return self.one_way and self.headers.get("sec-fetch-site") == "same-origin"

    @property
    def _subprotocols(self) -> Sequence[str]:
        offered = self.headers.get("sec-websocket-protocol")
        return [each.strip() for each in offered.split(",")] if offered else ()


def bearer(authorization: str | None) -> str | None:
    """Return the token of an ``Authorization: Bearer`` header (RFC 6750, 2.1), if there is one."""
    scheme, _, token = (authorization or "").strip().partition(" ")
    return (token.strip() or None) if scheme.lower() == "bearer" else None
