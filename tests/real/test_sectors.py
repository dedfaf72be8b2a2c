"""Sectors from a real database (SQLite, and a PostgreSQL that can freeze), over real sockets."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis
import sqlalchemy
import trio
from sqlalchemy import BigInteger, Boolean, Column, Date, Integer, MetaData, String, Table
from sqlalchemy.pool import NullPool
from trio_websocket import WebSocketConnection

from tests.support.commands import run
from tests.support.gateways import (
    JWT_SECRET,
    Running,
    admitted,
    environment,
    free_port,
    http,
    make_settings,
    metrics,
    process,
    received,
    received_texts,
    running,
    settle,
    until,
    wait,
)
from tests.support.postgres import Postgres, postgres
from tests.support.stopwatch import Stopwatch
from trio_gateway.access import sector_database
from trio_gateway.access.sector_database import QueryFailed, SectorDatabase, WaiterKey
from trio_gateway.access.sectors import SectorAssignments
from trio_gateway.cli.demo_processes import make_database as demo_database
from trio_gateway.core.audiences import BranchId, TenantId, UserId
from trio_gateway.core.resilience import Breaker
from trio_gateway.core.service_day import ServiceDays
from trio_gateway.gateway import create_app
from trio_gateway.runtime.hub import Hub
from trio_gateway.settings import InvalidSettings
from trio_gateway.testing import make_jwt, make_payload, make_principal

WAITER_21 = WaiterKey(TenantId(1), BranchId(1), UserId("21"))


def today() -> date:
    return ServiceDays().period(TenantId(1), BranchId(1), time.time()).day


@dataclass
class Database:
    """The database of the backend, which the gateway reads."""

    url: str
    name: str = "waiter_sector_assignment"
    schema: str | None = None
    called: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        url = self.url.replace("postgresql:", "postgresql+psycopg:")
        self.engine = sqlalchemy.create_engine(url, poolclass=NullPool)
        self.table = Table(
            self.name,
            MetaData(),
            Column("id", Integer, primary_key=True),
            *(Column(self._named(n), BigInteger) for n in ("tenant_id", "branch_id", "sector_id")),
            Column(self._named("waiter_id"), BigInteger),
            Column(self._named("assignment_date"), Date),
            Column(self._named("shift"), String),
            Column(self._named("is_active"), Boolean),
            schema=self.schema,
        )

    def _named(self, column: str) -> str:
        return self.called.get(column, column)

    def create(self) -> "Database":
        with self.engine.begin() as connection:
            if self.schema not in {None, "main"}:
                connection.exec_driver_sql(f"CREATE SCHEMA {self.schema}")
            self.table.create(connection)
        return self

    def drop(self) -> None:
        with self.engine.begin() as connection:
            self.table.drop(connection, checkfirst=True)
            if self.schema not in {None, "main"}:
                connection.exec_driver_sql(f"DROP SCHEMA IF EXISTS {self.schema}")

    def assign(self, *sectors: int, **values: Any) -> None:
        row = {
            "tenant_id": 1, "branch_id": 1, "waiter_id": 21, "assignment_date": today(),
            "shift": None, "is_active": True,
        } | values  # fmt: skip
        with self.engine.begin() as connection:
            for sector in sectors:
                made = {self._named(k): v for k, v in (row | {"sector_id": sector}).items()}
                connection.execute(self.table.insert().values(made))

    def reassign(self, *sectors: int, **values: Any) -> None:
        """Replace all assignments with these."""
        with self.engine.begin() as connection:
            connection.execute(self.table.delete())
        self.assign(*sectors, **values)


MakeDatabase = Callable[..., Database]


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with postgres() as found:
        yield found


@pytest.fixture(params=["sqlite", "postgres"])
def make_database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeDatabase]:
    made: list[Database] = []

    def make(**names: Any) -> Database:
        if request.param == "sqlite":
            url = f"sqlite:///{tmp_path / 'backend.db'}"
            if "schema" in names:
                names["schema"] = "main"
        else:
            url = request.getfixturevalue("server").url
        made.append(Database(url, **names))
        return made[-1].create()

    yield make
    for database in made:
        database.drop()


@pytest.fixture
def database(make_database: MakeDatabase) -> Database:
    return make_database()


@pytest.fixture
def pg(server: Postgres) -> Iterator[Database]:
    made = Database(server.url).create()
    yield made
    server.thaw()  # if a test failed meanwhile
    made.drop()


@contextmanager
def roster_of(database: Database) -> Iterator[tuple[SectorAssignments, SectorDatabase]]:
    assignments = SectorDatabase(database.url, database.name, database.called)
    try:
        yield SectorAssignments(assignments, Hub(), Breaker(5, 30)), assignments
    finally:
        assignments.close()


async def received_sectors(
    gateway: Running,
    backend: "redis.Redis",
    client: WebSocketConnection,
    *,
    tenant: int = 1,
    branch: int = 1,
) -> set[int]:
    """The sectors from 1 to 9 whose events reach the client."""
    for sector in range(1, 10):
        call = make_payload(
            "SERVICE_CALL_CREATED", tenant_id=tenant, branch_id=branch, sector_id=sector
        )
        backend.publish(f"channel:sector:{branch}:{sector}:waiters", call)
    await settle(gateway)
    found = [event["sector_id"] for event in await received(client)]
    assert len(found) == len(set(found))
    return set(found)


# Which rows are valid


async def test_waiter_receives_only_the_sectors_assigned_for_today(
    redis_url: str, backend: "redis.Redis", database: Database
) -> None:
    database.assign(5)
    database.assign(6, shift="NIGHT")  # no shift windows are set
    database.assign(1, is_active=False)
    database.assign(2, assignment_date=today() - timedelta(days=1))
    database.assign(3, assignment_date=today() + timedelta(days=1))
    database.assign(4, tenant_id=2)
    database.assign(7, branch_id=2)
    database.assign(8, waiter_id=22)
    settings = make_settings(redis_url, database_url=database.url)
    async with (
        running(settings) as gateway,
        admitted(gateway.staff_url("waiter", sector_ids=[9])) as client,
    ):
        assert await received_sectors(gateway, backend, client) == {5, 6}
        figures = await metrics(gateway.port)
        assert figures.by_label("sector_queries_total") == {"answered": 1, "failed": 0}
        health = (await http(gateway.port, "/ws/health/detailed")).json
        assert health["database"] == {"status": "connected", "known": 1, "pending": 0}


async def test_every_branch_of_the_token_has_its_own_sectors(
    redis_url: str, backend: "redis.Redis", database: Database
) -> None:
    database.assign(5, branch_id=1)
    database.assign(6, branch_id=2)
    settings = make_settings(redis_url, database_url=database.url)
    async with (
        running(settings) as gateway,
        admitted(gateway.staff_url("waiter", branch_ids=[1, 2])) as client,
    ):
        assert await received_sectors(gateway, backend, client, branch=1) == {5}
        assert await received_sectors(gateway, backend, client, branch=2) == {6}


async def test_waiter_without_a_row_has_no_sectors_whatever_the_token_claims(
    redis_url: str, backend: "redis.Redis", database: Database
) -> None:
    settings = make_settings(redis_url, database_url=database.url)
    async with (
        running(settings) as gateway,
        admitted(gateway.staff_url("waiter", sector_ids=[5, 6])) as client,
    ):
        assert await received_sectors(gateway, backend, client) == set()
        backend.publish("channel:branch:1:waiters", make_payload("ROUND_PENDING", sector_id=5))
        await settle(gateway)
        assert [event["type"] for event in await received(client)] == ["ROUND_PENDING"]


async def test_waiters_with_the_same_id_in_two_tenants_are_isolated(
    redis_url: str, backend: "redis.Redis", database: Database
) -> None:
    database.assign(5, tenant_id=1)
    database.assign(6, tenant_id=2)
    settings = make_settings(redis_url, database_url=database.url)
    async with (
        running(settings) as gateway,
        admitted(gateway.staff_url("waiter", tenant_id=1)) as one,
        admitted(gateway.staff_url("waiter", tenant_id=2)) as two,
    ):
        assert await received_sectors(gateway, backend, one, tenant=1) == {5}
        assert await received(two) == []
        assert await received_sectors(gateway, backend, two, tenant=2) == {6}
        assert await received(one) == []


async def test_ids_beyond_32_bits_and_beyond_64_do_not_fail(database: Database) -> None:
    most = 2**63 - 1
    database.assign(5, tenant_id=most, branch_id=most, waiter_id=most)
    with roster_of(database) as (sector_assignments, assignments):
        found = await sector_assignments.assign(
            make_principal(tenant=most, branches=[most], user=most)
        )
        assert set(found.sectors[BranchId(most)]) == {5}
        assert not (
            await sector_assignments.assign(make_principal(user=10**30, sectors=[9]))
        ).sectors
        assert assignments.failures == 0


async def test_row_without_a_sector_is_ignored(database: Database) -> None:
    database.assign(5)
    database.assign(None)  # type: ignore[arg-type]
    with roster_of(database) as (sector_assignments, _):
        assert set((await sector_assignments.assign(make_principal())).sectors[BranchId(1)]) == {5}


async def test_table_and_columns_may_have_other_names(
    redis_url: str, backend: "redis.Redis", make_database: MakeDatabase
) -> None:
    called = {"waiter_id": "employee", "assignment_date": "on day", "is_active": "valid"}
    database = make_database(name="rota", schema="staff", called=called)
    database.assign(5)
    settings = make_settings(
        redis_url,
        database_url=database.url,
        sector_table=f"{database.schema}.rota",
        sector_columns="waiter_id=employee, assignment_date=on day, is_active=valid",
    )
    async with running(settings) as gateway, admitted(gateway.staff_url("waiter")) as client:
        assert await received_sectors(gateway, backend, client) == {5}


async def test_database_connection_is_read_only(database: Database) -> None:
    database.assign(5)
    with roster_of(database) as (_, assignments):
        with (
            pytest.raises(sqlalchemy.exc.DBAPIError, match=r"read-?only"),
            assignments._engine.begin() as connection,
        ):
            connection.execute(database.table.delete())
        assert await assignments.of(WAITER_21, today()) == {(5, None)}


async def test_demo_creates_its_sectors(tmp_path: Path) -> None:
    with roster_of(Database(demo_database(str(tmp_path)))) as (_, assignments):
        for day in (today(), today() + timedelta(days=1)):
            assert await assignments.of(WAITER_21, day) == {(5, None)}


# Changes


async def test_refresh_is_answered_in_the_form_of_its_request(
    redis_url: str, backend: "redis.Redis", database: Database
) -> None:
    database.assign(5)
    settings = make_settings(redis_url, database_url=database.url)
    async with running(settings) as gateway, admitted(gateway.staff_url("waiter")) as client:
        database.reassign(7, 6)
        assert await received_sectors(gateway, backend, client) == {5}

        await client.send_message('{"type":"refresh_sectors"}')
        assert await received(client) == [{"type": "sectors_updated", "sector_ids": [6, 7]}]
        assert await received_sectors(gateway, backend, client) == {6, 7}

        database.reassign(8)
        await client.send_message("refresh_sectors")
        assert await received_texts(client) == ["sectors_updated:8"]
        assert await received_sectors(gateway, backend, client) == {8}

        database.reassign()
        await client.send_message("refresh_sectors")
        await client.send_message('{"type":"refresh_sectors"}')
        assert await received_texts(client) == [
            "sectors_updated:", '{"type":"sectors_updated","sector_ids":[]}',
        ]  # fmt: skip


async def test_announced_change_reaches_the_client_at_once(
    redis_url: str, backend: "redis.Redis", database: Database
) -> None:
    database.assign(5)
    settings = make_settings(redis_url, database_url=database.url)
    async with (
        running(settings) as gateway,
        admitted(gateway.staff_url("waiter")) as client,
        admitted(gateway.staff_url("waiter", tenant_id=2)) as other_tenant,
    ):
        database.reassign(6)
        backend.publish("channel:sectors:changed", '{"tenant_id":2,"waiter_id":21}')
        await settle(gateway)
        assert await received_sectors(gateway, backend, client) == {5}

        backend.publish("channel:sectors:changed", '{"tenant_id":1,"waiter_id":21}')
        await until(partial(_is_served, gateway, {6}), seconds=1)
        assert await received_sectors(gateway, backend, client) == {6}
        assert await received(other_tenant) == []


async def test_change_announced_while_the_link_was_down_reaches_the_client(
    redis_url: str, backend: "redis.Redis", database: Database
) -> None:
    database.assign(5)
    settings = make_settings(redis_url, database_url=database.url)
    async with running(settings) as gateway, admitted(gateway.staff_url("waiter")) as client:
        backend.client_kill_filter(_type="pubsub")
        database.reassign(6)  # and the message is lost
        await until(partial(_is_served, gateway, {6}), seconds=3)
        await until(lambda: gateway.app.ready)
        assert await received_sectors(gateway, backend, client) == {6}


def _nothing_is_pending(gateway: Running) -> bool:
    return (
        gateway.app.parts.sector_assignments is not None
        and not gateway.app.parts.sector_assignments.pending
    )


def _no_query_hangs(gateway: Running) -> bool:
    assert gateway.app.parts.sector_assignments is not None
    assignments = gateway.app.parts.sector_assignments._assignments
    assert isinstance(assignments, SectorDatabase)
    return not assignments._limiter.borrowed_tokens


def _is_served(gateway: Running, sectors: set[int]) -> bool:
    return any(
        set(connection.principal.sectors.get(BranchId(1), ())) == sectors
        for connection in gateway.app.parts.hub.connections
    )


async def test_uncovered_sector_falls_back_to_the_branch_if_configured(
    redis_url: str, backend: "redis.Redis", database: Database
) -> None:
    database.assign(5)
    for uncovered, expected in (("none", {5}), ("branch", set(range(1, 10)))):
        settings = make_settings(
            redis_url, database_url=database.url, ws_uncovered_sector=uncovered
        )
        async with running(settings) as gateway, admitted(gateway.staff_url("waiter")) as client:
            assert await received_sectors(gateway, backend, client) == expected
            assert (await metrics(gateway.port))["events_unheard_total"] == 8


# Many at the same time


async def test_500_concurrent_waiters_cost_500_queries_and_then_none(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    # How many queries there are is tested, and not how fast this machine answers them.
    monkeypatch.setattr(sector_database, "TIMEOUT", 30.0)
    for user in range(1, 501):
        if user % 50 == 0:
            database.assign(user % 9 + 1, waiter_id=user)
    with roster_of(database) as (sector_assignments, assignments):
        found = dict[int, set[int]]()

        async def enter(user: int) -> None:
            principal = await sector_assignments.assign(make_principal(user=user))
            found[user] = set(principal.sectors.get(BranchId(1), ()))

        for _ in range(2):
            async with trio.open_nursery() as nursery:
                for user in range(1, 501):
                    nursery.start_soon(enter, user)
            assert (assignments.queries, assignments.failures) == (500, 0)
        assert all(
            sectors == ({user % 9 + 1} if user % 50 == 0 else set())
            for user, sectors in found.items()
        )


async def test_500_connections_of_one_waiter_cost_one_query(database: Database) -> None:
    database.assign(5)
    with roster_of(database) as (sector_assignments, assignments):
        async with trio.open_nursery() as nursery:
            for _ in range(500):
                nursery.start_soon(sector_assignments.assign, make_principal())
        assert assignments.queries == 1


# Failures


async def test_frozen_database_delays_only_connects_by_two_seconds(
    redis_url: str, backend: "redis.Redis", server: Postgres, pg: Database
) -> None:
    pg.assign(5)
    pg.assign(6, waiter_id=22)
    settings = make_settings(redis_url, database_url=pg.url, circuit_recovery_timeout=0.5)
    latencies: list[float] = []

    async def ping(client: WebSocketConnection) -> None:
        while True:
            watch = Stopwatch()
            assert await received(client) == []
            latencies.append(watch.net)
            await trio.sleep(0.06)  # the rate limit is 20 a second

    async with (
        running(settings) as gateway,
        admitted(gateway.staff_url("waiter", sub="23")) as bystander,
        admitted(gateway.staff_url("waiter", sub="22")),
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(ping, bystander)
        server.freeze()
        watch = Stopwatch()
        async with admitted(gateway.staff_url("waiter", sub="22")) as client:
            assert watch.net < 0.5
            assert await received_sectors(gateway, backend, client) == {6}  # from the cache

        watch = Stopwatch()
        both = gateway.staff_url("waiter", branch_ids=[1, 2], sector_ids=[9])
        async with admitted(both) as client:
            assert watch.elapsed > 1.9
            assert watch.net < 2.5
            assert await received_sectors(gateway, backend, client) == {9}  # what the token claims
            health = await http(gateway.port, "/ws/health/detailed")
            assert health.json["database"] == {"status": "disconnected", "known": 2, "pending": 2}
            assert health.status == 200  # no connected client needs it
            failed = (await metrics(gateway.port)).by_label("sector_queries_total")["failed"]
            assert failed >= 2

            server.thaw()
            await until(partial(_nothing_is_pending, gateway), 12)
            assert await received_sectors(gateway, backend, client) == {5}  # on the same connection
            health = await http(gateway.port, "/ws/health/detailed")
            assert health.json["database"] == {"status": "connected", "known": 4, "pending": 0}
        nursery.cancel_scope.cancel()
        await until(partial(_no_query_hangs, gateway))
    assert len(latencies) > 30
    assert max(latencies) < 0.25


async def test_database_that_stays_frozen_delays_no_connect(
    redis_url: str, server: Postgres, pg: Database
) -> None:
    settings = make_settings(redis_url, database_url=pg.url, circuit_failure_threshold=5)
    async with running(settings) as gateway:
        server.freeze()
        watch = Stopwatch()

        async def enter(user: int) -> None:
            async with admitted(gateway.staff_url("waiter", sub=str(user))):
                pass

        async with trio.open_nursery() as nursery:
            for user in range(30, 50):  # more than there are threads
                nursery.start_soon(enter, user)
        assert watch.net < 3.5
        watch = Stopwatch()
        await enter(60)
        assert watch.net < 0.5
        health = (await http(gateway.port, "/ws/health")).json
        assert health["status"] == "degraded"
        server.thaw()
        await until(partial(_no_query_hangs, gateway))


async def test_sectors_are_queried_when_a_database_that_was_down_at_start_is_up(
    redis_url: str, backend: "redis.Redis", tmp_path: Path
) -> None:
    file = tmp_path / "late.db"
    settings = make_settings(
        redis_url, database_url=f"sqlite:///{file}", circuit_recovery_timeout=0.2
    )
    async with (
        running(settings) as gateway,
        admitted(gateway.staff_url("waiter", sector_ids=[9])) as client,
    ):
        assert await received_sectors(gateway, backend, client) == {9}
        assert not file.exists()  # reading does not create it
        database = Database(f"sqlite:///{file}").create()
        database.assign(5)
        await until(partial(_nothing_is_pending, gateway), 12)
        assert await received_sectors(gateway, backend, client) == {5}


async def test_gateway_starts_with_an_unreachable_database(
    redis_url: str, backend: "redis.Redis"
) -> None:
    url = f"postgresql://gateway:word@127.0.0.1:{free_port()}/backend"
    settings = make_settings(redis_url, database_url=url)
    async with (
        running(settings) as gateway,
        admitted(gateway.staff_url("waiter", sector_ids=[9])) as client,
    ):
        assert await received_sectors(gateway, backend, client) == {9}
        assert (await http(gateway.port, "/ws/health/ready")).status == 200


async def test_wrong_password_is_not_logged(redis_url: str, server: Postgres) -> None:
    port, secret = free_port(), "a-Wrong-Word-4711"
    env = environment(redis_url, DATABASE_URL=server.url_with(secret), LOG_LEVEL="debug")
    arguments = ("trio_gateway", "serve", "-b", f"127.0.0.1:{port}")
    async with process(*arguments, env=env, port=port) as gateway:
        token = make_jwt(JWT_SECRET, sector_ids=[9])
        async with admitted(f"ws://127.0.0.1:{port}/ws/waiter?token={token}") as client:
            await client.send_message("refresh_sectors")
            assert await received_texts(client) == ["sectors_updated:9"]
            health = (await http(port, "/ws/health/detailed")).text
        gateway.terminate()
        status, out, err = await wait(gateway)
    assert status == 0
    said = (out + err).decode()
    assert "sectors not known" in said
    for words in (said, health):
        assert secret not in words
        assert server.password not in words


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s3cret", "is not driver://user:password@host:port/database"),
        ("postgresql://user:s3cret@host:s3cret/db", "is not driver://user:password@host:port"),
        ("oracel://user:s3cret@host/db", "names a database that SQLAlchemy does not know"),
        ("mysql+pymysql://user:s3cret@host/db", "needs a driver that is not installed"),
        ("postgresql+psycopg_async://user:s3cret@host/db", "names a driver for asyncio"),
        ("sqlite+aiosqlite:///s3cret", "needs a driver that is not installed"),
    ],
)
async def test_unusable_database_url_is_refused_without_showing_it(url: str, words: str) -> None:
    with pytest.raises(InvalidSettings) as caught:
        create_app(make_settings("redis://localhost", database_url=url))
    (problem,) = caught.value.problems
    assert problem.startswith(f"DATABASE_URL {words}")
    assert "s3cret" not in problem


async def test_missing_psycopg_is_reported_with_its_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ValueError, match=r"pip install 'trio-gateway\[postgres\]'"):
        SectorDatabase("postgres://user:word@host/db", "rota", {})


def test_invalid_database_url_stops_the_start() -> None:
    done = run("serve", env={"DATABASE_URL": "postgresql://u:s3cret@host:s3cret/db"})
    assert done.exit_code == 2
    assert "DATABASE_URL" in done.stderr
    assert "s3cret" not in done.output


@pytest.mark.chaos
async def test_invalid_database_url_stops_the_start_of_hypercorn() -> None:
    env = environment("redis://localhost", DATABASE_URL="postgresql://u:s3cret@host:s3cret/db")
    async with process("trio_gateway.app", env=env) as gateway:
        status, out, err = await wait(gateway)
    assert status == 2
    assert "DATABASE_URL" in err.decode()
    assert b"s3cret" not in out + err


async def test_invalid_sector_in_the_database_is_a_failed_query(
    tmp_path: Path,
) -> None:
    database = Database(f"sqlite:///{tmp_path / 'odd.db'}").create()
    database.assign(5)
    with database.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE waiter_sector_assignment SET sector_id = 'five'")
    with roster_of(database) as (_, assignments):
        with pytest.raises(QueryFailed):
            await assignments.of(WAITER_21, today())
        assert assignments.failures == 1
