"""Stats: the counters and the state of the parts, under the names of the metrics."""

import os
from collections import Counter
from typing import Any, Final

import trio

from .core.audiences import TenantId
from .core.close_codes import Close
from .core.receipts import State
from .core.time_counts import summary
from .parts import Parts
from .runtime.hub import Hub
from .telemetry import output
from .telemetry.snapshot import Snapshot

MAX_SLOW: Final = 20  # slow clients that are listed
_MAX_CODES: Final = 64  # close codes as labels; clients can send any code


def snapshot(parts: Parts) -> Snapshot:
    """The metrics of this process alone."""
    hub, dispatch, ingest = parts.hub, parts.dispatch, parts.ingest
    return Snapshot.of(
        {
            "wsgateway_ready": int(parts.ready),
            "wsgateway_metrics_partial": int(parts.worker_stats.partial),
            "wsgateway_connections_total": len(hub),
            "wsgateway_connections_limit": parts.settings.ws_max_total_connections,
            "wsgateway_connections_by_endpoint": {
                endpoint.label: number for endpoint, number in hub.by_endpoint.items()
            },
            "wsgateway_circuit_breaker_state": {
                name: int(breaker.state) for name, breaker in parts.breakers.items()
            },
            "wsgateway_event_queue_depth": parts.pubsub_queue.depth + parts.stream_queue.depth,
            "wsgateway_connections_rejected_total": parts.counts.rejected,
            "wsgateway_connections_closed_total": _by_code(hub.closed),
            "wsgateway_connections_closed_by_gateway_total": {
                str(int(close)): hub.closed_by_gateway[close] for close in Close if close.sent
            },
            "wsgateway_connections_lagging": len(hub.lagging),
            "wsgateway_lags_total": parts.replays.feeding.lags,
            "wsgateway_upgrades_refused_total": {
                str(status): number for status, number in parts.counts.refused.items()
            },
            "wsgateway_broadcasts_total": dispatch.broadcasts,
            "wsgateway_broadcasts_failed_total": parts.batches.failed,
            "wsgateway_events_received_total": {"pubsub": 0, "stream": 0} | ingest.received,
            "wsgateway_events_processed_total": dispatch.processed,
            "wsgateway_events_dropped_total": parts.pubsub_queue.dropped
            + parts.pubsub_queue.over_rate,
            "wsgateway_events_dropped_by_source_total": {
                "pubsub,queue_full": parts.pubsub_queue.dropped,
                "pubsub,tenant_rate": parts.pubsub_queue.over_rate,
                "stream,queue_full": parts.stream_queue.dropped,  # always 0: the source waits
            },
            "wsgateway_api_requests_total": parts.api.requests if parts.api else {},
            "wsgateway_api_events_total": parts.api.events if parts.api else {},
            "wsgateway_events_invalid_total": ingest.invalid,
            "wsgateway_events_duplicate_total": dispatch.duplicate,
            "wsgateway_events_unheard_total": dispatch.unheard,
            "wsgateway_events_unknown_type_total": dispatch.unknown_type,
            "wsgateway_deliveries_total": dispatch.deliveries,
            "wsgateway_resumes_total": {"recovered": 0, "not_recovered": 0} | parts.replays.resumes,
            "wsgateway_stream_scans_total": parts.older_events.scans,
            "wsgateway_receipts_total": {
                state.label: parts.receipts.counts[state] for state in State
            },
            "wsgateway_receipts_ignored_total": parts.receipts.ignored,
            "wsgateway_steps_total": parts.steps.taken,
            "wsgateway_replayed_events_total": parts.replays.feeding.replayed,
            "wsgateway_nodes": {"": len(parts.cluster.registry.nodes)} if parts.cluster else {},
            "wsgateway_nodes_lost_total": (
                {"": parts.cluster.registry.lost} if parts.cluster else {}
            ),
            "wsgateway_stream_gaps_total": parts.streams.gaps,
            "wsgateway_streams_followed": len(parts.following.names),
            "wsgateway_streams_unreadable": len(parts.streams.unreadable),
            "wsgateway_events_misplaced_total": parts.inlet.misplaced,
            "wsgateway_dead_letters_total": (
                parts.dead_letters.outcomes if parts.dead_letters else {}
            ),
            "wsgateway_sector_queries_total": parts.sector_assignments.queries
            if parts.sector_assignments
            else {},
            "wsgateway_present": _present(parts),
            "wsgateway_log_lines_dropped_total": output.dropped(),
            "wsgateway_control_refused_total": (
                {"": parts.cluster.control.refused} if parts.cluster else {}
            ),
            "wsgateway_tasks": trio.lowlevel.current_statistics().tasks_living,
            "wsgateway_history_events": len(parts.history),
            "wsgateway_history_bytes": parts.history.bytes,
            "wsgateway_messages_received_total": hub.messages,
        },
        {
            "wsgateway_broadcast_duration_seconds": parts.batches.duration,
            "wsgateway_event_latency_seconds": parts.batches.latency,
            "wsgateway_loop_stall_seconds": parts.loop_lag.turns,
            "wsgateway_gc_pause_seconds": parts.loop_lag.collections,
        },
    )


def describe(parts: Parts) -> dict[str, Any]:
    """The metrics and the state of this process, for the console."""
    own = snapshot(parts)
    return {
        "at": trio.current_time(),  # a monotonic clock
        "pid": os.getpid(),
        "ready": parts.ready,
        "draining": parts.draining,
        "breakers": {name: each.state.name.lower() for name, each in parts.breakers.items()},
        "streams": {"connected": parts.streams.connected, "cursors": parts.streams.cursors},
        "pubsub": {"connected": parts.pubsub.connected},
        "nodes": [] if parts.cluster is None else list(parts.cluster.registry.nodes.values()),
        "numbers": own.numbers,
        "histograms": own.histograms,
    }


def delivery_times(parts: Parts, tenant: TenantId) -> dict[str, Any]:
    """The delivery times of a tenant in this process."""
    times = parts.dispatch.times
    figures = times.figures(tenant, trio.current_time())
    return {
        "seconds": times.slo,
        "last_5_minutes": summary(figures.last_5_minutes),
        "last_hour": summary(figures.last_hour),
    }


def slow(hub: Hub, tenant: TenantId) -> list[dict[str, Any]]:
    """The clients of a tenant with the most bytes in their outboxes."""
    waiting = [
        each for each in hub.connections if each.waiting_bytes and each.principal.tenant == tenant
    ]
    waiting.sort(key=lambda each: each.waiting_bytes, reverse=True)
    return [
        {
            "endpoint": each.principal.endpoint.label,
            "user": each.principal.user,
            "session": each.principal.session,
            "bytes": each.waiting_bytes,
            "frames": each.waiting_frames,
        }
        for each in waiting[:MAX_SLOW]
    ]


def _present(parts: Parts) -> dict[str, float]:
    if parts.cluster is None or parts.cluster.presence is None:
        return {}
    return dict(parts.cluster.presence.present)


def _by_code(closed: Counter[int]) -> dict[str, float]:
    """The counters by close code: a label for each of the first codes, "other" for the rest.

    A code keeps its label: otherwise a counter would decrease. The gateway's own codes are there
    from the start: otherwise their first close would not be an increase.
    """
    found = {str(int(close)): 0.0 for close in Close if close.sent}
    for code, number in closed.items():  # in the order in which they occurred first
        label = str(int(code))
        if label not in found and len(found) >= _MAX_CODES:
            label = "other"
        found[label] = found.get(label, 0.0) + number
    return found
