"""The backend's SQL database: which waiter serves which sector on a day."""

import math
from collections.abc import Mapping
from datetime import date
from typing import Any, Final, NamedTuple, Protocol, TypeGuard
from urllib.parse import quote

import sqlalchemy
import trio
from sqlalchemy import column, select, table
from sqlalchemy.engine import URL, Engine, make_url

from ..core.audiences import BranchId, SectorId, TenantId, UserId
from ..core.events import MAX_ID
from ..settings import SECTOR_COLUMNS

TIMEOUT: Final = 2.0  # seconds for one query
_THREADS: Final = 4


class WaiterKey(NamedTuple):
    """A waiter in a branch."""

    tenant: TenantId
    branch: BranchId
    user: UserId


Assignments = frozenset[tuple[SectorId, str | None]]  # sectors and shifts of one day


class QueryFailed(Exception):  # noqa: N818 - an outcome
    """The database failed or timed out."""


class AssignmentSource(Protocol):
    """A source of sector assignments. ``queries`` and ``failures`` count so far."""

    queries: int
    failures: int

    async def of(self, waiter: WaiterKey, day: date, /) -> Assignments:
        """Return a waiter's assignments on a day. Raises :exc:`QueryFailed`."""

    def close(self) -> None:
        """Release resources; no query follows."""


class SectorDatabase:
    """The table of assignments in the backend's database.

    Queries run in threads of their own with a deadline, so that a hung database neither blocks
    the event loop nor uses up Trio's threads. ``name`` is the table, perhaps with its schema;
    ``columns`` maps names of :data:`SECTOR_COLUMNS` to other column names.

    Raises :exc:`ValueError` if the URL is unusable. No message contains the password.
    """

    def __init__(self, url: str, name: str, columns: Mapping[str, str]) -> None:
        self._engine = _engine(url)
        schema, _, bare = name.rpartition(".")
        called = {key: columns.get(key, key) for key in SECTOR_COLUMNS}
        self._table = table(bare, *map(column, called.values()), schema=schema or None)
        self._columns = {key: self._table.c[called[key]] for key in SECTOR_COLUMNS}
        self._limiter = trio.CapacityLimiter(_THREADS)
        self.queries = 0
        self.failures = 0

    def close(self) -> None:
        """Close the idle connections."""
        self._engine.dispose()

    async def of(self, key: WaiterKey, day: date) -> Assignments:
        """Return a waiter's assignments on a day. Raises :exc:`QueryFailed`."""
        if int(key.user) > MAX_ID:
            return frozenset()
        self.queries += 1
        rows: Assignments | None = None
        try:
            with trio.move_on_after(TIMEOUT):
                rows = await trio.to_thread.run_sync(
                    self._query, key, day, abandon_on_cancel=True, limiter=self._limiter
                )
        except (sqlalchemy.exc.SQLAlchemyError, OSError, ValueError) as error:
            self.failures += 1
            raise QueryFailed(type(error).__name__) from None
        if rows is None:
            self.failures += 1
            raise QueryFailed(f"no answer in {TIMEOUT:g} s")
        return rows

    def _query(self, key: WaiterKey, day: date) -> Assignments:
        at = self._columns
        query = select(at["sector_id"], at["shift"]).where(
            at["tenant_id"] == key.tenant,
            at["branch_id"] == key.branch,
            at["waiter_id"] == int(key.user),
            at["assignment_date"] == sqlalchemy.literal(day, sqlalchemy.Date),
            at["is_active"] == sqlalchemy.literal(True, sqlalchemy.Boolean),
            at["sector_id"].is_not(None),
        )
        with self._engine.connect() as connection:
            return frozenset(
                (SectorId(int(sector)), None if shift is None else str(shift))
                for sector, shift in connection.execute(query)
            )


def _engine(url: str) -> Engine:
    try:
        parsed = make_url(url)
        if parsed.drivername in {"postgresql", "postgres"}:
            parsed = parsed.set(drivername="postgresql+psycopg")
        if parsed.drivername in {"sqlite", "sqlite+pysqlite"} and _names_a_file(parsed.database):
            # Otherwise SQLite creates a missing file.
            parsed = parsed.set(database="file:" + quote(parsed.database))
            parsed = parsed.update_query_dict({"mode": "rw", "uri": "true"})
        engine = sqlalchemy.create_engine(parsed, pool_pre_ping=True, **_options(parsed))
    except ImportError:
        remedy = (
            " (pip install 'trio-gateway[postgres]')"
            if parsed.drivername == "postgresql+psycopg"
            else ""
        )
        raise ValueError(f"needs a driver that is not installed{remedy}") from None
    except sqlalchemy.exc.NoSuchModuleError:
        raise ValueError("names a database that SQLAlchemy does not know") from None
    except (sqlalchemy.exc.ArgumentError, ValueError):
        raise ValueError("is not driver://user:password@host:port/database") from None
    if engine.dialect.is_async:
        raise ValueError(f"names a driver for asyncio: {parsed.drivername}")
    if engine.dialect.name == "sqlite":

        @sqlalchemy.event.listens_for(engine, "connect")
        def read_only(connection: Any, _record: Any) -> None:
            connection.execute("PRAGMA query_only = ON")

    return engine


def _names_a_file(database: str | None) -> TypeGuard[str]:
    return bool(database) and database != ":memory:" and not str(database).startswith("file:")


def _options(url: URL) -> dict[str, Any]:
    """Set every deadline that the driver supports, so that no thread outlives its query."""
    if url.drivername.startswith("sqlite"):
        return {"connect_args": {"timeout": TIMEOUT}}
    if url.drivername != "postgresql+psycopg":
        return _POOL
    given = url.normalized_query.get("options", ())
    ours = f"-c statement_timeout={int(TIMEOUT * 1000)} -c default_transaction_read_only=on"
    return _POOL | {
        "connect_args": {
            "connect_timeout": math.ceil(TIMEOUT),
            "tcp_user_timeout": int(TIMEOUT * 1000),
            "options": " ".join((*given, ours)),
        }
    }


_POOL: Final[dict[str, Any]] = {"pool_size": _THREADS, "max_overflow": 0, "pool_timeout": TIMEOUT}
