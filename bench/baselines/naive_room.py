"""Naive: Quart-Trio under Hypercorn, with a memory channel and a task for each client."""

import sys
from functools import partial
from typing import Any

import hiredis
import trio
from hypercorn.config import Config
from hypercorn.trio import serve
from quart import websocket
from quart_trio import QuartTrio

from . import CHANNEL, PONG

app = QuartTrio(__name__)
clients: set[trio.MemorySendChannel[str]] = set()


@app.websocket("/<path:path>")
async def room(path: str) -> None:
    mine, channel = trio.open_memory_channel[str](2000)
    clients.add(mine)

    async def send() -> None:
        async for text in channel:
            await websocket.send(text)

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            while True:
                if await websocket.receive() == "ping":
                    await mine.send(PONG)
    finally:
        clients.discard(mine)


async def read_redis(redis_port: int) -> None:
    reader: Any = hiredis.Reader()
    async with await trio.open_tcp_stream("127.0.0.1", redis_port) as stream:
        await stream.send_all(f"SUBSCRIBE {CHANNEL}\r\n".encode())
        async for data in stream:
            reader.feed(bytes(data))
            while (reply := reader.gets()) is not False:
                if reply[0] == b"message":
                    text = reply[2].decode()
                    for client in list(clients):
                        await client.send(text)


async def main(port: int, redis_port: int) -> None:
    config = Config()
    config.bind = [f"127.0.0.1:{port}"]
    config.backlog = 4096
    config.errorlog = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read_redis, redis_port)
        await serve(app, config, mode="asgi")


if __name__ == "__main__":
    trio.run(partial(main, int(sys.argv[1]), int(sys.argv[2])))
