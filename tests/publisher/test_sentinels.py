"""What Sentinels say about primary and replicas."""

from typing import Any

import pytest

from trio_gateway.core.primaries import ConnectedReplicas, KnownReplicas, Replica
from trio_gateway.core.slots import Node
from trio_gateway.publisher.links import NotReached
from trio_gateway.publisher.sentinels import Sentinels
from trio_gateway.redis_url import RedisAddress, RedisUrl

URL = RedisUrl.from_url("redis+sentinel://s1,s2,s3/mymaster")
ONE, TWO = (URL.node("10.0.0.1", port) for port in (1, 2))


def described(port: int, **fields: Any) -> list[bytes]:
    """A replica, as in the reply to SENTINEL REPLICAS."""
    known = {
        "ip": "10.0.0.1", "port": port, "flags": "slave", "role-reported": "slave",
        "role-reported-time": 100_000,
    }  # fmt: skip
    known |= {name.replace("_", "-"): value for name, value in fields.items()}
    return [str(word).encode() for pair in known.items() for word in pair]


def nodes(*ports: int) -> frozenset[Node]:
    return frozenset(("10.0.0.1", port) for port in ports)


Told = tuple[int, list[list[bytes]]] | None  # the port of the primary, and its replicas


class Asked(Sentinels):
    """Three Sentinels that answer as told, with the epochs as told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(URL, counts_replicas=True)
        self.answers: dict[RedisAddress, tuple[Told, int]] = {}

        def ask(asking: Any, servers: Any) -> Any:
            for server in servers:
                answer, epoch = self.answers[server]
                if answer is None:
                    asking.failed[server] = f"{server} is away"
                else:
                    port, replicas = answer
                    details = [b"config-epoch", b"%d" % epoch]
                    yield server, [[b"10.0.0.1", b"%d" % port], details, replicas]

        monkeypatch.setattr("trio_gateway.publisher.asking.Round.ask", ask)

    def look(
        self, *answers: Told, epochs: tuple[int, int, int] = (0, 0, 0)
    ) -> tuple[RedisAddress, KnownReplicas]:
        """The primary, and its replicas."""
        told = zip(answers, epochs, strict=True)
        self.answers = dict(zip(URL.seeds, told, strict=True))
        self.suspect(ONE)
        primary = self.primary_of("key")
        replicas = self.replicas_of(primary)
        assert replicas is not None
        return primary, replicas


@pytest.fixture
def sentinels(monkeypatch: pytest.MonkeyPatch) -> Asked:
    return Asked(monkeypatch)


def test_primary_is_the_one_that_most_name(sentinels: Asked) -> None:
    assert sentinels.look((2, []), (1, []), (1, [])) == (ONE, KnownReplicas())
    assert sentinels.look(None, (2, []), None) == (TWO, KnownReplicas())


def test_primary_of_the_last_failover_counts_more_than_the_majority(sentinels: Asked) -> None:
    assert sentinels.look((1, []), (1, []), (2, []), epochs=(4, 4, 5)) == (TWO, KnownReplicas())


def test_sentinel_that_was_away_is_heard_again_if_most_do_not_answer(sentinels: Asked) -> None:
    assert sentinels.look((1, []), (1, []), None) == (ONE, KnownReplicas())
    assert sentinels.look((1, []), (1, []), (2, []), epochs=(4, 4, 5)) == (ONE, KnownReplicas())
    assert sentinels.look((1, []), None, (2, []), epochs=(4, 4, 5)) == (TWO, KnownReplicas())


def test_last_known_primary_stays_while_none_answers(sentinels: Asked) -> None:
    with pytest.raises(NotReached, match="s2:26379 is away"):
        sentinels.look(None, None, None)
    before = sentinels.look((1, [described(2)]), None, None)
    assert sentinels.look(None, None, None) == before == (ONE, KnownReplicas(1))


def test_replicas_count_unless_they_have_been_lost_for_a_while(sentinels: Asked) -> None:
    replicas = [
        described(2),
        described(3, flags="s_down,slave,disconnected", s_down_time=100),
        described(4, flags="s_down,slave,disconnected", s_down_time=4000),
        described(5, flags="slave,disconnected"),
    ]
    assert sentinels.look((1, replicas), (1, replicas), None) == (ONE, KnownReplicas(3, nodes(3)))


def test_replica_that_was_just_promoted_still_counts_for_the_primary_of_before(
    sentinels: Asked,
) -> None:
    """A Sentinel that does not know of the failover yet; the former primary knows only one."""
    replicas = [described(2, role_reported="master", role_reported_time=200), described(3)]
    assert sentinels.look((1, replicas), (1, replicas), None) == (ONE, KnownReplicas(2, nodes(2)))


@pytest.mark.parametrize("came_back", [False, True])
@pytest.mark.parametrize(
    "lost",
    [
        {"role_reported": "master", "role_reported_time": 200},
        {"flags": "s_down,slave", "s_down_time": 200},
    ],
)
def test_former_primary_counts_as_any_replica(
    sentinels: Asked, lost: dict[str, Any], came_back: bool
) -> None:
    """It may become the primary again: what only the other replica has would be lost."""
    sentinels.look((1, []), (1, []), None)
    if came_back:
        replicas = [described(1), described(3)]
        assert sentinels.look((2, replicas), (2, replicas), None) == (TWO, KnownReplicas(2))
    replicas = [described(1, **lost), described(3)]
    assert sentinels.look((2, replicas), (2, replicas), None) == (TWO, KnownReplicas(2, nodes(1)))


def connected(*ports: int, named: bool = True) -> ConnectedReplicas:
    """As the primary says it to INFO."""
    lines = [f"slave{n}:ip=10.0.0.1,port={port},state=online" for n, port in enumerate(ports)]
    text = "\r\n".join(["role:master", f"connected_slaves:{len(ports)}", *lines * named, ""])
    return ConnectedReplicas.read(text.encode())


def test_replica_that_is_connected_stands_for_none_that_is_lost(sentinels: Asked) -> None:
    """One was killed and follows again, which the Sentinels have not seen. They promote the other:
    what the first alone confirms will be lost.
    """
    promoted = described(3, role_reported="master", role_reported_time=100)
    for lost_for in (900, 4000):
        back = described(1, flags="s_down,slave", s_down_time=lost_for)
        _, known = sentinels.look((2, [back, promoted]), (2, [back, promoted]), None)
        assert known.wanted(connected(1)) == 2
        assert known.wanted(connected(1, 3)) == 2


def test_all_replicas_are_those_that_are_connected_or_known() -> None:
    wanted = KnownReplicas(2).wanted
    assert [wanted(connected(*ports)) for ports in ((3,), (3, 4), (3, 4, 5))] == [2, 2, 3]
    # By another name, one that has just come back may count twice for a moment.
    assert KnownReplicas(2, nodes(3)).wanted(connected(3, 4, named=False)) == 3


def test_reply_that_is_none_to_info_is_an_error() -> None:
    for reply in (b"", b"connected_slaves:x", None, [b"connected_slaves:1"]):
        with pytest.raises(ValueError, match="invalid reply"):
            ConnectedReplicas.read(reply)


def test_nothing_is_confirmed_for_what_is_not_the_primary_any_more(sentinels: Asked) -> None:
    sentinels.look((1, [described(2)]), (1, [described(2)]), None)
    sentinels.look((2, []), (2, []), None)
    assert sentinels.replicas_of(ONE) is None


@pytest.mark.parametrize("lost_for", [None, 0, 2999, 3000])
def test_replica_counts_for_three_seconds_after_it_was_lost(lost_for: int | None) -> None:
    assert Replica(("10.0.0.1", 2), lost_for).counts is (lost_for != 3000)
