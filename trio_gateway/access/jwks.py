"""JWKS: the public keys of whoever issues the staff tokens, fetched and kept (RFC 7517)."""

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
from ..core.tokens import Key
from ..keys import SIGNATURES, algorithms_of

log = structlog.get_logger()

TIMEOUT: Final = 3.0  # seconds for one fetch
# Seconds in which key ids that are not in the set cause one fetch, and tokens whose key may have
# changed under its id cause _MOST_CHANGED. One that failed is tried again after TIMEOUT.
AT_MOST_EVERY: Final = 60.0
_MOST_CHANGED: Final = 3
_MOST_PRESENTED: Final = 10_000  # tokens that are remembered, each for so many seconds:
_REMEMBERED: Final = 180.0
_MAX_BYTES: Final = 1 << 20
_CHUNK: Final = 1 << 16


class KeySet:
    """The keys behind a URL. Fetched when first needed, and again for a token that none of them
    has signed: its key may be newer than they are.

    A token with a made-up key costs no more than the fetches that the rates allow. There is one
    rate for ids that are not in the set and another for keys that may have changed under their
    id, so that neither kind of token can use up what the other needs.

    A fetch runs in a thread, and nobody waits for it whose key is there. It goes on when the
    client that caused it leaves: else clients that leave at once could keep new keys out.
    """

    def __init__(self, url: str, algorithms: Sequence[str]) -> None:
        self._url = url
        self._algorithms = SIGNATURES & frozenset(algorithms)
        self._limiter = trio.CapacityLimiter(1)
        self._failed_at = float("-inf")  # when the last fetch that failed had begun
        self._fetching: trio.Event | None = None
        self._unknown = RateLimit(1, AT_MOST_EVERY)
        self._changed = RateLimit(_MOST_CHANGED, AT_MOST_EVERY)
        # Tokens that no key has signed, by their hashes: when, and after how many fetches, each
        # was first presented.
        self._presented: OrderedDict[bytes, tuple[float, int]] = OrderedDict()
        self.keys: tuple[Key, ...] | None = None  # None before the first success
        self.fetches = 0
        self.successes = 0  # of these

    async def keys_for(self, algorithm: str | None) -> tuple[Key, ...]:
        """The keys that a token with this algorithm may be signed with, as far as they are known.

        Raises :exc:`Rejected` as SERVER_OVERLOADED while there are none at all.
        """
        if algorithm not in self._algorithms:  # a shared secret's, or nobody's
            return ()
        if self.keys is None:
            await self._fetch(self._unknown)
        return self._known()

    async def look_up(self, token: str, key_id: str | None, presented: int) -> tuple[Key, ...]:
        """The keys, fetched since this token, which none had signed, was first presented.

        ``presented`` is what :attr:`successes` was at that moment. Raises :exc:`Rejected` as
        SERVER_OVERLOADED while there was no fetch since then: nobody may be told that a token is
        invalid before the key was looked up.
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
        """By the token and not by its key id: somebody else can make up an id before it is used."""
        digest = hashlib.sha256(token.encode(errors="replace")).digest()
        now = trio.current_time()
        at, first = self._presented.setdefault(digest, (now, presented))
        if now - at > _REMEMBERED:  # what was looked up for it is old
            self._presented[digest] = now, presented
            return presented
        if len(self._presented) > _MOST_PRESENTED:
            self._presented.popitem(last=False)
        return first

    async def _fetch(self, rate: RateLimit) -> None:
        """Fetch the keys, or wait for the fetch in progress; not at all if it is too soon."""
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


def _unavailable() -> Rejected:
    return Rejected(Close.SERVER_OVERLOADED, "can't check the token now", "dependency")


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
