"""``asyncapi``: print the contract as an AsyncAPI document."""

import click

from .errors import settings_or_exit


@click.command()
def asyncapi() -> None:
    """Print the contract as an AsyncAPI 3 document, like GET /ws/asyncapi.json."""
    import json

    from ..web.asyncapi import describe

    click.echo(json.dumps(describe(settings_or_exit()), indent=2, ensure_ascii=False))
