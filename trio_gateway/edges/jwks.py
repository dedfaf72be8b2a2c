"""JWKS: the public keys of whoever issues the staff tokens, fetched and kept (RFC 7517)."""

import urllib.request
from collections.abc import Sequence
from typing import Any, Final

import jwt
import structlog
import trio

from ..core.closing import Close, Rejected
from ..core.tokens import Key
from ..settings import algorithms_of

log = structlog.get_logger()

TIMEOUT: Final = 3.0  # seconds for one fetch
AT_MOST_EVERY: Final = 60.0  # seconds between two fetches
_MAX_BYTES: Final = 1 << 20


class KeySet:
    """The keys behind a URL. Fetched when first needed, and again for a key id it does not have,
    but at most once a minute: a token with a made-up ``kid`` costs nothing.

    A fetch runs in a thread, and nobody waits for it whose key is there.
    """

    def __init__(self, url: str, algorithms: Sequence[str]) -> None:
        self._url = url
        self._algorithms = frozenset(algorithms)
        self._limiter = trio.CapacityLimiter(1)
        self._fetched_at = float("-inf")
        self._fetching: trio.Event | None = None
        self.keys: tuple[Key, ...] | None = None  # None before the first success
        self.fetches = 0

    async def keys_for(self, key_id: str | None) -> tuple[Key, ...]:
        """The keys that a token with this id may be signed with.

        Raises :exc:`Rejected` as SERVER_OVERLOADED while there are none at all.
        """
        known = self.keys
        if known is None or (key_id is not None and all(key.id != key_id for key in known)):
            await self._fetch()
        if self.keys is None:
            raise Rejected(Close.SERVER_OVERLOADED, "can't check the token now", "dependency")
        return self.keys

    async def _fetch(self) -> None:
        if self._fetching is not None:
            await self._fetching.wait()
            return
        if trio.current_time() - self._fetched_at < AT_MOST_EVERY and self.keys is not None:
            return
        if trio.current_time() - self._fetched_at < TIMEOUT:  # it failed just now
            return
        self._fetched_at = trio.current_time()
        self._fetching = trio.Event()
        self.fetches += 1
        try:
            text: bytes | None = None
            with trio.move_on_after(TIMEOUT):
                text = await trio.to_thread.run_sync(
                    _get, self._url, abandon_on_cancel=True, limiter=self._limiter
                )
            if text is None:
                raise TimeoutError
            self.keys = self._read(text)
            log.info("keys fetched", keys=len(self.keys))
        except (OSError, ValueError, jwt.PyJWTError) as error:
            log.warning("keys not fetched", error=type(error).__name__)
        finally:
            self._fetching.set()
            self._fetching = None

    def _read(self, text: bytes) -> tuple[Key, ...]:
        found = []
        for key in jwt.PyJWKSet.from_json(text.decode()).keys:
            if key.public_key_use not in {None, "sig"}:
                continue
            # A symmetric key in a public set is nobody's secret: algorithms_of knows none.
            fitting = algorithms_of(key.key) & self._algorithms
            if fitting:
                found.append(Key(key.key, tuple(sorted(fitting)), key.key_id))
        return tuple(found)


def _get(url: str) -> bytes:
    request = urllib.request.Request(url, headers={"Accept": "application/json"})  # noqa: S310
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:  # noqa: S310 - the operator's
        found: Any = response.read(_MAX_BYTES)
        return bytes(found)
