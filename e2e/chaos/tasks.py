"""The background tasks of a gateway: the call that starts each, and its name for a fault."""

from pathlib import Path
from typing import Final

# Of every gateway process. The last two calls start two tasks each.
_GATEWAY: Final = {
    "gateway.py: operations.serve, self, operators": ["serve"],
    "gateway.py: parts.commands.run": ["Commands.run"],
    "gateway.py: parts.dead_letters.run": ["DeadLetters.run"],
    "gateway.py: parts.readiness.run": ["Readiness.run"],
    "gateway.py: parts.replays.decide": ["Replays.decide"],
    "gateway.py: parts.replays.feeding.keep_ahead": ["Feeding.keep_ahead"],
    "gateway.py: parts.receipt_writing.run, parts.receipt_store.write": ["ReceiptWriting.run"],
    "gateway.py: parts.reach.run, parts.steps.take, parts.steps.answers": ["Reach.run"],
    "gateway.py: parts.shard_claims.run": ["ShardClaims.run"],
    "gateway.py: parts.claim_link.run": ["CommandLink.run#1"],
    "gateway.py: parts.following.run": ["Following.run"],
    "gateway.py: parts.watch_topology": ["watch"],
    "gateway.py: parts.placement.run": ["Placement.run"],
    "access/placement.py: self._report": ["Placement._report"],
    "access/placement.py: self._send_away": ["Placement._send_away"],
    "gateway.py: parts.checks.run": ["CommandLink.run#2"],
    "gateway.py: parts.revocations.answer_checks": ["Revocations.answer_checks"],
    "gateway.py: parts.revocations.sweep, settings.jwt_revalidation_interval": [
        "Revocations.sweep"
    ],
    "gateway.py: parts.sector_assignments.follow_clock": ["SectorAssignments.follow_clock"],
    "gateway.py: parts.sector_assignments.retry_pending": ["SectorAssignments.retry_pending"],
    "gateway.py: parts.deadlines.run": ["Deadlines.run"],
    "gateway.py: self._reap": ["Gateway._reap"],
    "gateway.py: self._run_sources": ["Gateway._run_sources"],
    "gateway.py: self._server_stops.run": ["_ServerStops.run"],
    "gateway.py: self._stats_feed.run": ["StatsFeed.run"],
    "gateway.py: self._trim_history": ["Gateway._trim_history"],
    "gateway.py: parts.batches.run, queue, settings.redis_event_batch_size": [
        "Batches.run#1",
        "Batches.run#2",
    ],
    "gateway.py: keep_running, name, run, parts.breakers[name], None, changed": [
        "PubSub.run",
        "Streams.run",
    ],
}
# Of a process that is one of several, or that has an API for backends.
_SERVICE: Final = {
    "gateway.py: parts.api.keys.run": ["ApiKeys.run"],
    "gateway.py: parts.api.publishing.run": ["Publishing.run"],
    "cluster/building.py: self.registry.run": ["Registry.run"],
    "cluster/building.py: self.control.run": ["Control.run"],
    "cluster/building.py: each.run": ["CommandLink.run#3", "CommandLink.run#4"],
    "cluster/building.py: self.limits.run": ["ClusterLimits.run"],
    "cluster/building.py: self.room.run": ["ClusterRoom.run"],
    "cluster/building.py: self.presence.run": ["Presence.run"],
}
# Of a process that Hypercorn's master or the supervisor has started.
_CHILD: Final = {"gateway.py: self._delay_sigterm": ["Gateway._delay_sigterm"]}
_WORKER: Final = {
    "gateway.py: parts.worker_stats.share, partial(stats.snapshot, parts)": ["WorkerStats.share"]
}
# Around the gateway under ``trio-gateway serve``; of a supervised process; and of its supervisor.
_SERVE: Final = {"serve.py: stop_on_bug, handle_signals": ["_serve.<locals>.handle_signals"]}
_SUPERVISED: Final = {
    "serve.py: stop_on_bug, report_ready, link": ["_serve.<locals>.report_ready"],
    "serve.py: stop_on_bug, watch_supervisor, link": ["_serve.<locals>.watch_supervisor"],
    "serve.py: stop_on_bug, balancer.keep_published": ["AcceptBalancer.keep_published"],
}
_SUPERVISOR: Final = {
    "workers.py: self._handle_signals, nursery": ["Supervisor._handle_signals"],
    "workers.py: self._keep_alive, number": ["Supervisor._keep_alive"],
    "workers.py: self._read_report, worker": ["Supervisor._read_report"],
    "workers.py: self._roll": ["Supervisor._roll"],
    "workers.py: self._kill_after_timeout": ["Supervisor._kill_after_timeout"],
}
# One client or one command waits for each of these: they are not background tasks.
_AWAITED: Final = {
    "runtime/side_tasks.py: self._run, task",
    "access/sectors.py: query_branch, key",
    "broker/asyncio_calls.py: (await self._receive.receive()).run, loop",
    "broker/primaries.py: self._get_group, server, group, fits, values, problems",
    "broker/primaries.py: send_to, key",
    "broker/asking.py: ask, server",
    "broker/publishing.py: self._send, server, group, confirm",
    "parts.py: cluster.leave",
    "parts.py: receipt_writing.flush, receipt_store.write",
    "runtime/receipt_writing.py: flush_one, writer",
    "cluster/control.py: self._answer, ask",
    "cluster/observing.py: commands.run",  # of the command line
    "cluster/observing.py: link.run",
    "cluster/room.py: self._search, owner, search",
    "cluster/room.py: self._search_elsewhere, owner, found",
    "cluster/room.py: self._search_here, owner, found",
}
# Parts of other tasks, and what is as a task above.
_PARTS: Final = {
    "cluster/building.py: keep_running, 'control', self.link.run, breaker, backoff, changed",
    "cluster/presence.py: self._keep_sweeping",
    "cluster/presence.py: self._keep_writing",
    "cluster/presence.py: self.feed.run",
    "gateway.py: keep_running, sharded.name, sharded.run, sharded.breaker, None, changed",
    "broker/primaries.py: self._calls.run, self._close_all, self._timeout",
    "broker/cluster_streams.py: self._run, sink",
    "broker/pubsub.py: self._leave, server",
    "broker/pubsub.py: self._publish_probes, server",
    "broker/streams.py: self._leave, server",
    "broker/topology_watch.py: _listen, sentinel, topology",
    "broker/topology_watch.py: _look, topology",
    "runtime/reach.py: lane.run, take, answers",
    "runtime/receipt_writing.py: writer.run, write",
}


def _names(calls: dict[str, list[str]]) -> list[str]:
    return [name for names in calls.values() for name in names]


GATEWAY: Final = _names(_GATEWAY)
SERVICE: Final = _names(_SERVICE)
CHILD: Final = _names(_CHILD)
WORKER: Final = _names(_WORKER)
SERVE: Final = _names(_SERVE)
SUPERVISED: Final = _names(_SUPERVISED)
SUPERVISOR: Final = _names(_SUPERVISOR)
CALLS: Final = {
    *_GATEWAY, *_SERVICE, *_CHILD, *_WORKER, *_SERVE, *_SUPERVISED, *_SUPERVISOR, *_AWAITED,
    *_PARTS,
}  # fmt: skip


def write_routes(folder: Path) -> Path:
    """Write a routes file with which all of these tasks are started."""
    path = folder / "routes.toml"
    path.write_text('[routes.ROUND_READY]\nmust_reach = "waiters"\nwithin = 60\n')
    return path
