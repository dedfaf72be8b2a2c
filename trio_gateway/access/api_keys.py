"""The API keys in force: which one a secret is of, and how often each may be used."""

from collections.abc import Sequence
from hashlib import sha256
from hmac import compare_digest
from pathlib import Path
from typing import Final, NoReturn

import structlog
import trio

from ..core.api_keys import ApiKey, InvalidApiKeys, read_api_keys
from ..core.limits import Allowance

log = structlog.get_logger()

LOOK_EVERY: Final = 5.0  # seconds from one look at the file to the next
_ROUNDING: Final = 1e-9  # of a request
_MOST_CHARACTERS: Final = 1 << 20  # of the file


class ApiKeys:
    """The keys of the file at ``path``; ``keys`` is what it contained at the start.

    The file is read again while :meth:`run` runs, so a key is added or withdrawn without a
    restart. While the file is invalid, the last valid keys stay in force.
    """

    def __init__(self, path: Path, keys: Sequence[ApiKey]) -> None:
        self._path = path
        self._use(keys)

    def _use(self, keys: Sequence[ApiKey]) -> None:
        self._keys = tuple(keys)
        # A second's requests at once, and then at the key's rate.
        self._allowances = {key: Allowance(max(1.0, key.rate), key.rate) for key in keys}

    def find(self, secret: str | None) -> ApiKey | None:
        """The key with this secret, or None. Takes as long for any secret."""
        # A header's text has one character for each byte.
        digest = sha256((secret or "").encode("latin-1", "replace")).digest()
        found = None
        for key in self._keys:
            if compare_digest(key.digest, digest):
                found = key
        return found

    def try_use(self, key: ApiKey, now: float) -> bool:
        """Count a request; False if the key is over its rate. ``now`` is on Trio's clock."""
        allowance = self._allowances.get(key)
        if allowance is None:  # withdrawn since it was found
            return True
        if allowance.left(key, now) < 1 - _ROUNDING:
            return False
        allowance.use(key, 1, now)
        return True

    async def run(self, every: float = LOOK_EVERY) -> NoReturn:
        """Look at the file at this interval (seconds); returns only when cancelled."""
        text, problem = "", ""  # what was looked at last, and what was wrong with it
        while True:
            try:
                found = await trio.to_thread.run_sync(self._read, abandon_on_cancel=True)
                if found != text:
                    text = found
                    keys = await trio.to_thread.run_sync(read_api_keys, text)
                    if keys != self._keys:
                        self._change(keys)
                    problem = ""
            except (OSError, ValueError) as error:
                text = "" if isinstance(error, OSError) else text
                if (reason := _reason(error)) != problem:
                    problem = reason
                    log.error("API keys not read: the last valid ones stay", error=reason)
            await trio.sleep(every)

    def _read(self) -> str:
        with self._path.open(encoding="utf-8") as file:
            return file.read(_MOST_CHARACTERS)

    def _change(self, keys: Sequence[ApiKey]) -> None:
        was, now = ({key.name for key in each} for each in (self._keys, keys))
        self._use(keys)
        log.info("API keys changed", added=sorted(now - was), removed=sorted(was - now))


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return str(error) if isinstance(error, InvalidApiKeys) else "not UTF-8"
