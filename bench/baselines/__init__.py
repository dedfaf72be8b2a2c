"""What people would use instead: one room, no tokens, no limits, one small file each.

Each hears the channel :data:`CHANNEL`, sends what comes to everybody connected, and answers
``ping`` as the gateway does. They are started as ``python -m bench.baselines.NAME PORT REDIS``.
"""

from typing import Final

CHANNEL: Final = "channel:branch:1:waiters"
PONG: Final = '{"type":"pong"}'
