"""How a command ends when it can't go on: one line on stderr, and a status."""

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
    """Ends the command with this line and status."""

    def __init__(self, message: str, status: int = FAILED) -> None:
        super().__init__(message)
        vars(self)["exit_code"] = status  # a class variable in click's eyes

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(printable(f"trio-gateway: {self.message}", lines=True), file=file, err=True)


def settings_or_exit() -> "Settings":
    """The settings, or exit status 2 with a line per problem."""
    from ..settings import InvalidSettings, load_settings

    try:
        return load_settings()
    except InvalidSettings as invalid:
        misused(invalid.problems)


def misused(problems: Iterable[str]) -> NoReturn:
    """Exit with a line per problem."""
    for problem in problems:
        click.echo(printable(f"trio-gateway: {problem}", lines=True), err=True)
    sys.exit(MISUSED)
