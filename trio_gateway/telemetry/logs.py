"""Logs: the set-up of structlog. JSON in production, colours on a terminal, never a secret.

A log call never raises. With the streams of :mod:`.output` it never blocks either.
"""

import logging
import os
import re
import sys
from contextlib import suppress
from typing import Any, Final

import hypercorn.logging
import msgspec
import quart.logging
import structlog
from hypercorn.config import Config

from ..core.printable import printable
from ..settings import Settings
from . import output

# Tokens occur in query strings, in Authorization headers, in subprotocols, or alone.
_SECRETS: Final = re.compile(
    r"(?P<query>\b(?:table_token|token|ticket)(?:=|\\?[\"']\s*:\s*)\\?[\"']?)[^&\s\"'#\\]+"
    r"|(?P<bearer>\bbearer(?: +|\.))[^\s,\"']+"
    r"|\beyJ[\w-]*\.[\w-]*\.?[\w-]*"
    r"|\b\d+:\d+:\d+:\d+:\d+:[0-9a-f]{32}\b"
    r"|(?P<url>\b\w+://[^\s/@:]*:)[^\s/]+(?=@)",
    re.IGNORECASE,
)
_REDACTED: Final = "[redacted]"
_MULTILINE: Final = frozenset({"exception", "stack"})
# JSON needs no escape for these, but a terminal that shows the line does.
_NOT_ASCII_CONTROLS: Final = str.maketrans(
    {code: printable(chr(code)) for code in range(0x7F, 0x2070)}
)


def redact(text: str) -> str:
    """Replace everything in a text that looks like a credential."""

    def replace(match: re.Match[str]) -> str:
        return (match["query"] or match["bearer"] or match["url"] or "") + _REDACTED

    return _SECRETS.sub(replace, text)


def _redacted(_logger: Any, _method: str, event: structlog.types.EventDict) -> dict[str, Any]:
    return {key: _clean(value) for key, value in event.items()}


def _escaped(_logger: Any, _method: str, event: structlog.types.EventDict) -> dict[str, Any]:
    return {
        key: printable(value, lines=key in _MULTILINE) if isinstance(value, str) else value
        for key, value in event.items()
    }


def _clean(value: object) -> object:
    try:
        match value:
            case str():  # a lone surrogate cannot be encoded as UTF-8
                return redact(value).encode(errors="backslashreplace").decode()
            case None | bool() | int() | float():
                return value
            case dict():
                return {_clean(str(key)): _clean(each) for key, each in value.items()}
            case list() | tuple() | set() | frozenset():
                return [_clean(each) for each in value]
        return _clean(repr(value))
    except Exception as error:
        return f"({type(value).__name__} that can't be logged: {type(error).__name__})"


class _Redact(logging.Filter):
    """Redacts the records of library loggers, such as Hypercorn's access log."""

    def filter(self, record: logging.LogRecord) -> bool:
        try:
            record.msg, record.args = printable(redact(record.getMessage())), None
            if record.exc_info:
                text = redact(logging.Formatter().formatException(record.exc_info))
                record.exc_text = printable(text, lines=True)
        except Exception as error:
            record.msg = f"(a record that can't be logged: {type(error).__name__})"
            record.args = record.exc_info = None
        return True


def _never_raising(base: type[Any]) -> type[Any]:
    """Make a logger whose calls never raise; an entry that can't be rendered loses its fields."""

    class Logger(base):  # type: ignore[misc]
        def _proxy_to_logger(self, method_name: str, event: Any = None, **fields: Any) -> Any:
            try:
                return super()._proxy_to_logger(method_name, event, **fields)
            except Exception as error:
                with suppress(Exception):
                    return super()._proxy_to_logger(
                        method_name, _clean(event), not_logged=type(error).__name__
                    )

    return Logger


def set_up(settings: Settings) -> None:
    """Set up structlog, and redaction for the log lines of libraries."""
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
            _escaped,
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()),
        ]
    structlog.configure(
        processors=processors,
        wrapper_class=_never_raising(structlog.make_filtering_bound_logger(settings.log_level)),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )
    for name in ("hypercorn.access", "hypercorn.error", "trio_gateway.gateway"):
        logger = logging.getLogger(name)
        if not any(isinstance(each, _Redact) for each in logger.filters):
            logger.addFilter(_Redact())
    if isinstance(sys.stderr, output.LineStream):
        quart.logging.default_handler.setStream(sys.stderr)  # it still has the stream of its import
    output.announce_by(_log_dropped)


class HypercornLogger(hypercorn.logging.Logger):
    """Hypercorn's logs, without blocking on their files (``accesslog = "/dev/stdout"``, a pipe)."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        for logger in (self.access_logger, self.error_logger):
            for handler in logger.handlers if logger is not None else ():
                if type(handler) is logging.FileHandler:  # not those that rotate files
                    _detach(handler)

    async def access(self, *arguments: Any) -> None:
        with suppress(Exception):  # for example a query that is not UTF-8
            await super().access(*arguments)


def _detach(handler: logging.FileHandler) -> None:
    """Write a handler's file from a separate thread."""
    file: Any = handler.stream
    if not isinstance(file, output.LineStream):
        stream: Any = output.stream_to(os.dup(file.fileno()))
        handler.setStream(stream)
        file.close()


def _log_dropped(lines: int) -> None:
    structlog.get_logger().warning("log lines dropped", lines=lines)


def _to_json(event: Any, **_: Any) -> str:
    text = msgspec.json.encode(event, enc_hook=str).decode()
    plain = text.isascii() and "\x7f" not in text
    return text if plain else text.translate(_NOT_ASCII_CONTROLS)
