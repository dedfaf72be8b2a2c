"""What can happen to a Redis, or to the way to it: each fault as how it begins and how it ends."""

import os
import shutil
from collections.abc import Awaitable, Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import redis
from redis.backoff import NoBackoff
from redis.exceptions import BusyLoadingError, MasterDownError
from redis.retry import Retry

from tests.support.gateways import free_port, until
from tests.support.redis_server import RedisServer

from .relay import Relay, Way

USER: Final = "gateway"
PASSWORD: Final = "the-right-password"
ALL: Final = frozenset({"pubsub", "stream", "commands"})
DEMOTED: Final = frozenset({"writes", "pubsub", "stream"})
WRITES: Final = frozenset({"writes"})
# Well-formed, and no answer to anything that we ask.
FOREIGN: Final = b"+OK\r\n:1\r\n*1\r\n*2\r\n$3\r\nfoo\r\n*1\r\n:1\r\n"


@dataclass
class Stage:
    """A Redis, and the relay that the gateway reaches it through."""

    server: RedisServer
    relay: Relay

    @contextmanager
    def admin(self) -> Iterator["redis.Redis"]:
        """Past the relay, with all rights."""
        with redis.Redis(
            port=self.server.port, socket_timeout=5, retry=Retry(NoBackoff(), 0)
        ) as client:
            yield client

    async def add_user(self) -> None:
        """Add the gateway's user to the configuration, so that it survives a restart."""
        await set_password(self, PASSWORD, kick=False)
        with (self.server.data_dir / "valkey.conf").open("a") as config:
            config.write(f"user {USER} on >{PASSWORD} ~* &* +@all\n")

    async def start(self, *options: str) -> None:
        """Start the server again on the same port, with the data on disk."""
        self.server.start_again(*options)
        await until(self.answers, 10)

    def answers(self) -> bool:
        try:
            with self.admin() as client:
                client.ping()
        except redis.ConnectionError as error:
            return isinstance(error, BusyLoadingError | MasterDownError)
        except redis.ResponseError:
            pass
        return True


Step = Callable[[Stage], Awaitable[None]]


@dataclass(frozen=True)
class Fault:
    """``opens`` are the breakers that it opens."""

    name: str
    begin: Step
    end: Step
    opens: Set[str] = field(default=ALL)
    hangs: bool = False  # requests wait in vain, so recovery is noticed later
    empties: bool = False  # the data of Redis is lost: clients must get a gap
    admits: bool = False  # clients with a token are admitted as usual
    kills: bool = False

    def __str__(self) -> str:
        return self.name


def _relay(do: Callable[[Relay], None]) -> Step:
    async def step(stage: Stage) -> None:
        do(stage.relay)

    return step


async def _kill(stage: Stage) -> None:
    stage.server.kill()


async def _start(stage: Stage) -> None:
    await stage.start()


async def _start_empty(stage: Stage) -> None:
    shutil.rmtree(stage.server.data_dir / "appendonlydir")
    await stage.start()


async def _become_replica(stage: Stage, *options: str) -> None:
    stage.server.kill()
    await stage.start("--replicaof", "127.0.0.1", str(free_port()), *options)


async def _become_primary(stage: Stage) -> None:
    with stage.admin() as admin:
        admin.replicaof("NO", "ONE")


async def _load_for_long(stage: Stage) -> None:
    """A hundred keys, each of which takes a while to load."""
    with stage.admin() as admin:
        for n in range(100):
            admin.set(f"load:{n}", os.urandom(2000))  # what compresses is read at once
        admin.bgrewriteaof()
        await until(lambda: not admin.info("persistence")["aof_rewrite_in_progress"])
        await until(lambda: not admin.info("persistence")["aof_rewrite_scheduled"])
    stage.server.kill()
    await stage.start(
        "--key-load-delay", "80000", "--loading-process-events-interval-bytes", "1024"
    )


async def _loaded(stage: Stage) -> None:
    def is_loaded() -> bool:
        try:
            with stage.admin() as admin:
                return bool(admin.get("load:1"))
        except redis.ConnectionError:
            return False

    await until(is_loaded, 20)


async def _config(stage: Stage, name: str, value: str) -> None:
    with stage.admin() as admin:
        admin.config_set(name, value)


async def set_password(stage: Stage, password: str, *, kick: bool) -> None:
    with stage.admin() as admin:
        admin.acl_setuser(
            USER, enabled=True, reset=True, passwords=f"+{password}", keys=["*"], channels=["*"],
            categories=["+@all"],
        )  # fmt: skip
        if kick:
            for client in admin.client_list():
                if client["user"] == USER:
                    admin.client_kill_filter(_id=client["id"])


async def _freeze(stage: Stage) -> None:
    stage.server.freeze()


async def _thaw(stage: Stage) -> None:
    stage.server.thaw()


async def _heal(stage: Stage) -> None:
    stage.relay.orphan()
    stage.relay.forward()


_forward = _relay(Relay.forward)

FAULTS: Final = (
    Fault("refused", _relay(Relay.refuse), _forward),
    Fault("reset", _relay(Relay.reset), _forward),
    Fault("killed", _kill, _start, kills=True),
    Fault("restarted empty", _kill, _start_empty, empties=True, kills=True),
    Fault("read-only replica", _become_replica, _become_primary, opens=DEMOTED, admits=True),
    Fault(
        "replica without its primary",
        lambda stage: _become_replica(stage, "--replica-serve-stale-data", "no"),
        _become_primary,
    ),
    Fault("loading", _load_for_long, _loaded),
    Fault("frozen", _freeze, _thaw, hangs=True),
    Fault("half-open", _relay(Relay.vanish), _heal, hangs=True),
    Fault("deaf on one side", _relay(lambda relay: relay.vanish(Way.TO_CLIENT)), _heal, hangs=True),
    Fault("a byte a second", _relay(lambda relay: relay.slow(1)), _forward, hangs=True),
    Fault("garbage", _relay(Relay.garbage), _forward),
    Fault("unexpected replies", _relay(lambda relay: relay.garbage(FOREIGN)), _forward),
    Fault(
        "out of memory",
        lambda stage: _config(stage, "maxmemory", "1"),
        lambda stage: _config(stage, "maxmemory", "0"),
        opens=WRITES,
        admits=True,
    ),
    Fault(
        "password changed",
        lambda stage: set_password(stage, "another-one", kick=True),
        lambda stage: set_password(stage, PASSWORD, kick=False),
    ),
)
