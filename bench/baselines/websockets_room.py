"""The ``websockets`` library's own ``broadcast()``."""

import asyncio
import sys

import redis.asyncio
from websockets.asyncio.server import ServerConnection, broadcast, serve

from . import CHANNEL, PONG

clients: set[ServerConnection] = set()


async def room(websocket: ServerConnection) -> None:
    clients.add(websocket)
    try:
        async for text in websocket:
            if text == "ping":
                await websocket.send(PONG)
    finally:
        clients.discard(websocket)


async def main(port: int, redis_port: int) -> None:
    pubsub = redis.asyncio.Redis(port=redis_port).pubsub()
    await pubsub.subscribe(CHANNEL)
    async with serve(room, "127.0.0.1", port, compression=None, backlog=4096):
        async for message in pubsub.listen():
            if message["type"] == "message":
                broadcast(clients, message["data"].decode())


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))
