"""Tracing: a span for each event, and no cost while it is off."""

import json
import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

import pytest
import redis
import trio
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind
from structlog.testing import capture_logs
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.gateways import environment, free_port, http, process, until, wait
from trio_gateway.core.event_ids import Position, tag
from trio_gateway.core.events import Event
from trio_gateway.runtime.batches import Batches
from trio_gateway.runtime.dispatch import Dispatch
from trio_gateway.runtime.hub import Hub
from trio_gateway.runtime.queue import EventQueue
from trio_gateway.telemetry.tracing import Tracing, _log_exporter_problems, read_traceparent
from trio_gateway.testing import make_event, make_payload

TRACE: Final = "4bf92f3577b34da6a3ce929d0e0e4736"  # the example of W3C's Trace Context
PARENT: Final = "00f067aa0ba902b7"
SAMPLED: Final = f"00-{TRACE}-{PARENT}-01"


def spans_of(*events: Event) -> tuple[Any, ...]:
    exporter = InMemorySpanExporter()
    tracing = Tracing(SimpleSpanProcessor(exporter))
    tracing.observe(events, 0.0)
    return exporter.get_finished_spans()


@pytest.mark.parametrize(
    ("value", "sampled"),
    [
        (SAMPLED, True),
        (f"00-{TRACE}-{PARENT}-00", False),
        (f"00-{TRACE}-{PARENT}-ff", True),
        (f"cc-{TRACE}-{PARENT}-01", True),  # of a future version
        (f"cc-{TRACE}-{PARENT}-01-what-the-future-will-be-like", True),
    ],
)
def test_traceparent_is_parsed(value: str, sampled: bool) -> None:
    origin = read_traceparent(make_payload(traceparent=value))
    assert origin is not None
    assert (f"{origin.trace_id:032x}", f"{origin.span_id:016x}") == (TRACE, PARENT)
    assert origin.is_remote
    assert origin.trace_flags.sampled is sampled


@pytest.mark.parametrize(
    "value",
    [
        ..., None, 1, "", [SAMPLED], {"traceparent": SAMPLED}, f" {SAMPLED}", SAMPLED.upper(),
        f"00-{TRACE}-{PARENT}", f"{SAMPLED}-more", f"{SAMPLED}\n", f"ff-{TRACE}-{PARENT}-01",
        f"00-{'0' * 32}-{PARENT}-01", f"00-{TRACE}-{'0' * 16}-01", f"00-{TRACE[1:]}-{PARENT}-01",
        f"cc-{TRACE}-{PARENT}-01.more",
    ],
)  # fmt: skip
def test_invalid_traceparent_is_ignored(value: object) -> None:
    payload = make_payload(traceparent=value, data={"traceparent": SAMPLED})
    assert read_traceparent(payload) is None


def test_payload_that_is_nested_too_deeply_has_no_traceparent() -> None:
    payload = b'{"traceparent":"%s","data":%s}' % (SAMPLED.encode(), b"[" * 100_000)
    assert read_traceparent(payload) is None


async def test_span_lasts_from_receipt_to_the_last_write(autojump_clock: MockClock) -> None:
    exporter = InMemorySpanExporter()
    batches, queue = Batches(Dispatch(Hub())), EventQueue(10)
    batches.observe = Tracing(SimpleSpanProcessor(exporter)).observe
    queue.offer(make_event("ROUND_READY", n=1, received_at=trio.current_time()))
    await trio.sleep(2)
    queue.offer(make_event("ROUND_READY", n=2, received_at=trio.current_time()))
    queue.offer(make_event("ROUND_READY", n=2, channel="other"))  # a copy of it
    await trio.sleep(1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(batches.run, queue, 50)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    spans: list[Any] = list(exporter.get_finished_spans())
    assert [span.end_time - span.start_time for span in spans] == [3_000_000_000, 1_000_000_000]
    assert spans[0].end_time == spans[1].end_time


def test_span_describes_the_event_without_its_payload() -> None:
    event = make_event(
        "ROUND_READY", tenant_id=7, branch_id=3, session_id=456, data="secret",
        stream=tag("events:critical"), position=Position((5, 1)),
    )  # fmt: skip
    (span,) = spans_of(event)
    assert (span.name, span.kind) == ("deliver ROUND_READY", SpanKind.CONSUMER)
    assert dict(span.attributes) == {
        "messaging.system": "redis",
        "messaging.operation.type": "process",
        "messaging.destination.name": event.channel,
        "messaging.message.id": event.event_id,
        "gateway.source": "stream",
        "gateway.event.type": "ROUND_READY",
        "gateway.event.bytes": len(event.payload),
        "gateway.tenant": 7,
        "gateway.branch": 3,
        "gateway.durable": True,
        "gateway.audiences": 4,
    }
    assert (span.parent, span.links) == (None, ())
    assert span.resource.attributes["service.name"] == "trio-gateway"


def test_unknown_types_do_not_become_span_names() -> None:
    (span,) = spans_of(make_event("JUNK-8217391"))
    assert span.name == "deliver"


def test_event_with_a_traceparent_is_in_its_trace_and_linked() -> None:
    (span,) = spans_of(make_event(traceparent=SAMPLED))
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT)
    assert [f"{link.context.span_id:016x}" for link in span.links] == [PARENT]


