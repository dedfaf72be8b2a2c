"""Client counts: clients that are not connected yet, and those that were turned away."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class ClientCounts:
    """Counted by transports and by the reception, read by the metrics."""

    rejected: Counter[str] = field(default_factory=Counter)  # after the upgrade, by reason
    refused: Counter[int] = field(default_factory=Counter)  # upgrades, by HTTP status
    arriving: int = 0  # between the reading of their request and the check of their credential
