"""Tracing (the extra ``otel``): a span for each event, from its receipt to its last write.

This module is imported only if ``WS_TRACING`` is on. OpenTelemetry's own ``OTEL_*`` variables
configure where spans are sent, and which share of them.
"""

import logging
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import msgspec
import structlog
import trio
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from .. import __version__
from ..core.events import Event
from ..core.routing import ROUTES, Routing
from ..runtime.throttled_log import ThrottledLog

log = structlog.get_logger()

LAST_FLUSH: Final = 2.0  # seconds to export the remaining spans when the gateway stops

# https://www.w3.org/TR/trace-context/#traceparent-header, 3.2.2
_TRACEPARENT: Final = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_LATER_VERSION: Final = re.compile(
    r"(?!00|ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?"
)

_BEGIN: Final = Context()
Observe = Callable[[Sequence[Event], float], None]


class _Carrier(msgspec.Struct, gc=False):
    traceparent: Any = None


_decode: Final = msgspec.json.Decoder(_Carrier).decode


class Tracing:
    """Makes the spans. ``processor`` receives each span when it has ended, and must not block."""

    def __init__(self, processor: SpanProcessor, routes: Routing = ROUTES) -> None:
        # A provider of our own: other users of OpenTelemetry in this process have theirs.
        self._provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("trio_gateway", __version__)
        self._routes = routes

    def observe(self, events: Sequence[Event], ended: float) -> None:
        """Make a span for each delivered event; ``ended`` is the present on Trio's clock."""
        now = time.time_ns()
        for event in events:
            origin = read_traceparent(event.payload)
            span = self._tracer.start_span(
                f"deliver {event.type}" if event.type in self._routes else "deliver",
                # Without a traceparent a new trace begins, whatever the current one is.
                _BEGIN
                if origin is None
                else trace.set_span_in_context(trace.NonRecordingSpan(origin), _BEGIN),
                trace.SpanKind.CONSUMER,
                self._attributes(event),
                [] if origin is None else [trace.Link(origin)],
                start_time=now - round((ended - event.received_at) * 1e9),
            )
            span.end(now)

    def _attributes(self, event: Event) -> dict[str, str | int | bool]:
        found: dict[str, str | int | bool] = {
            "messaging.system": "redis",
            "messaging.operation.type": "process",
            "messaging.destination.name": event.channel,
            "gateway.source": "pubsub" if event.stream is None else "stream",
            "gateway.event.type": event.type,
            "gateway.event.bytes": len(event.payload),
            "gateway.tenant": event.tenant,
            "gateway.branch": event.branch,
            "gateway.durable": event.durable,
            "gateway.audiences": len(self._routes.audiences(event)),
        }
        if (name := event.event_id or event.id) is not None:
            found["messaging.message.id"] = name
        return found

    def close(self) -> None:
        """Export the remaining spans; blocks."""
        self._provider.shutdown()


def read_traceparent(payload: bytes) -> trace.SpanContext | None:
    """Read the parent span from an event's key ``traceparent``.

    None if the key is missing or invalid.
    """
    if b'"traceparent"' not in payload:
        return None
    try:
        value = _decode(payload).traceparent
    except (msgspec.DecodeError, RecursionError):  # the deeper the stack, the less may be nested
        return None
    if not isinstance(value, str):
        return None
    if (found := _TRACEPARENT.fullmatch(value) or _LATER_VERSION.fullmatch(value)) is None:
        return None
    context = trace.SpanContext(
        int(found[1], 16), int(found[2], 16), True, trace.TraceFlags(int(found[3], 16) & 1)
    )
    return context if context.is_valid else None  # ids of zeros only are invalid


@asynccontextmanager
async def open_tracing(routes: Routing) -> AsyncIterator[Observe]:
    """Yield the function to call with delivered events; a thread exports their spans by OTLP."""
    _log_exporter_problems()
    tracing = Tracing(BatchSpanProcessor(OTLPSpanExporter()), routes)
    log.info("tracing")
    try:
        yield tracing.observe
    finally:
        with trio.move_on_after(LAST_FLUSH, shield=True):
            await trio.to_thread.run_sync(tracing.close, abandon_on_cancel=True)


def _resource() -> Resource:
    named = "OTEL_SERVICE_NAME" in os.environ or "service.name=" in os.environ.get(
        "OTEL_RESOURCE_ATTRIBUTES", ""
    )
    return Resource.create({} if named else {SERVICE_NAME: "trio-gateway"})


class _ExporterLog(logging.Handler):
    """Copies the exporter's warnings into our log, redacted, and one a second at most.

    The exporter logs a warning for each span that its queue has no room for.
    """

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self._throttled_log = ThrottledLog(log, clock=time.monotonic)  # called from any thread

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._throttled_log.warning("tracing problem", error=record.getMessage())
        except Exception:
            self.handleError(record)


def _log_exporter_problems() -> None:
    logger = logging.getLogger("opentelemetry")
    if not any(isinstance(each, _ExporterLog) for each in logger.handlers):
        logger.addHandler(_ExporterLog(logging.WARNING))
    logger.propagate = False
