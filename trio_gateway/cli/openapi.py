"""``openapi``: print the API for backends as an OpenAPI document."""

import click

from .errors import settings_or_exit


@click.command()
def openapi() -> None:
    """Print the API for backends as an OpenAPI 3.1 document, like GET /ws/openapi.json."""
    import json

    from ..web.openapi import describe

    click.echo(json.dumps(describe(settings_or_exit()), indent=2, ensure_ascii=False))
