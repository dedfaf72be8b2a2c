"""The catalogue of metrics: their names, kinds, labels and help texts."""

from collections.abc import Mapping
from typing import Final, NamedTuple


class Counter(NamedTuple):
    """A number that only grows. ``label`` names its label, or several separated by commas; the
    label values in a snapshot are separated in the same way.
    """

    help: str
    label: str | None = None


class Gauge(NamedTuple):
    """A number that grows and falls; ``over_workers`` is how to combine it: ``sum`` or ``max``."""

    help: str
    label: str | None = None
    over_workers: str = "sum"


class Distribution(NamedTuple):
    """A histogram of seconds, with the bounds of :data:`~..core.histogram.SECONDS`."""

    help: str


# Users rely on the names. Every label has a bounded number of values.
METRICS: Final[Mapping[str, Counter | Gauge | Distribution]] = {
    "wsgateway_ready": Gauge("Processes that are ready to serve clients"),
    "wsgateway_metrics_partial": Gauge(
        "1 if the metrics of other workers are missing", None, "max"
    ),
    "wsgateway_connections_total": Gauge("Open connections"),
    "wsgateway_connections_limit": Gauge("Maximum number of open connections"),
    "wsgateway_connections_by_endpoint": Gauge("Open connections by endpoint", "endpoint"),
    "wsgateway_present": Gauge(
        "Present users and sessions by endpoint, of all processes together", "endpoint", "max"
    ),
    "wsgateway_circuit_breaker_state": Gauge(
        "State of the circuit breaker: 0 closed, 1 open, 2 half-open", "name", "max"
    ),
    "wsgateway_event_queue_depth": Gauge("Events waiting to be delivered"),
    "wsgateway_connections_rejected_total": Counter("Rejected connections by reason", "reason"),
    "wsgateway_connections_closed_total": Counter("Closed connections by close code", "code"),
    "wsgateway_connections_closed_by_gateway_total": Counter(
        "Connections closed by the gateway, by close code", "code"
    ),
    "wsgateway_connections_lagging": Gauge("Connections that fell behind and are catching up"),
    "wsgateway_lags_total": Counter("Times that a connection began to lag"),
    "wsgateway_upgrades_refused_total": Counter(
        "Refused upgrade requests by HTTP status", "status"
    ),
    "wsgateway_broadcasts_total": Counter("Events with at least one recipient"),
    "wsgateway_broadcasts_failed_total": Counter("Events whose delivery timed out"),
    "wsgateway_events_received_total": Counter(
        "Events received from Redis, valid or not, by source", "source"
    ),
    "wsgateway_events_processed_total": Counter("Events dispatched, without duplicates"),
    "wsgateway_events_dropped_total": Counter("Events dropped before delivery"),
    "wsgateway_events_dropped_by_source_total": Counter(
        "Events dropped before delivery, by source and reason", "source,reason"
    ),
    "wsgateway_api_requests_total": Counter(
        "Requests to the API for backends, by call and HTTP status", "call,status"
    ),
    "wsgateway_api_events_total": Counter(
        "Events that the API was asked to publish, by outcome", "outcome"
    ),
    "wsgateway_events_invalid_total": Counter("Invalid events by reason", "reason"),
    "wsgateway_events_duplicate_total": Counter("Duplicates of events received before"),
    "wsgateway_events_unheard_total": Counter(
        "Events without a recipient, or whose sector has no waiter"
    ),
    "wsgateway_events_unknown_type_total": Counter("Events of a type without a route"),
    "wsgateway_deliveries_total": Counter("Events written to a connection or its outbox"),
    "wsgateway_resumes_total": Counter("Requests to resume by outcome", "outcome"),
    "wsgateway_stream_scans_total": Counter("Times that a stream was read back for a resume"),
    "wsgateway_receipts_total": Counter("Receipts of tracked events, by state", "state"),
    "wsgateway_receipts_ignored_total": Counter(
        "Confirmations of event ids that were not sent on the connection"
    ),
    "wsgateway_steps_total": Counter(
        "Steps of events that nobody confirmed in time, by outcome, and whether more than a second"
        " late",
        "outcome,late",
    ),
    "wsgateway_replayed_events_total": Counter("Durable events replayed from the history"),
    "wsgateway_stream_gaps_total": Counter(
        "Times that stream entries were lost before they were read"
    ),
    "wsgateway_nodes": Gauge("Live processes of this service, by Redis", None, "max"),
    "wsgateway_nodes_lost_total": Counter(
        "Processes that ended without a word, each counted by one of the others"
    ),
    "wsgateway_streams_followed": Gauge("Streams that are read"),
    "wsgateway_streams_unreadable": Gauge("Streams that can't be read, though Redis answers"),
    "wsgateway_events_misplaced_total": Counter("Events in the shard of another tenant"),
    "wsgateway_log_lines_dropped_total": Counter(
        "Log lines dropped because they could not be written"
    ),
    "wsgateway_control_refused_total": Counter(
        "Questions of other processes that were refused because too many are being answered"
    ),
    "wsgateway_tasks": Gauge("Running Trio tasks"),
    "wsgateway_history_events": Gauge("Durable events in the history"),
    "wsgateway_history_bytes": Gauge("Bytes of the durable events in the history"),
    "wsgateway_dead_letters_total": Counter(
        "Invalid stream entries to be copied to the dead-letter stream, by outcome", "outcome"
    ),
    "wsgateway_sector_queries_total": Counter(
        "Queries to the sector database by outcome", "outcome"
    ),
    "wsgateway_messages_received_total": Counter("Messages received from clients"),
    "wsgateway_broadcast_duration_seconds": Distribution(
        "Duration of the delivery of one batch of events"
    ),
    "wsgateway_event_latency_seconds": Distribution(
        "Time from receiving an event to its last write"
    ),
    "wsgateway_loop_stall_seconds": Distribution("Turns of the event loop that took 10 ms or more"),
    "wsgateway_gc_pause_seconds": Distribution("Duration of garbage collections"),
}
