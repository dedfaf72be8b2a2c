"""A real-time gateway: events from Redis to exactly the clients that may receive them.

What is public, and documented in docs/api.md:

publisher   for backends: publish events
client      for programs on Trio: receive events
gateway     create_app() and Gateway, to embed the gateway
settings    load_settings() and Settings
testing     tokens, events and fakes for tests
app         ``app``, for the hypercorn command alone: importing it sets up the process

Everything else is internal, and may change in any release:

core        decisions: no I/O, no Trio, no clock
runtime     tasks, queues and deadlines: no network library
transports  WebSocket and SSE connections
broker      Redis: Pub/Sub, streams, commands
access      who may connect: tokens, tickets, revocations, sectors, addresses
web         the HTTP routes
telemetry   metrics, logs, traces
parts       builds all of these; reception serves one client with them
cli         the commands; serve and workers run the server and its processes
"""

__version__ = "0.1.0"
