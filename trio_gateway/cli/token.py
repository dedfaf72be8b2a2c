"""``token``: mint a token and print it alone, for use in ``$(…)``."""

from collections.abc import Sequence

import click

from .credentials import (
    Identity,
    identity_options,
    legacy_token_by,
    staff_token_by,
    table_token_by,
)
from .errors import settings_or_exit

_TOKEN_ID = click.option("--jti", "token_id", help="The token's id; it can be revoked by this id.")


@click.group()
def token() -> None:
    """Mint a token for trials, with JWT_SECRET or TABLE_TOKEN_SECRET."""


@token.command()
@identity_options(staff=True)
@_TOKEN_ID
def staff(
    tenant: int,
    branches: Sequence[int],
    user: int,
    roles: Sequence[str],
    sectors: Sequence[int],
    life: int,
    token_id: str | None,
) -> None:
    """A staff JWT, for /ws/waiter, /ws/kitchen and /ws/admin  [role: WAITER]."""
    identity = Identity(
        tenant=tenant,
        branches=branches,
        user=user,
        roles=roles or ("WAITER",),
        sectors=sectors,
        life=life,
        token_id=token_id,
    )
    click.echo(staff_token_by(settings_or_exit(), identity))


@token.command()
@identity_options(diner=True)
@_TOKEN_ID
def table(
    tenant: int, branch: int, table: int, session: int, life: int, token_id: str | None
) -> None:
    """A table token, for /ws/diner."""
    identity = Identity(
        tenant=tenant,
        branches=(branch,),
        table=table,
        session=session,
        life=life,
        token_id=token_id,
    )
    click.echo(table_token_by(settings_or_exit(), identity))


@token.command()
@identity_options(diner=True)
def legacy(tenant: int, branch: int, table: int, session: int, life: int) -> None:
    """A legacy table token, tenant:branch:table:session:expires_at:sig."""
    identity = Identity(tenant=tenant, branches=(branch,), table=table, session=session, life=life)
    settings = settings_or_exit()
    minted = legacy_token_by(settings, identity)
    if not settings.allow_legacy_table_tokens:
        click.echo(
            "trio-gateway: gateways accept legacy tokens only with ALLOW_LEGACY_TABLE_TOKENS=true",
            err=True,
        )
    click.echo(minted)
