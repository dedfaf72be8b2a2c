"""The background tasks of a gateway: where the code starts each, and what a fault calls it."""

from typing import Final

# Of every gateway process.
GATEWAY: Final = {
    "gateway.py: self.dispatch.run, self.heard": "Dispatch.run#1",
    "gateway.py: self.dispatch.run, self.read": "Dispatch.run#2",
    "gateway.py: dead_letters.run": "DeadLetters.run",
    "gateway.py: self.readiness.run": "Readiness.run",
    "gateway.py: self.replays.decide": "Replays.decide",
    "gateway.py: self.feed.run": "Feed.run",
    "gateway.py: self.roster.pay": "Roster.pay",
    "gateway.py: self.roster.follow_clock": "Roster.follow_clock",
    "gateway.py: revocations.answer_checks": "Revocations.answer_checks",
    "gateway.py: revocations.sweep, settings.jwt_revalidation_interval": "Revocations.sweep",
    "gateway.py: reaping": "Gateway._start.<locals>.reaping",
    "gateway.py: forgetting": "Gateway._start.<locals>.forgetting",
    "gateway.py: sources": "Gateway._start.<locals>.sources",
    "gateway.py: keep_running, 'pubsub', pubsub.run, self.breakers['pubsub']": "PubSub.run",
    "gateway.py: keep_running, 'stream', streams.run, self.breakers['stream']": "Streams.run",
    "gateway.py: wait_and_drain": "Gateway.watch.<locals>.wait_and_drain",
}
# Of one that Hypercorn's master, or ours, has started.
CHILD: Final = {
    "gateway.py: self._outlive_siblings": "Gateway._outlive_siblings",
}
WORKER: Final = {
    "gateway.py: self._share, self.siblings": "Gateway._share",
}
# Around it, under ``trio-gateway serve``; of one that is supervised; and of its supervisor.
SERVE: Final = {
    "serve.py: beside, heed_signals": "_serve.<locals>.heed_signals",
}
SUPERVISED: Final = {
    "serve.py: beside, tell_supervisor, link": "_serve.<locals>.tell_supervisor",
    "serve.py: beside, heed_supervisor, link": "_serve.<locals>.heed_supervisor",
    "serve.py: beside, turns.keep_posted": "Turns.keep_posted",
}
SUPERVISOR: Final = {
    "workers.py: self._heed_signals, places": "Supervisor._heed_signals",
    "workers.py: self._keep, place": "Supervisor._keep",
    "workers.py: self._listen, worker": "Supervisor._listen",
    "workers.py: self._roll": "Supervisor._roll",
    "workers.py: self._lose_patience": "Supervisor._lose_patience",
}
# What a client waits for itself: no background tasks.
SOMEBODYS: Final = {
    "runtime/connection.py: self._run_task, run",
    "runtime/connection.py: self._run_task, self._write_out",
    "access/sectors.py: ask, key",
}
ALL: Final = {*GATEWAY, *CHILD, *WORKER, *SERVE, *SUPERVISED, *SUPERVISOR, *SOMEBODYS}
