"""Errors of commands: one line on stderr and an exit status."""

import sys
from collections.abc import Iterable
from typing import IO, TYPE_CHECKING, Any, NoReturn

import click

from ..core.printable import printable

if TYPE_CHECKING:
    from ..settings import Settings

FAILED = 1
MISUSED = 2  # usage and settings


class Failure(click.ClickException):
    """Ends the command with this message and exit status."""

    def __init__(self, message: str, status: int = FAILED) -> None:
        super().__init__(message)
        vars(self)["exit_code"] = status  # click declares it as a class variable

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(printable(f"trio-gateway: {self.message}", lines=True), file=file, err=True)


def settings_or_exit() -> "Settings":
    """Return the settings, or exit with status 2 and one line per problem."""
    from ..settings import InvalidSettings, load_settings

    try:
        return load_settings()
    except InvalidSettings as invalid:
        misused(invalid.problems)


def misused(problems: Iterable[str]) -> NoReturn:
    """Exit with status 2 and one line per problem."""
    for problem in problems:
        click.echo(printable(f"trio-gateway: {problem}", lines=True), err=True)
    sys.exit(MISUSED)
