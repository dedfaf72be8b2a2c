"""The older system's design: FastAPI under uvicorn, redis.asyncio, gather in batches of 50."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import redis.asyncio
import uvicorn
from fastapi import FastAPI, WebSocket, WebSocketDisconnect

from . import CHANNEL, PONG

BATCH = 50
clients: set[WebSocket] = set()


async def send(client: WebSocket, text: str) -> None:
    try:
        await client.send_text(text)
    except Exception:  # one client must not affect the others
        clients.discard(client)


async def read_redis() -> None:
    pubsub = redis.asyncio.Redis(port=int(sys.argv[2])).pubsub()
    await pubsub.subscribe(CHANNEL)
    async for message in pubsub.listen():
        if message["type"] == "message":
            text, everybody = message["data"].decode(), list(clients)
            for i in range(0, len(everybody), BATCH):
                await asyncio.gather(*(send(client, text) for client in everybody[i : i + BATCH]))


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    task = asyncio.create_task(read_redis())
    yield
    task.cancel()


app = FastAPI(lifespan=lifespan)


@app.websocket("/{path:path}")
async def room(websocket: WebSocket, path: str) -> None:
    await websocket.accept()
    clients.add(websocket)
    with suppress(WebSocketDisconnect):
        while True:
            if await websocket.receive_text() == "ping":
                await websocket.send_text(PONG)
    clients.discard(websocket)


if __name__ == "__main__":
    uvicorn.run(
        app, host="127.0.0.1", port=int(sys.argv[1]), backlog=4096, log_level="error",
        ws="websockets-sansio", ws_per_message_deflate=False,
    )  # fmt: skip
