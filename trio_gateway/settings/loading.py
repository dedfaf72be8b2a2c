"""Loading: the settings from the environment and from ``.env``."""

import difflib
import os
from typing import Final

from dotenv import dotenv_values
from pydantic import ValidationError

from .settings import InvalidSettings, Settings

NAMES: Final = frozenset(name.upper() for name in Settings.model_fields)


def load_settings(env_file: str = ".env") -> Settings:
    """Read the settings from the environment, and those it does not set from ``env_file``.

    Raises :exc:`InvalidSettings` for invalid values, for unknown names that begin with ``WS_``, and
    for what production requires. No text contains the value of a secret.
    """
    try:
        in_file = dotenv_values(env_file)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise InvalidSettings([f"{env_file}: {reason}"]) from None
    problems = [_unknown(name) for name in sorted({*os.environ, *in_file})]
    problems = [problem for problem in problems if problem]
    try:
        settings = Settings(_env_file=env_file)  # type: ignore[call-arg]  # pydantic-settings takes it
    except ValidationError as error:
        raise InvalidSettings(problems + _explain(error)) from None
    if problems:
        raise InvalidSettings(problems)
    return settings


def _unknown(name: str) -> str:
    """The problem with a name that begins with ``WS_`` and is not a setting, or ``""``."""
    if not name.upper().startswith("WS_") or name.upper() in NAMES:
        return ""
    close = difflib.get_close_matches(name.upper(), NAMES, n=1)
    return f"unknown setting: {name}" + (f" (did you mean {close[0]}?)" if close else "")


def _explain(error: ValidationError) -> list[str]:
    problems = []
    for each in error.errors(include_url=False, include_input=False, include_context=False):
        text = each["msg"].removeprefix("Value error, ")
        where = "_".join(str(part) for part in each["loc"][:1]).upper()
        problems += [f"{where}: {text}"] if where else text.splitlines()
    return problems
