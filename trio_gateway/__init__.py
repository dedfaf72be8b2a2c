"""A real-time gateway: events from Redis to exactly the clients that may hear them.

core     decides: no I/O, no Trio, no clock
runtime  runs: nurseries, channels, cancel scopes; no network library
edges    touches the world: sockets, HTTP, Redis
gateway  puts the floors together; `app` is it for the hypercorn command

Backends import `trio_gateway.publisher`; everything else is for the gateway itself.
"""

__version__ = "0.1.0"
