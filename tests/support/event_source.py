"""An EventSource as in a browser (WHATWG HTML, 9.2.6): its parser and its connection."""

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, NamedTuple

import h11
import trio

_LINE_END = re.compile("\r\n|\r|\n")


class Message(NamedTuple):
    """A message as a page gets it; a browser would reconnect with its last event id."""

    type: str
    data: str
    last_event_id: str

    @property
    def json(self) -> Any:
        return json.loads(self.data)


class Parser:
    """The steps of the standard, line by line."""

    def __init__(self) -> None:
        self.comments: list[str] = []
        self.retry: int | None = None
        self.last_event_id = ""
        self._rest = b""
        self._type, self._data = "", ""

    def feed(self, data: bytes) -> list[Message]:
        """The messages that these bytes complete; the rest waits for more."""
        *lines, rest = _LINE_END.split((self._rest + data).decode())
        self._rest = rest.encode()
        return [message for line in lines if (message := self._line(line)) is not None]

    def _line(self, line: str) -> Message | None:
        if not line:
            return self._dispatch()
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match field:
            case "":
                self.comments.append(value)
            case "event":
                self._type = value
            case "data":
                self._data += value + "\n"
            case "id" if "\0" not in value:
                self.last_event_id = value
            case "retry" if value.isascii() and value.isdigit():
                self.retry = int(value)
        return None

    def _dispatch(self) -> Message | None:
        data, kind = self._data, self._type
        self._type, self._data = "", ""
        if not data:
            return None
        return Message(kind or "message", data.removesuffix("\n"), self.last_event_id)


class Listener:
    """A response on a connection; its body is parsed while it arrives."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.parser = Parser()
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""  # if it is not a stream
        self.complete = False  # it ended as HTTP requires, and not by the end of the connection
        self._http = h11.Connection(h11.CLIENT)
        self._messages: list[Message] = []

    async def ask(self, path: str, headers: dict[str, str], method: str = "GET") -> None:
        """Send a request, and wait for the head of its response."""
        if self._http.our_state is h11.DONE:
            self._http.start_next_cycle()
            self.parser, self.body, self.complete = Parser(), b"", False
        request = h11.Request(
            method=method, target=path, headers=[("Host", "localhost"), *headers.items()]
        )
        data = self._http.send(request) or b""
        if "Transfer-Encoding" not in headers:  # a test that announces a body sends it
            data += self._http.send(h11.EndOfMessage()) or b""
        await self.stream.send_all(data)
        response = await self._event()
        assert isinstance(response, h11.Response)
        self.status = response.status_code
        self.headers = {name.decode(): value.decode() for name, value in response.headers}
        if self.headers.get("content-type") != "text/event-stream":
            while await self._more():
                pass

    async def next(self, seconds: float = 3) -> Message:
        """The next message; :exc:`EOFError` if the stream has ended."""
        with trio.fail_after(seconds):
            while not self._messages:
                if not await self._more():
                    raise EOFError
        return self._messages.pop(0)

    async def close_event(self, seconds: float = 3) -> tuple[int, str]:
        """Code and reason of the last message; those before it are skipped."""
        while (message := await self.next(seconds)).type != "close":
            pass
        with suppress(EOFError):
            raise AssertionError(f"after the close: {await self.next(seconds)}")
        return message.json["code"], message.json["reason"]

    async def _more(self) -> bool:
        match await self._event():
            case h11.Data(data=data) if self.headers.get("content-type") == "text/event-stream":
                self._messages += self.parser.feed(bytes(data))
            case h11.Data(data=data):
                self.body += data
            case h11.EndOfMessage():
                self.complete = True
                return False
            case _:
                return False
        return True

    async def _event(self) -> Any:
        try:
            while (event := self._http.next_event()) is h11.NEED_DATA:
                self._http.receive_data(await self.stream.receive_some())
        except (h11.RemoteProtocolError, trio.BrokenResourceError):
            return None
        return event


@asynccontextmanager
async def listening(
    port: int, path: str, headers: dict[str, str] | None = None, method: str = "GET"
) -> AsyncIterator[Listener]:
    """A client of this endpoint, admitted or not."""
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        listener = Listener(stream)
        with trio.fail_after(5):
            await listener.ask(path, headers or {}, method)
        yield listener
