"""The names of all keys and channels that the processes of one service share.

The keys are in one slot.
"""

from ..core.control_messages import own_channel
from ..core.slots import hash_tag

_TAG = "gateway"


class Keys:
    """Names of keys, and of channels.

    A script may write keys of one slot only. In a Cluster, therefore, all are in the slot of the
    stream that joins and leaves are added to, if there is one. ``database`` is the number of the
    database that the keys are in: channels are the same in all.
    """

    def __init__(
        self,
        presence_stream: str | None = None,
        *,
        is_cluster: bool = False,
        database: int = 0,
    ) -> None:
        self.prefix = f"{{{_TAG}}}:"
        if is_cluster and presence_stream is not None:
            self.prefix = f"{{{hash_tag(presence_stream)}}}:{_TAG}:"
        self.nodes = f"{self.prefix}nodes"  # sorted set: process, when it beat last (Redis ms)
        self.states = f"{self.prefix}nodes:states"  # hash: process, its state as JSON
        self.settings = f"{self.prefix}nodes:settings"  # hash: process, those that must agree
        self.gap = f"{self.prefix}nodes:gap"  # for a while: the last beat before Redis was away
        self._places = f"{self.prefix}places:"  # hash: user, session or tenant, its connections
        self.orders = f"{self.prefix}orders"  # stream
        self.control = own_channel("control", database)  # channel: to all processes
        self.changes = own_channel("presence", database)  # channel: who is present now

    def places(self, process: str) -> str:
        """The hash of the places that a process has given out."""
        return self._places + process

    def replies(self, name: str) -> str:
        """The channel on which a process, or a command, receives answers."""
        return f"{self.control}:{name}"
