"""Auth: who a client is, by its origin and its credential."""

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from ..core.audiences import Principal
from ..core.close_codes import Close, Rejected
from ..core.origins import is_loopback, normalise
from ..core.tokens import (
    Key,
    Rules,
    Staff,
    Unverified,
    check_claims,
    names_of,
    read_jwt,
    read_legacy_table_token,
    read_table_token,
)
from ..transports.handshake import Handshake
from .addresses import host_of
from .jwks import KeySet

Clock = Callable[[], float]


class Auth(Protocol):
    """A way to authenticate clients."""

    async def authenticate(self, handshake: Handshake) -> Principal:
        """Return who this is, or raise :exc:`Rejected`."""


class JwtAuth:
    """By a staff JWT, signed with one of some keys, or of a key set."""

    def __init__(
        self,
        keys: Sequence[Key],
        rules: Rules,
        clock: Clock = time.time,
        key_set: KeySet | None = None,
    ) -> None:
        self._keys = tuple(keys)
        self._rules = rules
        self._clock = clock
        self._key_set = key_set

    async def authenticate(self, handshake: Handshake) -> Principal:
        token = await self._read(_credential(handshake))
        return token.on(handshake.endpoint)

    async def _read(self, credential: str) -> Staff:
        if self._key_set is None:
            return read_jwt(credential, self._keys, self._rules, self._clock())
        algorithm, key_id = names_of(credential)
        presented = self._key_set.successes
        public = await self._key_set.keys_for(algorithm)
        try:
            return read_jwt(credential, self._keys + public, self._rules, self._clock())
        except Unverified:
            if not public:
                raise
            check_claims(credential, self._rules, self._clock())
        # "Invalid" is said only by keys that were fetched after the token was presented.
        public = await self._key_set.look_up(credential, key_id, presented)
        return read_jwt(credential, self._keys + public, self._rules, self._clock())


class TableAuth:
    """By a table token."""

    def __init__(self, keys: Sequence[Key], rules: Rules, clock: Clock = time.time) -> None:
        self._keys = keys
        self._rules = rules
        self._clock = clock

    async def authenticate(self, handshake: Handshake) -> Principal:
        token = read_table_token(_credential(handshake), self._keys, self._rules, self._clock())
        return token.on(handshake.endpoint)


class LegacyTableAuth:
    """By a table token of the older kind, ``tenant:branch:table:session:expires_at:sig``."""

    def __init__(self, secret: str, clock: Clock = time.time) -> None:
        self._secret = secret
        self._clock = clock

    async def authenticate(self, handshake: Handshake) -> Principal:
        token = read_legacy_table_token(_credential(handshake), self._secret, self._clock())
        return token.on(handshake.endpoint)


class FirstOf:
    """By the first of several ways that does not fail; the first one's failure if all do."""

    def __init__(self, *ways: Auth) -> None:
        self._ways = ways

    async def authenticate(self, handshake: Handshake) -> Principal:
        first: Rejected | None = None
        for way in self._ways:
            try:
                return await way.authenticate(handshake)
            except Rejected as rejected:
                if rejected.close is not Close.AUTH_FAILED:
                    raise
                first = first or rejected
        assert first is not None
        raise first


def check_origin(origin: str | None, allowed: Sequence[str], *, required: bool) -> None:
    """Raise :exc:`Rejected` unless a browser on this origin may connect (RFC 6455, 10.2).

    ``allowed`` are origins as :func:`~..core.origins.normalise` writes them, or ``*``.
    """
    if origin is None:
        if required:
            raise Rejected(Close.POLICY_VIOLATION, "origin required", "origin")
        return
    try:
        origin = normalise(origin)
    except ValueError:
        raise Rejected(Close.FORBIDDEN, "origin malformed", "origin") from None
    if "*" not in allowed and origin not in allowed:
        raise Rejected(Close.POLICY_VIOLATION, "origin not allowed", "origin")


def is_own_page(handshake: Handshake) -> bool:
    """Whether a browser on this very machine comes from a page that this gateway has served.

    Names that anybody can point here are none of this machine's (DNS rebinding).
    """
    host = handshake.headers.get("host", "")
    if handshake.origin is None or not is_loopback(host_of(host)):
        return False
    try:
        return normalise(handshake.origin) in {
            normalise(f"http://{host}"),
            normalise(f"https://{host}"),
        }
    except ValueError:
        return False


def _credential(handshake: Handshake) -> str:
    if not (token := handshake.credential):
        raise Rejected(Close.AUTH_FAILED, "token missing", "auth")
    return token
