"""Ports on this machine."""

from trio_gateway.redis_sets.ports import free_port as free_port
from trio_gateway.redis_sets.ports import free_ports as free_ports
