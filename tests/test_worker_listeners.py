"""The ports of workers."""

import gc
import socket
import warnings

import pytest
from hypercorn.config import Config

from tests.support.ports import free_ports
from trio_gateway.worker_listeners import BadAddress, Listeners, own_addresses


def test_each_worker_has_the_next_port_of_every_address() -> None:
    assert own_addresses(["127.0.0.1:8001", "[::1]:9001"], 3) == [
        ["127.0.0.1:8001", "[::1]:9001"],
        ["127.0.0.1:8002", "[::1]:9002"],
        ["127.0.0.1:8003", "[::1]:9003"],
    ]
    assert own_addresses(["0.0.0.0:65532"], 4)[-1] == ["0.0.0.0:65535"]
    assert own_addresses([], 2) == [[], []]


@pytest.mark.parametrize(
    ("binds", "problem"),
    [
        (["127.0.0.1:65533"], "4 workers need the ports 65533 to 65536.*the last port is 65535"),
        (["127.0.0.1:8001", "127.0.0.1:8004"], "two workers would have 127.0.0.1:8004"),
        (["unix:/run/gateway.sock"], "needs host:port, not unix:/run/gateway.sock"),
        (["fd://3"], "needs host:port"),
        (["localhost"], "needs host:port"),
        (["127.0.0.1:0"], "needs host:port"),
    ],
)
def test_addresses_that_can_t_be_counted_up_are_refused(binds: list[str], problem: str) -> None:
    with pytest.raises(BadAddress, match=problem):
        own_addresses(binds, 4)


def config(port: int) -> Config:
    found = Config()
    found.bind = [f"127.0.0.1:{port}"]
    found.workers = 3
    return found


def test_a_port_that_is_in_use_is_named_and_the_others_are_free_again() -> None:
    port = free_ports(3)
    with socket.create_server(("127.0.0.1", port + 2)), warnings.catch_warnings(action="ignore"):
        with pytest.raises(OSError, match="in use") as caught:
            Listeners.open_own(config(port), 3)
        assert caught.value.filename == f"127.0.0.1:{port + 2}"
        del caught
        gc.collect()  # Hypercorn does not close the socket
    for each in Listeners.open_own(config(port), 3):
        each.close()


def accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=2).close()
    except OSError:
        return False
    return True


def test_a_port_refuses_while_it_has_no_worker_and_shared_sockets_stay_open() -> None:
    port = free_ports(3)
    first, *others = Listeners.open_own(config(port), 3)
    first.refuse()
    assert [accepts(port + n) for n in range(3)] == [False, True, True]
    _, (descriptor, *_) = first.arguments(None)
    with socket.socket(fileno=descriptor) as worker:
        worker.listen()  # as the next worker does
        assert accepts(port)
        worker.detach()
    for each in (first, *others):
        each.close()

    shared = Listeners.open_shared(config(port), 3)
    shared.refuse()
    assert accepts(port)
    shared.close()
