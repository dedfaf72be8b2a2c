"""Credentials: tokens for trials, signed with the gateway's own secrets."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from .errors import MISUSED, Failure

if TYPE_CHECKING:
    from ..core.claims import Rules
    from ..settings import Settings

F = TypeVar("F", bound=Callable[..., Any])

LIFE: Final = 3600  # seconds
ENDPOINTS: Final = ("waiter", "kitchen", "admin", "diner")


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """The holder of a token. Staff have user, roles and sectors; diners have table and session."""

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
    secret: str, identity: Identity, *, algorithm: str = "HS256", rules: "Rules | None" = None
) -> str:
    """Mint a staff JWT with the issuer and audience of ``rules``."""
    from ..core.minting import mint, staff_claims

    claims = staff_claims(
        tenant=identity.tenant,
        user=identity.user,
        branches=identity.branches,
        roles=identity.roles,
        sectors=identity.sectors,
        rules=rules,
    )
    return mint(claims | _lifetime(identity), secret, algorithm)


def table_token(secret: str, identity: Identity) -> str:
    """Mint a table token, for the diners of a session."""
    from ..core.minting import mint, table_claims

    claims = table_claims(
        tenant=identity.tenant,
        branch=identity.branches[0],
        table=identity.table,
        session=identity.session,
    )
    return mint(claims | _lifetime(identity), secret)


def legacy_token(secret: str, identity: Identity) -> str:
    """Mint a legacy table token."""
    from ..core.minting import mint_legacy_table_token

    return mint_legacy_table_token(
        secret,
        tenant=identity.tenant,
        branch=identity.branches[0],
        table=identity.table,
        session=identity.session,
        expires_at=int(time.time()) + identity.life,
    )


def _lifetime(identity: Identity) -> dict[str, Any]:
    from ..core.minting import lifetime

    token_id = {} if identity.token_id is None else {"jti": identity.token_id}
    return lifetime(time.time(), identity.life) | token_id


def staff_token_by(settings: "Settings", identity: Identity) -> str:
    """Mint a staff token that a gateway with these settings accepts. Raises :exc:`Failure`."""
    from ..core.minting import signing_algorithm

    algorithm = signing_algorithm(settings.jwt_algorithms)
    if algorithm is None:
        names = ", ".join(settings.jwt_algorithms)
        raise Failure(
            f"can't mint a staff token: JWT_ALGORITHMS is {names}, and the private key is not here"
            " (only HS256, HS384 and HS512 sign with JWT_SECRET)",
            MISUSED,
        )
    secret = _secret("JWT_SECRET", settings.jwt_secret)
    return staff_token(secret, identity, algorithm=algorithm, rules=settings.rules)


def table_token_by(settings: "Settings", identity: Identity) -> str:
    """Mint a table token that a gateway with these settings accepts. Raises :exc:`Failure`."""
    return table_token(_secret("TABLE_TOKEN_SECRET", settings.table_token_secret), identity)


def legacy_token_by(settings: "Settings", identity: Identity) -> str:
    """Mint a legacy table token with the secret of these settings. Raises :exc:`Failure`."""
    return legacy_token(_secret("TABLE_TOKEN_SECRET", settings.table_token_secret), identity)


def _secret(name: str, value: str | None) -> str:
    if value is None:
        raise Failure(
            f"{name} is not set: set it to the gateway's value, in the environment or in .env",
            MISUSED,
        )
    return value


def _id(least: int = 1) -> dict[str, Any]:
    """The arguments of an option that is an id, with the range of the contract."""

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
    """The options that describe the holder of a token."""
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
