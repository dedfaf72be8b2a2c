"""Baselines: common designs with one room, without tokens and limits, one small file each.

Each subscribes to :data:`CHANNEL`, sends its messages to every client, and answers ``ping`` as the
gateway does. Start one with ``python -m bench.baselines.NAME PORT REDIS_PORT``.
"""

from typing import Final

CHANNEL: Final = "channel:branch:1:waiters"
PONG: Final = '{"type":"pong"}'
