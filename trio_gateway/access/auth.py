"""Auth: find out from its credential who a client is."""

import time
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from ..core.audiences import Endpoint, Principal
from ..core.claims import Rules
from ..core.close_codes import Close, Rejected, auth_failed
from ..core.signatures import Key, Unverified, names_of
from ..core.tokens import (
    Staff,
    Table,
    check_claims,
    read_jwt,
    read_legacy_table_token,
    read_table_token,
)
from .jwks import KeySet
from .verified_tokens import VerifiedTokens

Clock = Callable[[], float]


class Auth(Protocol):
    """A way to authenticate clients. Implement it to replace ours (``create_app(auth=...)``)."""

    async def authenticate(self, credential: str, endpoint: Endpoint) -> Principal:
        """Return the principal to which a credential belongs, on this endpoint.

        ``credential`` is the token that the client sent, when it connected, in a renewal or in
        an HTTP request; empty if it sent none. A ticket has been replaced by its token.
        Raises :exc:`Rejected`: ``Close.AUTH_FAILED`` for an invalid credential,
        ``Close.FORBIDDEN`` for a valid one that has no access to this endpoint, and
        ``Close.SERVER_OVERLOADED`` if it cannot be checked now.
        """


@runtime_checkable
class ImmediateAuth(Auth, Protocol):
    """A way to authenticate that mostly has nothing to wait for."""

    def authenticate_nowait(self, credential: str, endpoint: Endpoint) -> Principal | None:
        """As :meth:`Auth.authenticate`, but return None if it would have to wait."""


class JwtAuth:
    """Authenticates by a staff JWT, signed with one of the keys or with one of the key set."""

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
        self._verified: VerifiedTokens[Staff] = VerifiedTokens()

    async def authenticate(self, credential: str, endpoint: Endpoint) -> Principal:
        if (found := self.authenticate_nowait(credential, endpoint)) is not None:
            return found
        assert self._key_set is not None
        token = await self._look_up(credential, self._key_set)
        self._verified.add(self._verified.key_of(credential), token, self._key_set.keys)
        return token.on(endpoint)

    def authenticate_nowait(self, credential: str, endpoint: Endpoint) -> Principal | None:
        public = None if self._key_set is None else self._key_set.keys
        now, key = self._clock(), self._verified.key_of(_required(credential))
        token = self._verified.get(key, now, public)
        if token is None:
            if self._key_set is not None:
                return None
            token = read_jwt(credential, self._keys, self._rules, now)
            self._verified.add(key, token)
        return token.on(endpoint)

    async def _look_up(self, credential: str, key_set: KeySet) -> Staff:
        """Read a token with the keys of a key set, which may have to be fetched."""
        algorithm, key_id = names_of(credential)
        presented = key_set.successes
        public = await key_set.keys_for(algorithm)
        try:
            return read_jwt(credential, self._keys + public, self._rules, self._clock())
        except Unverified:
            if not public:
                raise
            check_claims(credential, self._rules, self._clock())
        # Only keys that were fetched after the token was presented can prove it invalid.
        public = await key_set.look_up(credential, key_id, presented)
        return read_jwt(credential, self._keys + public, self._rules, self._clock())


class TableAuth:
    """Authenticates by a table token."""

    def __init__(self, keys: Sequence[Key], rules: Rules, clock: Clock = time.time) -> None:
        self._keys = keys
        self._rules = rules
        self._clock = clock
        self._verified: VerifiedTokens[Table] = VerifiedTokens()

    async def authenticate(self, credential: str, endpoint: Endpoint) -> Principal:
        return self.authenticate_nowait(credential, endpoint)

    def authenticate_nowait(self, credential: str, endpoint: Endpoint) -> Principal:
        now, key = self._clock(), self._verified.key_of(_required(credential))
        token = self._verified.get(key, now)
        if token is None:
            token = read_table_token(credential, self._keys, self._rules, now)
            self._verified.add(key, token)
        return token.on(endpoint)


class LegacyTableAuth:
    """Authenticates by a legacy table token, ``tenant:branch:table:session:expires_at:sig``."""

    def __init__(self, secret: str, clock: Clock = time.time) -> None:
        self._secret = secret
        self._clock = clock

    async def authenticate(self, credential: str, endpoint: Endpoint) -> Principal:
        token = read_legacy_table_token(_required(credential), self._secret, self._clock())
        return token.on(endpoint)


class FirstOf:
    """Authenticates by the first method that succeeds. If all fail, the first failure counts."""

    def __init__(self, *methods: Auth) -> None:
        self._methods = methods

    async def authenticate(self, credential: str, endpoint: Endpoint) -> Principal:
        first: Rejected | None = None
        for method in self._methods:
            try:
                return await method.authenticate(credential, endpoint)
            except Rejected as rejected:
                if rejected.close is not Close.AUTH_FAILED:
                    raise
                first = first or rejected
        assert first is not None
        raise first


def _required(credential: str) -> str:
    if not credential:
        raise auth_failed("token missing")
    return credential
