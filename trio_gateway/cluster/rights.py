"""What the Redis user must be allowed to do for the scripts of this package."""

from collections.abc import Iterator
from typing import Final

from .keys import Keys

# Every command in our scripts but PUBLISH, with arguments that leave no key behind: {} is a key
# that does not exist.
_CALLS: Final = """
time
exists {}
get {}
set {} x xx
pexpire {} 1
hset {} x 1
hincrby {} x 1
hexists {} x
hget {} x
hmget {} x
hkeys {}
hgetall {}
hrandfield {} 1
hdel {} x
zadd {} xx 0 x
zscore {} x
zrangebyscore {} 0 0
zrevrange {} 0 0
zrem {} x
xadd {} nomkstream * x x
xtrim {} maxlen 0
xrange {} - + count 1
"""


def harmless_calls(keys: Keys) -> Iterator[list[str]]:
    """Each command once, in order, to be tried by ``trio-gateway check``."""
    key = f"{keys.prefix}check"
    for line in _CALLS.strip().splitlines():
        yield line.replace("{}", key).split()
