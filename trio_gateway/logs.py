"""Logs: structlog set up once. JSON in production, colours on a terminal, never a secret."""

import logging
import re
import sys
from typing import Any, Final

import msgspec
import structlog

from .settings import Settings

# Tokens stand in query strings, in Authorization headers, in subprotocols, or bare.
_SECRETS: Final = re.compile(
    r"(?P<query>\b(?:table_token|token|ticket)(?:=|\\?[\"']\s*:\s*)\\?[\"']?)[^&\s\"'#\\]+"
    r"|(?P<bearer>\bbearer(?: +|\.))[^\s,\"']+"
    r"|\beyJ[\w-]*\.[\w-]*\.?[\w-]*"
    r"|\b\d+:\d+:\d+:\d+:\d+:[0-9a-f]{32}\b"
    r"|(?P<url>\b\w+://[^\s/@:]*:)[^\s/]+(?=@)",
    re.IGNORECASE,
)
_GONE: Final = "[redacted]"


def redact(text: str) -> str:
    """The text without anything that looks like a credential."""

    def replace(match: re.Match[str]) -> str:
        return (match["query"] or match["bearer"] or match["url"] or "") + _GONE

    return _SECRETS.sub(replace, text)


def _redacted(_logger: Any, _method: str, event: structlog.types.EventDict) -> dict[str, Any]:
    return {key: _clean(value) for key, value in event.items()}


def _clean(value: object) -> object:
    match value:
        case str():  # a lone surrogate would be no UTF-8, and a log call must not fail
            return redact(value).encode(errors="backslashreplace").decode()
        case None | bool() | int() | float():
            return value
        case dict():
            return {_clean(str(key)): _clean(each) for key, each in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_clean(each) for each in value]
    return _clean(repr(value))


class _Redact(logging.Filter):
    """For loggers of the libraries, Hypercorn's access log among them."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redact(record.getMessage()), None
        if record.exc_info:
            record.exc_text = redact(logging.Formatter().formatException(record.exc_info))
        return True


def set_up(settings: Settings) -> None:
    """Set up structlog, and redaction for what libraries log by themselves."""
    processors: list[structlog.types.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if settings.json_logs:
        processors += [
            structlog.processors.format_exc_info,
            _redacted,
            structlog.processors.JSONRenderer(serializer=_to_json),
        ]
    else:
        processors += [
            structlog.processors.format_exc_info,
            _redacted,
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()),
        ]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(settings.log_level),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )
    for name in ("hypercorn.access", "hypercorn.error", "trio_gateway.gateway"):
        logger = logging.getLogger(name)
        if not any(isinstance(each, _Redact) for each in logger.filters):
            logger.addFilter(_Redact())


def _to_json(event: Any, **_: Any) -> str:
    return msgspec.json.encode(event).decode()
