"""Real sets fail over, keep their data, and leave nothing behind."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis

from trio_gateway.redis_sets import Node, NotRunning, cluster_set, sentinel_set, single_redis
from trio_gateway.redis_sets.cluster import Cluster
from trio_gateway.redis_sets.redis_set import majority

PASSWORD = "a /password@1"
START = """
import sys
from trio_gateway.redis_sets import single_redis
with single_redis() as found:
    (node,) = found.nodes
    node.freeze()
    print(node.pid, node.folder.parent, flush=True)
    sys.stdin.read()
"""


def exists(pid: int) -> bool:
    """Whether the process is there; one that has ended and is not yet waited for is not."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_sentinels_with_a_password_make_a_replica_the_primary() -> None:
    with sentinel_set(password=PASSWORD, sentinel_password="another one") as found:
        assert found.url.startswith("redis+sentinel://:a%20%2Fpassword%401@127.0.0.1:")
        assert found.url.endswith("/mymaster?sentinel_password=another+one")
        before = found.primary()
        before.ask("SET", "key", "value")
        assert before.ask("WAIT", 2, 5000, timeout=6) == 2
        found.failover()
        after = found.wait_writable(other_than=before)
        assert after.ask("GET", "key") == "value"
        with pytest.raises(redis.AuthenticationError):
            redis.Redis(port=after.port).ping()


@pytest.mark.chaos
def test_a_cluster_with_a_password_moves_slots_and_fails_over() -> None:
    with cluster_set(password=PASSWORD, appendonly="yes") as found:
        owner = found.primary("{tag}")
        for n in range(250):
            owner.ask("XADD", f"{{tag}}:{n}", "*", "data", n)
        target = next(node for node in found.primaries() if node is not owner)
        found.move_slot("{tag}", target)
        assert found.wait_writable("{tag}") is target
        with pytest.raises(redis.exceptions.MovedError):
            owner.ask("XLEN", "{tag}:7")
        assert {target.ask("XLEN", f"{{tag}}:{n}") for n in range(250)} == {1}
        found.wait_healthy()
        found.failover("{tag}")
        after = found.wait_writable("{tag}", other_than=target)
        assert after.ask("XLEN", "{tag}:7") == 1


def test_a_killed_node_finds_its_data_again() -> None:
    with single_redis(appendonly="yes", appendfsync="always") as found:
        node = found.primary()
        node.ask("SET", "key", "value")
        node.kill()
        assert (node.runs, found.is_healthy()) == (False, False)
        node.restart()
        assert node.ask("GET", "key") == "value"


def test_nothing_is_left_of_a_set_whose_process_is_killed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", START], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        pid, folder = process.stdout.readline().split()
        assert exists(int(pid))
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while (exists(int(pid)) or os.path.exists(folder)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (exists(int(pid)), os.path.exists(folder)) == (False, False)


def test_a_server_that_does_not_start_says_why() -> None:
    with pytest.raises(NotRunning, match="Bad directive"), single_redis(no_such_option="1"):
        pass


def test_the_port_of_a_killed_node_stays_reserved() -> None:
    with single_redis() as found:
        node = found.primary()
        node.kill()
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", node.port))
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", node.port))
        node.restart()


def test_without_a_majority_nobody_is_the_primary() -> None:
    assert majority([1, 1, 2], 3) == 1
    for answers in ([1, 2], [1], []):
        with pytest.raises(NotRunning):
            majority(answers, 3)


class FakePrimary(Node):
    """The one primary of a Cluster, with a replica that the nodes may not tell each other of."""

    def __init__(self, *replicas: object) -> None:
        self._replies: dict[str, object] = {
            "INFO": "cluster_state:ok\r\ncluster_known_nodes:1\r\n",
            "NODES": "id 127.0.0.1:1@2 myself,master - 0 0 1 connected 0-16383",
            "SLOTS": [[0, 16383, ["127.0.0.1", 1, "id"], *replicas]],
        }

    def try_ask(self, *command: str | int, timeout: float = 1.0) -> object:
        return self._replies[str(command[1])]

    def info(self, section: str) -> dict[str, object]:
        return {"role": "master", "connected_slaves": 1}


def test_a_cluster_is_healthy_once_its_nodes_tell_of_the_replicas() -> None:
    """``check`` would miss them, which a node has at once and the others a second later."""
    for replicas in ([], [["127.0.0.1", 2, "other"]]):
        found = Cluster("redis+cluster://", [FakePrimary(*replicas)], {}, None)
        assert found.is_healthy() is bool(replicas)
