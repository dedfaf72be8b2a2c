"""What an accept costs several gateways, connected to in turns on one core. Linux.

``python bench/turns.py [CHECKOUT][:NAME=VALUE,…] …``, for example ``. .:WS_CLUSTER=true``. Other
load on the machine changes all of them alike, so their ratio is steadier than that of runs one
after the other. What each uses while nobody connects is subtracted.
"""

import os
import resource
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench import crowd as crowds
from bench import processes
from bench.client import Client, Load
from tests.support.ports import free_port

_ROUNDS, _CLIENTS = 9, 1000  # in each round
_WARM_UP = 300  # clients
_REST = 0.25  # seconds after the last pong of a round, for what is written later
_IDLE = 4.0  # seconds


class Gateway:
    """One of them, with its own Redis and its clients."""

    def __init__(self, name: str, stack: ExitStack, cores: processes.Cores) -> None:
        self.name = name
        checkout, _, settings = name.partition(":")
        redis = stack.enter_context(processes.open_redis(cores))
        port = free_port()
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        chosen = dict(each.split("=", 1) for each in settings.split(",") if each)
        environment = processes._environment() | processes._of_the_gateway(redis, chosen)
        environment["PYTHONPATH"] = str(Path(checkout or ".").resolve())
        config = str(processes._config(folder, port))
        command = [sys.executable, "-m", "trio_gateway", "serve", "-c", config]
        running = processes._running(command, environment, port, folder, cores.server)
        self._server = stack.enter_context(running)
        processes._wait_until_ready("gateway", self._server, redis, 60)
        self._load = Load(port)
        stack.callback(self._load.shut)
        targets = crowds.one_branch(_WARM_UP + _ROUNDS * _CLIENTS).targets
        self._clients = [Client(number, target, None) for number, target in enumerate(targets)]
        self._connect(_WARM_UP)
        self.idle = 0.0  # of a core
        self.found: list[float] = []  # µs of CPU for an accept, in each round

    def cpu(self) -> float:
        """Seconds so far."""
        return self._server.scheduled()[0]

    def go_on(self) -> None:
        """Connect the clients of a round."""
        before, began = self.cpu(), time.monotonic()
        self._connect(_CLIENTS)
        self._load.settle(lambda: False, _REST)
        idle = self.idle * (time.monotonic() - began)
        self.found.append((self.cpu() - before - idle) / _CLIENTS * 1e6)

    def _connect(self, number: int) -> None:
        self._load.open(self._clients[:number])
        del self._clients[:number]


def main(names: list[str]) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    cores = processes.Cores()
    os.sched_setaffinity(0, cores.load)
    with ExitStack() as stack:
        gateways = [Gateway(name, stack, cores) for name in names]
        time.sleep(_IDLE / 2)
        before = [each.cpu() for each in gateways]
        time.sleep(_IDLE)
        for each, cpu in zip(gateways, before, strict=True):
            each.idle = (each.cpu() - cpu) / _IDLE
        for number in range(_ROUNDS):
            for each in gateways if number % 2 else reversed(gateways):
                each.go_on()
        first = median(gateways[0].found)
        for each in gateways:
            cost = median(each.found)
            print(f"{each.name:40} {cost:6.1f} µs of CPU for an accept, {cost / first:.3f} ×")


if __name__ == "__main__":
    main(sys.argv[1:] or [".", ".:WS_CLUSTER=true"])