def test_event_of_an_unsampled_trace_is_not_traced() -> None:
    assert spans_of(make_event(traceparent=f"00-{TRACE}-{PARENT}-00")) == ()


@contextmanager
def collector() -> Iterator[tuple[str, list[Span]]]:
    """The port of an OTLP collector, and the spans that it has received."""
    spans: list[Span] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = ExportTraceServiceRequest()
            request.ParseFromString(self.rfile.read(int(self.headers["Content-Length"])))
            for of_resource in request.resource_spans:
                for of_scope in of_resource.scope_spans:
                    spans.extend(of_scope.spans)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", spans
        server.shutdown()
        thread.join()


async def test_spans_are_exported_before_the_process_ends(redis_url: str) -> None:
    port = free_port()
    command = ("trio_gateway", "serve", "--bind", f"127.0.0.1:{port}")
    with collector() as (endpoint, spans):
        env = environment(redis_url, WS_TRACING="true", OTEL_EXPORTER_OTLP_ENDPOINT=endpoint)
        async with process(*command, env=env, port=port) as started:

            async def ready() -> bool:
                return (await http(port, "/ws/health/ready")).status == 200

            await until(ready)
            backend = redis.Redis.from_url(redis_url)
            event = json.loads(make_payload(traceparent=SAMPLED))
            backend.xadd("events:critical", {"data": json.dumps(event)})

            async def delivered() -> bool:
                return (
                    "wsgateway_events_processed_total 1.0" in (await http(port, "/ws/metrics")).text
                )

            await until(delivered)
            backend.close()
            started.send_signal(signal.SIGTERM)
            status, _, errors = await wait(started)
    assert (status, b"trouble" in errors) == (0, False)
    (span,) = spans
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert span.name == "deliver ROUND_READY"
    assert 0 < span.end_time_unix_nano - span.start_time_unix_nano < 1_000_000_000


OFF: Final = """
import sys, trio

asked = set()

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "opentelemetry":
            frame = sys._getframe()
            while frame.f_globals["__name__"].startswith(("importlib", "__main__")):
                frame = frame.f_back
            asked.add(frame.f_globals["__name__"].partition(".")[0])
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
from trio_gateway import app, cli, serve, workers

async def main():
    async with app.app.serving():
        assert app.app.parts.batches.observe is None

trio.run(main)
print(sorted(asked - {"redis"}))  # which measures itself where it finds it
"""


def test_nothing_is_imported_while_tracing_is_off() -> None:
    env = environment("redis://127.0.0.1:1")
    found = subprocess.run(
        [sys.executable, "-c", OFF], env=env, capture_output=True, check=True, timeout=20
    )
    assert found.stdout.decode().splitlines()[-1] == "[]"


def test_failing_exports_are_logged_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    _log_exporter_problems()
    trouble = logging.getLogger("opentelemetry.sdk.of.this.test")
    with capture_logs() as logs:
        for n in range(50):
            trouble.warning("queue full, %d dropped", n)
        now += 1
        trouble.warning("queue full")

    assert [(log["event"], log["held_back"]) for log in logs] == [
        ("tracing problem", 0), ("tracing problem", 49),
    ]  # fmt: skip
