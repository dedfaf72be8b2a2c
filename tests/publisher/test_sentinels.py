"""What Sentinels say about primary and replicas."""

from typing import Any

import pytest

from trio_gateway.core.primaries import Replica
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
    ) -> tuple[RedisAddress, int]:
        """The primary, and the number of its replicas."""
        told = zip(answers, epochs, strict=True)
        self.answers = dict(zip(URL.seeds, told, strict=True))
        self.suspect(ONE)
        primary = self.primary_of("key")
        count = self.replicas_of(primary)
        assert count is not None
        return primary, count


@pytest.fixture
def sentinels(monkeypatch: pytest.MonkeyPatch) -> Asked:
    return Asked(monkeypatch)


def test_primary_is_the_one_that_most_name(sentinels: Asked) -> None:
    assert sentinels.look((2, []), (1, []), (1, [])) == (ONE, 0)
    assert sentinels.look(None, (2, []), None) == (TWO, 0)


def test_primary_of_the_last_failover_counts_more_than_the_majority(sentinels: Asked) -> None:
    assert sentinels.look((1, []), (1, []), (2, []), epochs=(4, 4, 5)) == (TWO, 0)


def test_sentinel_that_was_away_is_heard_again_if_most_do_not_answer(sentinels: Asked) -> None:
    assert sentinels.look((1, []), (1, []), None) == (ONE, 0)
    assert sentinels.look((1, []), (1, []), (2, []), epochs=(4, 4, 5)) == (ONE, 0)
    assert sentinels.look((1, []), None, (2, []), epochs=(4, 4, 5)) == (TWO, 0)


def test_last_known_primary_stays_while_none_answers(sentinels: Asked) -> None:
    with pytest.raises(NotReached, match="s2:26379 is away"):
        sentinels.look(None, None, None)
    before = sentinels.look((1, [described(2)]), None, None)
    assert sentinels.look(None, None, None) == before == (ONE, 1)


def test_replicas_count_unless_they_have_been_lost_for_a_while(sentinels: Asked) -> None:
    replicas = [
        described(2),
        described(3, flags="s_down,slave,disconnected", s_down_time=100),
        described(4, flags="s_down,slave,disconnected", s_down_time=4000),
        described(5, flags="slave,disconnected"),
    ]
    assert sentinels.look((1, replicas), (1, replicas), None) == (ONE, 3)


def test_replica_that_was_just_promoted_still_counts_for_the_primary_of_before(
    sentinels: Asked,
) -> None:
    """A Sentinel that does not know of the failover yet; the former primary knows only one."""
    replicas = [described(2, role_reported="master", role_reported_time=200), described(3)]
    assert sentinels.look((1, replicas), (1, replicas), None) == (ONE, 2)


def test_former_primary_does_not_count_until_it_is_a_replica(sentinels: Asked) -> None:
    sentinels.look((1, []), (1, []), None)
    promoted = [described(1, role_reported="master", role_reported_time=200), described(3)]
    killed = [described(1, flags="s_down,slave", s_down_time=200), described(3)]
    for replicas in (promoted, killed):
        assert sentinels.look((2, replicas), (2, replicas), None) == (TWO, 1)
    assert sentinels.look((2, [described(1), described(3)]), None, None) == (TWO, 2)


def test_nothing_is_confirmed_for_what_is_not_the_primary_any_more(sentinels: Asked) -> None:
    sentinels.look((1, [described(2)]), (1, [described(2)]), None)
    sentinels.look((2, []), (2, []), None)
    assert sentinels.replicas_of(ONE) is None


@pytest.mark.parametrize("lost_for", [None, 0, 2999, 3000])
def test_replica_counts_for_three_seconds_after_it_was_lost(lost_for: int | None) -> None:
    two, three = ("10.0.0.1", 2), ("10.0.0.1", 3)
    assert Replica(two, lost_for).counts(None) is (lost_for != 3000)
    assert Replica(two, lost_for).counts(two) is (lost_for is None)
    assert Replica(two, lost_for).counts(three) is (lost_for != 3000)
