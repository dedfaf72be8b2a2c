"""The report of ``check``: one line for each result, and how to fix a problem."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import click

from ..core.printable import printable

if TYPE_CHECKING:
    from ..broker.connection import RedisConnection

REPLY_TIMEOUT: Final = 3.0  # seconds for one reply

_NO_ANSWER: Final = (
    "check that this is Redis, and firewalls; write rediss… in REDIS_URL if, and only if, the port"
    " speaks TLS"
)
_CERTIFICATES: Final = (
    "name the CA in REDIS_URL (ssl_ca_certs), and let certificates be valid for the hosts or IP"
    " addresses by which the servers are reached"
)
_CLIENT_CERTIFICATE: Final = (
    "name a client certificate that Redis accepts in REDIS_URL: ssl_certfile and ssl_keyfile"
)
_CLOSED: Final = (
    "check that this is Redis, and whether it requires TLS (rediss://) or a client certificate"
    " (ssl_certfile, ssl_keyfile)"
)
# A part of an error's text, and its remedy; the first match counts.
_REMEDIES: Final = (
    ("CERTIFICATE_VERIFY_FAILED", _CERTIFICATES),
    ("CERTIFICATE_REQUIRED", _CLIENT_CERTIFICATE),  # with TLS 1.3, after the handshake
    ("UNKNOWN_CA", _CLIENT_CERTIFICATE),  # in an alert of the server
    ("WRONG_VERSION_NUMBER", "the server speaks no TLS on this port: write redis… for rediss…"),
    ("Connection refused", "start Redis there, or set REDIS_URL to its address"),
    ("Name or service not known", "set REDIS_URL to a host that can be resolved"),
    # A port without TLS says nothing to a handshake, for which it waits for the end of a line.
    ("no answer", _NO_ANSWER),
    ("can't connect", "set REDIS_URL to the address of Redis, and check firewalls"),
    ("not RESP", "the server there is not Redis: set REDIS_URL"),
    ("NOAUTH", "Redis requires a password: REDIS_URL=redis://:PASSWORD@host:port"),
    ("WRONGPASS", "the user or the password in REDIS_URL is wrong"),
    ("AUTH failed", "Redis has no password: remove it from REDIS_URL"),
    ("SELECT failed: NOPERM", "allow this user: ACL SETUSER … +select"),
    ("SELECT failed", "the database number in REDIS_URL is too high"),
    ("is a replica", "set REDIS_URL to a name that resolves to the primary"),
    ("closed by Redis", _CLOSED),
    ("receive failed", _CLOSED),
)  # fmt: skip


class Report:
    """Prints one line for each result, and counts the problems.

    ``about`` is what the lines begin with. A ``quiet`` report prints no result that is as it
    should be.
    """

    def __init__(self, about: str = "", *, quiet: bool = False) -> None:
        self.problems = 0
        self._about = about
        self._quiet = quiet
        self._parent: Report | None = None

    def part(self, about: str, *, quiet: bool) -> "Report":
        """A report about a part, whose problems count here, too."""
        found = Report(f"{about}: ", quiet=quiet)
        found._parent = self
        return found

    def ok(self, text: str) -> None:
        """This is as it should be."""
        if not self._quiet:
            self._say("ok", self._about + text, fg="green")

    def warn(self, text: str) -> None:
        """This works, but it should be known."""
        self._say("warning", self._about + text, fg="yellow")

    def fail(self, text: str, remedy: str) -> None:
        """This is a problem; ``remedy`` says what to do."""
        self._count()
        self._say("error", self._about + text, fg="red", bold=True)
        self._say("", f"fix: {remedy}")

    def fail_to_connect(self, problem: str) -> None:
        """A server cannot be used, for this reason."""
        remedy = next((remedy for sign, remedy in _REMEDIES if sign in problem), None)
        self.fail(problem, remedy or "see the log of Redis")

    def _count(self) -> None:
        self.problems += 1
        if self._parent is not None:
            self._parent._count()

    def _say(self, label: str, text: str, **style: Any) -> None:
        click.echo(click.style(f"{label:<9}", **style) + printable(text))

    @contextmanager
    def trying(self, text: str, remedy: str, *more: str) -> Iterator[None]:
        """Report whether the block raises :exc:`ConnectionLost`.

        ``remedy`` is for a missing permission, ``more`` for any other problem.
        """
        from ..runtime.supervision import ConnectionLost

        try:
            yield
        except ConnectionLost as lost:
            problem = str(lost)
            if "NOPERM" in problem:
                self.fail(f"{text}: {problem}", remedy)
            else:
                self.fail(f"{text}: {problem}", next(iter(more), "see the log of Redis"))
        else:
            self.ok(text)


async def call(redis: "RedisConnection", *words: str | int, unless: tuple[str, ...] = ()) -> Any:
    """Send a command and return its reply, or None for an error that contains one of ``unless``.

    Raises :exc:`ConnectionLost` for any other error.
    """
    import trio

    from ..runtime.supervision import ConnectionLost

    reply: Any = None
    with trio.move_on_after(REPLY_TIMEOUT) as scope:
        reply = await redis.ask(*words)
        if isinstance(reply, Exception):
            if not any(sign in str(reply) for sign in unless):
                raise ConnectionLost(f"{words[0]!s} failed: {str(reply).split(' ', 1)[0]}")
            reply = None
    if scope.cancelled_caught:
        raise ConnectionLost(f"no answer in {REPLY_TIMEOUT:g} s")
    return reply


class Asking:
    """Sends commands to a server; ``accepted`` are error replies that are as good as a reply."""

    def __init__(self, redis: "RedisConnection", accepted: Sequence[str]) -> None:
        self._redis = redis
        self._accepted = tuple(accepted)

    async def call(self, *words: str | int, unless: str | None = None) -> Any:
        """Raises :exc:`ConnectionLost` for an error reply that is not accepted."""
        more = () if unless is None else (unless,)
        return await call(self._redis, *words, unless=self._accepted + more)
