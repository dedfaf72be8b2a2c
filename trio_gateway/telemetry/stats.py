"""Figures: what the parts have counted, under the names that the metrics promise."""

from collections import Counter
from typing import TYPE_CHECKING, Final

import trio

from ..core.close_codes import Close
from . import output
from .prometheus import Snapshot

if TYPE_CHECKING:
    from ..gateway import Gateway

_MOST_CODES: Final = 64  # labels for close codes, which clients choose


def sample(gateway: "Gateway") -> Snapshot:
    """This process's figures, for the metrics."""
    hub, dispatch, ingest = gateway.hub, gateway.dispatch, gateway.ingest
    return Snapshot.of(
        {
            "wsgateway_ready": int(gateway.ready),
            "wsgateway_metrics_partial": int(gateway.partial),
            "wsgateway_connections_total": len(hub),
            "wsgateway_connections_limit": gateway.settings.ws_max_total_connections,
            "wsgateway_connections_by_endpoint": {
                endpoint.label: number for endpoint, number in hub.by_endpoint.items()
            },
            "wsgateway_circuit_breaker_state": {
                name: int(breaker.state) for name, breaker in gateway.breakers.items()
            },
            "wsgateway_event_queue_depth": gateway.heard.depth + gateway.read.depth,
            "wsgateway_connections_rejected_total": gateway.rejected,
            "wsgateway_connections_closed_total": _by_code(hub.closed),
            "wsgateway_connections_closed_by_gateway_total": {
                str(int(close)): hub.closed_by_gateway[close] for close in Close if close.sent
            },
            "wsgateway_upgrades_refused_total": {
                str(status): number for status, number in gateway.refused.items()
            },
            "wsgateway_broadcasts_total": dispatch.broadcasts,
            "wsgateway_broadcasts_failed_total": dispatch.failed,
            "wsgateway_events_received_total": {"pubsub": 0, "stream": 0} | ingest.received,
            "wsgateway_events_processed_total": dispatch.processed,
            "wsgateway_events_dropped_total": gateway.heard.dropped + gateway.heard.over_rate,
            "wsgateway_events_dropped_by_source_total": {
                "pubsub,queue_full": gateway.heard.dropped,
                "pubsub,tenant_rate": gateway.heard.over_rate,
                "stream,queue_full": gateway.read.dropped,  # which waits instead
            },
            "wsgateway_events_invalid_total": ingest.invalid,
            "wsgateway_events_duplicate_total": dispatch.duplicate,
            "wsgateway_events_unheard_total": dispatch.unheard,
            "wsgateway_events_unknown_type_total": dispatch.unknown_type,
            "wsgateway_deliveries_total": dispatch.deliveries,
            "wsgateway_resumes_total": {"recovered": 0, "not_recovered": 0}
            | gateway.replays.resumes,
            "wsgateway_replayed_events_total": gateway.replays.replayed,
            "wsgateway_stream_gaps_total": gateway.streams.gaps if gateway.streams else 0,
            "wsgateway_dead_letters_total": (
                gateway.dead_letters.outcomes if gateway.dead_letters else {}
            ),
            "wsgateway_sector_queries_total": gateway.sector_assignments.queries
            if gateway.sector_assignments
            else {},
            "wsgateway_log_lines_dropped_total": output.dropped(),
            "wsgateway_tasks": trio.lowlevel.current_statistics().tasks_living,
            "wsgateway_history_events": len(gateway.history),
            "wsgateway_history_bytes": gateway.history.bytes,
            "wsgateway_messages_received_total": hub.messages,
        },
        {
            "wsgateway_broadcast_duration_seconds": dispatch.duration,
            "wsgateway_event_latency_seconds": dispatch.latency,
            "wsgateway_loop_stall_seconds": gateway.loop_lag.turns,
            "wsgateway_gc_pause_seconds": gateway.loop_lag.collections,
        },
    )


def _by_code(closed: Counter[int]) -> dict[str, float]:
    """Clients choose their close codes: the first ones to occur are labels, the rest is "other".

    A code keeps its label for good, or a counter would fall. Our own are there from the start, or
    the first of them would be no increase.
    """
    found = {str(int(close)): 0.0 for close in Close if close.sent}
    for code, number in closed.items():  # in the order in which they occurred first
        label = str(int(code))
        if label not in found and len(found) >= _MOST_CODES:
            label = "other"
        found[label] = found.get(label, 0.0) + number
    return found
