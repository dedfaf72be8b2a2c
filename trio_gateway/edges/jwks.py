"""JWKS: the public keys of whoever issues the staff tokens, fetched and kept (RFC 7517)."""

import json
import time
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from typing import Any, Final
from urllib.error import HTTPError

import jwt
import structlog
import trio

from ..core.closing import Close, Rejected
from ..core.tokens import Key
from ..keys import SIGNATURES, algorithms_of

log = structlog.get_logger()

TIMEOUT: Final = 3.0  # seconds for one fetch
AT_MOST_EVERY: Final = 60.0  # seconds between two fetches, once there are keys
_MAX_BYTES: Final = 1 << 20
_CHUNK: Final = 1 << 16


class KeySet:
    """The keys behind a URL. Fetched when first needed, and again for a key id it does not have,
    but at most once a minute: a token with a made-up ``kid`` costs nothing.

    A fetch runs in a thread, and nobody waits for it whose key is there. It goes on when the
    client that caused it leaves: else clients that leave at once could keep new keys out.
    """

    def __init__(self, url: str, algorithms: Sequence[str]) -> None:
        self._url = url
        self._algorithms = SIGNATURES & frozenset(algorithms)
        self._limiter = trio.CapacityLimiter(1)
        self._fetched_at = float("-inf")
        self._fetching: trio.Event | None = None
        self.keys: tuple[Key, ...] | None = None  # None before the first success
        self.fetches = 0

    async def keys_for(self, algorithm: str | None, key_id: str | None) -> tuple[Key, ...]:
        """The keys that a token with this algorithm and id may be signed with.

        Raises :exc:`Rejected` as SERVER_OVERLOADED while there are none at all.
        """
        if algorithm not in self._algorithms:  # a shared secret's, or nobody's
            return ()
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
        pause = TIMEOUT if self.keys is None else AT_MOST_EVERY
        if trio.current_time() - self._fetched_at < pause:
            return
        self._fetched_at = trio.current_time()
        self._fetching = trio.Event()
        self.fetches += 1
        try:
            text: bytes | None = None
            with trio.move_on_after(TIMEOUT, shield=True):
                text = await trio.to_thread.run_sync(
                    _get, self._url, abandon_on_cancel=True, limiter=self._limiter
                )
            if text is None:
                raise TimeoutError
            self.keys = self._read(text)
            log.info("keys fetched", keys=len(self.keys))
        except (OSError, HTTPException, ValueError, RecursionError) as error:
            log.warning("keys not fetched", error=type(error).__name__)
        finally:
            self._fetching.set()
            self._fetching = None

    def _read(self, text: bytes) -> tuple[Key, ...]:
        """The keys of a set that we can use; raises :exc:`ValueError` if there are none."""
        key_set = json.loads(text)
        listed = key_set.get("keys") if isinstance(key_set, dict) else None
        if not isinstance(listed, list):
            raise ValueError("not a key set")
        found = [key for each in listed if (key := self._read_key(each)) is not None]
        if not found:
            raise ValueError("no key of ours")
        return tuple(found)

    def _read_key(self, listed: Any) -> Key | None:
        """One that others put there for others (RFC 7517, 5), or that is broken, spoils nothing."""
        try:
            read = jwt.PyJWK(listed)
        except (jwt.PyJWTError, AttributeError, LookupError, TypeError, ValueError):
            return None
        if read.public_key_use not in {None, "sig"}:
            return None
        # A symmetric key in a public set is nobody's secret: algorithms_of knows none.
        fitting = [
            algorithm
            for algorithm in sorted(algorithms_of(read.key) & self._algorithms)
            if listed.get("alg") in (None, algorithm)
        ]
        return Key(read.key, tuple(fitting), read.key_id) if fitting else None


def _get(url: str) -> bytes:
    """Whatever there is; ``urlopen`` bounds the wait for each piece, this bounds all of them."""
    until = time.monotonic() + TIMEOUT
    request = urllib.request.Request(url, headers={"Accept": "application/json"})  # noqa: S310
    found = b""
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:  # noqa: S310
            while chunk := response.read1(_CHUNK):
                found += chunk
                if len(found) > _MAX_BYTES or time.monotonic() > until:
                    raise ValueError("too much, or too slowly")
    except HTTPError as error:
        error.close()  # it is the response, too
        raise
    return found
