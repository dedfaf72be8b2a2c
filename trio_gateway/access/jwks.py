"""JWKS: fetch and cache the public keys of the issuer of staff tokens (RFC 7517)."""

import hashlib
import json
import time
import urllib.request
from collections import OrderedDict
from collections.abc import Sequence
from http.client import HTTPException
from typing import Any, Final
from urllib.error import HTTPError

import jwt
import structlog
import trio

from ..core.close_codes import Close, Rejected
from ..core.limits import RateLimit
from ..core.signatures import Key
from ..keys import SIGNATURES, algorithms_of

log = structlog.get_logger()

TIMEOUT: Final = 3.0  # seconds for one fetch
# Seconds in which unknown key ids cause one fetch, and tokens whose key may have changed under its
# id cause _MOST_CHANGED. A failed fetch is retried after TIMEOUT.
AT_MOST_EVERY: Final = 60.0
_MOST_CHANGED: Final = 3
_MOST_PRESENTED: Final = 10_000  # tokens to remember
_REMEMBERED: Final = 180.0  # seconds to remember each
_MAX_BYTES: Final = 1 << 20
_CHUNK: Final = 1 << 16


class KeySet:
    """The keys at a URL.

    They are fetched when first needed, and again for a token that none of them has signed: its
    key may be newer. Two rates bound the fetches that invented keys can cause, one for ids that
    are not in the set and one for keys that may have changed under their id, so that neither kind
    of token can use up the fetches of the other.

    A fetch runs in a thread; clients whose key is known do not wait for it. It continues when the
    client that caused it disconnects: otherwise clients that disconnect at once could keep new
    keys out.
    """

    def __init__(self, url: str, algorithms: Sequence[str]) -> None:
        self._url = url
        self._algorithms = SIGNATURES & frozenset(algorithms)
        self._limiter = trio.CapacityLimiter(1)
        self._failed_at = float("-inf")  # when the last failed fetch began
        self._fetching: trio.Event | None = None
        self._unknown = RateLimit(1, AT_MOST_EVERY)
        self._changed = RateLimit(_MOST_CHANGED, AT_MOST_EVERY)
        # Tokens that no key has signed, by hash: when each was first presented, and the number of
        # successful fetches before that.
        self._presented: OrderedDict[bytes, tuple[float, int]] = OrderedDict()
        self.keys: tuple[Key, ...] | None = None  # None before the first success
        self.fetches = 0
        self.successes = 0  # of these

    async def keys_for(self, algorithm: str | None) -> tuple[Key, ...]:
        """Return the known keys that may have signed a token with this algorithm.

        Raises :exc:`Rejected` as SERVER_OVERLOADED while no key is known.
        """
        if algorithm not in self._algorithms:  # one of shared secrets, or unknown
            return ()
        if self.keys is None:
            await self._fetch(self._unknown)
        return self._known()

    async def look_up(self, token: str, key_id: str | None, presented: int) -> tuple[Key, ...]:
        """Return the keys as fetched after this token, which no key has signed, was presented.

        ``presented`` is the value of :attr:`successes` when it was presented. Raises
        :exc:`Rejected` as SERVER_OVERLOADED if there was no fetch since its first presentation: a
        token must not be called invalid before its key was looked up.
        """
        presented = self._first_presented(token, presented)
        if self.successes == presented:
            known = key_id is None or any(key.id == key_id for key in self._known())
            await self._fetch(self._changed if known else self._unknown)
        if self.successes == presented:
            raise _unavailable()
        return self._known()

    def _known(self) -> tuple[Key, ...]:
        if self.keys is None:
            raise _unavailable()
        return self.keys

    def _first_presented(self, token: str, presented: int) -> int:
        """Remember by token, not by key id: anybody can invent an id before it is in use."""
        digest = hashlib.sha256(token.encode(errors="replace")).digest()
        now = trio.current_time()
        at, first = self._presented.setdefault(digest, (now, presented))
        if now - at > _REMEMBERED:  # the fetch for it is too long ago
            self._presented[digest] = now, presented
            return presented
        if len(self._presented) > _MOST_PRESENTED:
            self._presented.popitem(last=False)
        return first

    async def _fetch(self, rate: RateLimit) -> None:
        """Fetch the keys, or wait for the fetch in progress. Does nothing over the rate."""
        if self._fetching is not None:
            await self._fetching.wait()
            return
        now = trio.current_time()
        if rate.is_full(now) or now - self._failed_at < TIMEOUT:
            return
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
            self.successes += 1
            rate.exceeded(now)
            log.info("keys fetched", keys=len(self.keys))
        except (OSError, HTTPException, ValueError, RecursionError) as error:
            self._failed_at = now
            log.warning("keys not fetched", error=type(error).__name__)
        finally:
            self._fetching.set()
            self._fetching = None

    def _read(self, text: bytes) -> tuple[Key, ...]:
        """Return the usable keys of a set. Raises :exc:`ValueError` if there are none."""
        key_set = json.loads(text)
        listed = key_set.get("keys") if isinstance(key_set, dict) else None
        if not isinstance(listed, list):
            raise ValueError("not a key set")
        found = [key for each in listed if (key := self._read_key(each)) is not None]
        if not found:
            raise ValueError("no key of ours")
        return tuple(found)

    def _read_key(self, listed: Any) -> Key | None:
        """Return a key, or None if it is malformed or for another purpose (RFC 7517, 5)."""
        try:
            read = jwt.PyJWK(listed)
        except (jwt.PyJWTError, AttributeError, LookupError, TypeError, ValueError):
            return None
        if read.public_key_use not in {None, "sig"}:
            return None
        # A symmetric key in a public set is not secret: algorithms_of() returns none for it.
        fitting = [
            algorithm
            for algorithm in sorted(algorithms_of(read.key) & self._algorithms)
            if listed.get("alg") in (None, algorithm)
        ]
        return Key(read.key, tuple(fitting), read.key_id) if fitting else None


def _unavailable() -> Rejected:
    return Rejected(Close.SERVER_OVERLOADED, "can't check the token now", "dependency")


def _get(url: str) -> bytes:
    """Return the body at a URL within TIMEOUT; ``urlopen`` bounds only the wait for each piece."""
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
