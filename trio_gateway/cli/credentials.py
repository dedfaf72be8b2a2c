"""Credentials: tokens minted from the gateway's own secrets, for trying things out."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from .errors import MISUSED, Failure

if TYPE_CHECKING:
    from ..core.tokens import Rules
    from ..settings import Settings

F = TypeVar("F", bound=Callable[..., Any])

LIFE: Final = 3600  # seconds
ENDPOINTS: Final = ("waiter", "kitchen", "admin", "diner")


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Whom a token is for; a staff member's part, a diner's part, and what both have."""

    tenant: int = 1
    branches: Sequence[int] = (1,)
    user: int = 21
    roles: Sequence[str] = ("WAITER",)
    sectors: Sequence[int] = ()
    table: int = 10
    session: int = 456
    life: int = LIFE
    token_id: str | None = None


def staff_token(
    secret: str, who: Identity, *, algorithm: str = "HS256", rules: "Rules | None" = None
) -> str:
    """A staff JWT. It satisfies the issuer and audience of ``rules``."""
    from ..core.minting import mint, staff_claims

    claims = staff_claims(
        tenant=who.tenant,
        user=who.user,
        branches=who.branches,
        roles=who.roles,
        sectors=who.sectors,
        rules=rules,
    )
    return mint(claims | _lifetime(who), secret, algorithm)


def table_token(secret: str, who: Identity) -> str:
    """A table token: for the diners of a session."""
    from ..core.minting import mint, table_claims

    claims = table_claims(
        tenant=who.tenant, branch=who.branches[0], table=who.table, session=who.session
    )
    return mint(claims | _lifetime(who), secret)


def legacy_token(secret: str, who: Identity) -> str:
    """A legacy table token."""
    from ..core.minting import mint_legacy_table_token

    return mint_legacy_table_token(
        secret,
        tenant=who.tenant,
        branch=who.branches[0],
        table=who.table,
        session=who.session,
        expires_at=int(time.time()) + who.life,
    )


def _lifetime(who: Identity) -> dict[str, Any]:
    from ..core.minting import lifetime

    token_id = {} if who.token_id is None else {"jti": who.token_id}
    return lifetime(time.time(), who.life) | token_id


def staff_token_by(settings: "Settings", who: Identity) -> str:
    """A staff token that a gateway with these settings accepts, or :exc:`Failure`."""
    from ..core.minting import signing_algorithm

    algorithm = signing_algorithm(settings.jwt_algorithms)
    if algorithm is None:
        names = ", ".join(settings.jwt_algorithms)
        raise Failure(
            f"can't mint a staff token: JWT_ALGORITHMS is {names}, whose private key is not here"
            " (only HS256, HS384 and HS512 sign with JWT_SECRET)",
            MISUSED,
        )
    secret = _secret("JWT_SECRET", settings.jwt_secret)
    return staff_token(secret, who, algorithm=algorithm, rules=settings.rules)


def table_token_by(settings: "Settings", who: Identity) -> str:
    return table_token(_secret("TABLE_TOKEN_SECRET", settings.table_token_secret), who)


def legacy_token_by(settings: "Settings", who: Identity) -> str:
    return legacy_token(_secret("TABLE_TOKEN_SECRET", settings.table_token_secret), who)


def _secret(name: str, value: str | None) -> str:
    if value is None:
        raise Failure(
            f"{name} is not set: set it to what the gateway has, in the environment or in .env",
            MISUSED,
        )
    return value


def _id(least: int = 1) -> dict[str, Any]:
    """An option's number, as the contract has them."""

    def check(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
        for each in value if isinstance(value, tuple) else (value,):
            if not least <= each < 2**63:
                raise click.BadParameter(f"{each} is not in the range {least} to 2^63-1.")
        return value

    return {"type": int, "metavar": "ID", "callback": check}


def _several(default: Iterable[Any]) -> dict[str, Any]:
    return {"multiple": True, "default": tuple(default), "show_default": True}


_TENANT: Final = click.option("--tenant", **_id(), default=1, show_default=True)
_BRANCHES: Final = click.option(
    "--branch", "branches", **_id(), **_several([1]), help="Repeatable."
)
_STAFF: Final = (
    click.option("--user", **_id(0), default=21, show_default=True),
    click.option(
        "--role", "roles", **_several(()), help="WAITER, KITCHEN, MANAGER or ADMIN; repeatable."
    ),
    click.option("--sector", "sectors", **_id(), multiple=True, help="Repeatable."),
)
_DINER: Final = (
    click.option("--table", **_id(), default=10, show_default=True),
    click.option("--session", **_id(), default=456, show_default=True),
)


_BRANCH: Final = click.option("--branch", **_id(), default=1, show_default=True)
_STAFF_LIFE: Final = click.option(
    "--life", type=int, default=LIFE, show_default=True, metavar="SECONDS", help="iat to exp."
)
_TABLE_LIFE: Final = click.option(
    "--life",
    type=click.IntRange(max=3 * 3600),
    default=LIFE,
    show_default=True,
    metavar="SECONDS",
    help="iat to exp; 3 hours at most.",
)


def identity_options(*, staff: bool = False, diner: bool = False) -> Callable[[F], F]:
    """The options that say whom a token is for."""
    options = (
        _TENANT,
        _BRANCHES if staff else _BRANCH,
        *(_STAFF if staff else ()),
        *(_DINER if diner else ()),
        _STAFF_LIFE if staff else _TABLE_LIFE,
    )

    def add(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return add
