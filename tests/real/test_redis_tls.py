"""Sentinels and Clusters are reached with TLS, and a password, on each connection."""

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import pytest
import trio
import trustme

from tests.support.commands import SECRETS, run
from tests.support.gateways import JWT_SECRET, admitted, http, make_settings, receive_event, running
from tests.support.tls_fronts import tls_fronts
from trio_gateway.publisher import AsyncPublisher, Publisher, PublishFailed
from trio_gateway.redis_sets import cluster_set, sentinel_set
from trio_gateway.testing import make_jwt

SETS: Final[dict[str, Any]] = {"sentinel": sentinel_set, "cluster": cluster_set}
BEARER: Final = {"Authorization": f"Bearer {make_jwt(JWT_SECRET, roles=['WAITER'])}"}
EVENT: Final = {"type": "ROUND_READY", "tenant_id": 1, "branch_id": 1}


@pytest.mark.parametrize("kind", ["sentinel", pytest.param("cluster", marks=pytest.mark.chaos)])
def test_every_connection_to_a_set_has_tls(kind: str, tmp_path: Path) -> None:
    with (
        tls_fronts(tmp_path) as fronts,
        SETS[kind](password="a /word@1", front=fronts.front) as found,
    ):
        with Publisher(fronts.url(found.url), confirm=1) as publisher:
            publisher.publish(EVENT)
        assert fronts.encrypted >= 2
        untrusting = Publisher(fronts.url(found.url).partition("?")[0])
        with untrusting, pytest.raises(PublishFailed, match="certificate"):
            untrusting.publish(EVENT)
        env = {"REDIS_URL": fronts.url(found.url), **SECRETS}
        checked = run("check", env=env)
        assert (checked.exit_code, checked.output.splitlines()[-1]) == (0, "The gateway can start.")
        env |= {"REDIS_URL": fronts.url(found.url).partition("?")[0]}
        assert "name the CA in REDIS_URL" in run("check", env=env).output
        before = fronts.encrypted
        trio.run(use, fronts.url(found.url))
        assert fronts.encrypted > before + 2


@contextmanager
def server_that_requires_a_client_certificate(folder: Path) -> Iterator[str]:
    """Its URL. It waits for the end of what it refuses, or a reset could overtake its alert."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    accepted = listener.accept()[0]
                    with accepted.dup() as plain:
                        with (
                            context.wrap_socket(
                                accepted, server_side=True, do_handshake_on_connect=False
                            ) as secure,
                            suppress(ssl.SSLError),
                        ):
                            secure.do_handshake()
                        plain.shutdown(socket.SHUT_WR)
                        while plain.recv(4096):
                            pass

        thread = threading.Thread(target=serve)
        thread.start()
        place = f"127.0.0.1:{listener.getsockname()[1]}"
        yield f"rediss://{place}?ssl_ca_certs={folder / 'ca.pem'}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_refusal_of_a_client_without_a_certificate_is_told_with_its_remedy(tmp_path: Path) -> None:
    with server_that_requires_a_client_certificate(tmp_path) as url:
        for scheme, path in (("", ""), ("+sentinel", "/mymaster")):
            asked = url.replace("rediss", f"rediss{scheme}").replace("?", f"{path}?")
            text = run("check", env={"REDIS_URL": asked, **SECRETS}).output
            assert "CERTIFICATE_REQUIRED" in text
            assert "name a client certificate that Redis accepts in REDIS_URL" in text


async def use(url: str) -> None:
    """A ticket, a durable event, and one on Pub/Sub."""
    async with running(make_settings(url)) as gateway:
        reply = await http(gateway.port, "/ws/ticket", method="POST", headers=BEARER)
        assert reply.status == 200
        async with (
            admitted(f"{gateway.url}/ws/waiter?ticket={reply.json['ticket']}") as client,
            AsyncPublisher(url, confirm=1) as publisher,
        ):
            await publisher.publish(EVENT)
            assert "event_id" in await receive_event(client)
            await publisher.publish({**EVENT, "v": 2}, channel="branch:1:waiters")
            assert "event_id" not in await receive_event(client)
