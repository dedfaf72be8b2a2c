"""``Settings``: the values, checked together, and the objects that are made from them."""

import hmac
import os
import secrets
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Self

from pydantic import model_validator

from ..core.api_keys import ApiKey, InvalidApiKeys, read_api_keys
from ..core.claims import Rules
from ..core.routes_file import InvalidRoutes, read_routes
from ..core.routing import ROUTES, Routing
from ..core.service_day import ServiceDays, read_windows, read_zone, read_zones
from ..core.shards import Sharding
from ..core.signatures import Key
from ..keys import MIN_SECRET_BYTES, algorithms_of, public_keys
from .checks import problems_of, sharding_of, warnings_of
from .values import HMAC, SettingValues

# An environment variable of the workers: the seed of their common random secrets.
DEVELOPMENT_SECRET: Final = "TRIO_GATEWAY_DEVELOPMENT_SECRET"  # noqa: S105 - a name
SECTOR_COLUMNS = (
    "tenant_id", "branch_id", "sector_id", "waiter_id", "assignment_date", "shift", "is_active",
)  # fmt: skip


class InvalidSettings(ValueError):  # noqa: N818 - reads better where it is raised
    """The gateway can't start with these settings.

    ``problems`` has one text for each problem; it names the setting and says what is wrong.
    """

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class Settings(SettingValues):
    """The settings of a gateway (contract, section 6).

    ``Settings(...)`` takes keyword arguments by the settings' names in lower case;
    :func:`load_settings` also reads ``.env``.
    """

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = problems_of(self)
        # Make them now, so that a mistake in one of them prevents the start.
        for name in ("routes", "api_keys", "staff_keys", "service_days", "sector_column_names"):
            try:
                getattr(self, name)
            except InvalidSettings as error:
                problems += error.problems
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @cached_property
    def sharding(self) -> Sharding:
        """In which streams the events of a tenant are."""
        return sharding_of(self)

    @cached_property
    def routes(self) -> Routing:
        """The routing table in force."""
        if self.ws_routes_file is None:
            return ROUTES
        try:
            return read_routes(_text("WS_ROUTES_FILE", self.ws_routes_file))
        except InvalidRoutes as error:
            raise InvalidSettings([f"WS_ROUTES_FILE {self.ws_routes_file}: {error}"]) from None

    @cached_property
    def api_keys(self) -> tuple[ApiKey, ...]:
        """The keys of backends in ``WS_API_KEYS_FILE`` at the start; empty without that file."""
        if self.ws_api_keys_file is None:
            return ()
        try:
            return read_api_keys(_text("WS_API_KEYS_FILE", self.ws_api_keys_file))
        except InvalidApiKeys as error:
            raise InvalidSettings([f"WS_API_KEYS_FILE {self.ws_api_keys_file}: {error}"]) from None

    @cached_property
    def staff_secret(self) -> str:
        """``JWT_SECRET``, or in development a random secret that no token was signed with yet."""
        return self.jwt_secret or _random_secret("staff")

    @cached_property
    def table_secret(self) -> str:
        """``TABLE_TOKEN_SECRET``, or in development a random secret."""
        return self.table_token_secret or _random_secret("table")

    @cached_property
    def staff_keys(self) -> tuple[Key, ...]:
        """The keys that staff tokens may be signed with."""
        keys = []
        if hmacs := tuple(name for name in self.jwt_algorithms if name in HMAC):
            keys = [Key(s, hmacs) for s in (self.staff_secret, self.jwt_secret_previous) if s]
        if self.jwt_public_key:
            keys += [
                Key(public_key, tuple(sorted(fitting)))
                for public_key in _read_public_keys(self.jwt_public_key)
                if (fitting := algorithms_of(public_key) & set(self.jwt_algorithms))
            ]
        return tuple(keys)

    @cached_property
    def table_keys(self) -> tuple[Key, ...]:
        """The keys that table tokens may be signed with."""
        secrets = (self.table_secret, self.table_token_secret_previous)
        return tuple(Key(secret, ("HS256",)) for secret in secrets if secret)

    @cached_property
    def rules(self) -> Rules:
        """What a staff token must satisfy besides its signature."""
        return Rules(issuer=self.jwt_issuer, audience=self.jwt_audience, leeway=self.jwt_leeway)

    @cached_property
    def service_days(self) -> ServiceDays:
        """The time zones, the cutoff and the shifts that decide which assignments are in force."""
        problems = []
        zone, zones, windows = ServiceDays().zone, {}, {}
        try:
            zone = read_zone(self.service_time_zone)
        except ValueError as error:
            problems.append(f"SERVICE_TIME_ZONE: {error}")
        try:
            zones = dict(read_zones(self.service_time_zones))
        except ValueError as error:
            problems.append(f"SERVICE_TIME_ZONES: {error}")
        try:
            windows = dict(read_windows(self.shift_windows))
        except ValueError as error:
            problems.append(f"SHIFT_WINDOWS: {error}")
        if problems:
            raise InvalidSettings(problems)
        return ServiceDays(zone, zones, self.service_day_cutoff, windows)

    @cached_property
    def sector_column_names(self) -> Mapping[str, str]:
        """The columns of the sector table that have names of their own, by our names."""
        found = {}
        for item in self.sector_columns:
            name, equals, called = item.partition("=")
            if not equals or not called or name not in SECTOR_COLUMNS:
                known = ", ".join(SECTOR_COLUMNS)
                raise InvalidSettings(
                    [f"SECTOR_COLUMNS: {item} is not name=column (names: {known})"]
                )
            found[name] = called
        return found

    @property
    def has_cluster(self) -> bool:
        """Whether the processes on the same Redis know each other."""
        return self.ws_cluster or self.ws_api_keys_file is not None

    @property
    def production(self) -> bool:
        """Whether ``ENVIRONMENT`` is ``production``."""
        return self.environment == "production"

    @property
    def json_logs(self) -> bool:
        """Whether logs are JSON: ``LOG_FORMAT``, and in production by default."""
        return (self.log_format or ("json" if self.production else "console")) == "json"

    @property
    def warnings(self) -> list[str]:
        """Problems that do not prevent the start, as texts for operators."""
        return warnings_of(self)


def _random_secret(kind: str) -> str:
    """A random secret; all workers of a supervisor have the same one."""
    seed = os.environ.get(DEVELOPMENT_SECRET)
    if seed is None:
        return secrets.token_urlsafe(MIN_SECRET_BYTES)
    return hmac.new(seed.encode(), kind.encode(), "sha256").hexdigest()


def _text(name: str, path: Path) -> str:
    """The text of the file that a setting names."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise InvalidSettings([f"{name} {path}: {reason}"]) from None


def _read_public_keys(text: str) -> list[Any]:
    try:
        return public_keys(text)
    except ValueError as error:
        raise InvalidSettings([f"JWT_PUBLIC_KEY {error}"]) from None
