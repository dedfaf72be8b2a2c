"""The command line. Each command imports what it needs when it runs, so ``--help`` is fast."""

import errno
import os
from typing import Any

import click

from .. import __version__
from ..telemetry import output
from .asyncapi import asyncapi
from .check import check
from .completion import completion
from .demo import demo
from .dlq import dlq
from .errors import Failure, settings_or_exit
from .explain import explain
from .kick import kick
from .nodes import nodes
from .openapi import openapi
from .publish import publish
from .rebalance import rebalance
from .receipts import receipts
from .routes import routes
from .serve import serve
from .slo import slo
from .tail import tail
from .token import token
from .who import who
from .why import why

__all__ = ["main", "settings_or_exit"]


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        # Messages on stderr never make a command fail. stdout is not replaced: the output must be
        # complete, and a full pipe may delay it.
        output.replace("stderr")
        return super().main(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            # Otherwise Python writes its buffer at exit, and prints a second error.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            raise Failure(f"can't write: {error.strerror}") from None


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="trio-gateway")
def main() -> None:
    """A real-time gateway: events from Redis to the clients that may receive them.

    Settings come from the environment and from .env (docs/operations.md).
    """


for command in (
    serve, demo, token, publish, tail, routes, asyncapi, openapi, explain, check, dlq, rebalance,
    nodes, who, kick, receipts, why, slo, completion,
):  # fmt: skip
    main.add_command(command)
