"""One POST request on a connection of its own (RFC 9112)."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Final

import trio

from .address import Dial

_TIMEOUT: Final = 10.0  # seconds
_MOST: Final = 65_536  # bytes of an answer, before its status line ends
_STATUS: Final = re.compile(rb"HTTP/1\.[01] (\d{3})[ \r]")


async def post(
    dial: Dial,
    host: str,
    path: str,
    headers: Sequence[tuple[bytes, bytes]],
    body: Mapping[str, str],
) -> int | None:
    """Send a JSON object; return the status of the answer, or None without one."""
    content = json.dumps(body).encode()
    lines = [
        f"POST {path} HTTP/1.1".encode(),
        f"Host: {host}".encode(),
        b"Connection: close",
        b"Content-Type: application/json",
        b"Content-Length: %d" % len(content),
        *(name + b": " + value for name, value in headers),
    ]
    answer = b""
    with trio.move_on_after(_TIMEOUT):
        try:
            stream = await dial()
            try:
                await stream.send_all(b"\r\n".join([*lines, b"", content]))
                while b"\n" not in answer and len(answer) < _MOST:
                    if not (part := await stream.receive_some()):
                        break
                    answer += part
            finally:
                await trio.aclose_forcefully(stream)
        except (OSError, trio.BrokenResourceError):
            return None
    found = _STATUS.match(answer)
    return None if found is None else int(found[1])
