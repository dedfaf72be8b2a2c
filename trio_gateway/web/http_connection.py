"""One HTTP request, before Quart sees it."""

from contextlib import ExitStack
from typing import Any

import trio
from quart.wrappers import Request
from quart_trio import QuartTrio
from quart_trio.asgi import TrioASGIHTTPConnection

from ..parts import Parts
from ..reception import Reception
from ..transports import sse
from ..transports.asgi import read_scope
from . import cors, operations
from .api.guard import MAY_READ, PREFIX


class HttpConnection(TrioASGIHTTPConnection):
    """Serves event streams, and hands every other request to Quart.

    Hides the paths of the other listener. Adds CORS headers to paths that pages of other origins
    may call.
    """

    def __init__(self, parts: Parts, reception: Reception, app: QuartTrio, scope: Any) -> None:
        super().__init__(app, scope)
        self._parts = parts
        self._reception = reception

    async def __call__(self, receive: sse.Receive, send: sse.Send) -> None:
        path, headers, is_allowed = (
            self.scope["path"], self.scope["headers"], self._parts.admission.is_allowed,
        )  # fmt: skip
        has_operations = self._parts.settings.ws_operations_bind is not None
        if has_operations and operations.is_hidden(self.scope, path):
            await sse.answer(send, 404, {"Content-Type": "text/plain"}, b"not found\n")
            return
        if (shared := cors.PATHS.get(path)) is not None:
            method = self.scope["method"]
            if method == "OPTIONS":
                await cors.answer_options(shared, headers, is_allowed, send)
                return
            send = cors.adding(cors.response_headers(shared, method, headers, is_allowed), send)
        if (endpoint := sse.PATHS.get(path)) is None:
            if path.startswith(PREFIX):
                self.scope[MAY_READ] = trio.Event()  # type: ignore[typeddict-unknown-key]
            with ExitStack() as until_sent:  # releases what a view holds, after its response
                self.scope["until_sent"] = until_sent  # type: ignore[typeddict-unknown-key]
                try:
                    await super().__call__(receive, send)
                except* TimeoutError:  # the client did not read, and was reset
                    pass
            return
        await sse.serve(
            self._reception, read_scope(endpoint, self.scope), self.scope, receive, send
        )

    async def handle_messages(  # type: ignore[override]  # as quart-trio does
        self, nursery: trio.Nursery, request: Request, receive: sse.Receive
    ) -> None:
        """Pass the body on; that of a call of the API waits until its key is known."""
        may_read: trio.Event | None = self.scope.get(MAY_READ)  # type: ignore[assignment]
        if may_read is not None:
            await may_read.wait()
        await super().handle_messages(nursery, request, receive)
