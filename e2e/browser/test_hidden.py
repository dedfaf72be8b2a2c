"""Pages in a hidden tab, whose timers Chromium holds up for a minute.

Playwright keeps every page visible, so this speaks to Chromium itself (Chrome DevTools Protocol).
"""

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from websockets.sync.client import ClientConnection, connect

from tests.support.gateways import JWT_SECRET
from tests.support.processes import GatewayProcess
from trio_gateway.testing import make_jwt

from .gateways import serving, until

pytestmark = pytest.mark.browser
THROTTLING = "IntensiveWakeUpThrottling:grace_period_seconds/1"  # instead of five minutes
# Counts the workers of the page, and how often they wake it.
COUNTING = """
  window.workers = window.woken = 0;
  window.Worker = class extends Worker {
    constructor(url) {
      super(url);
      workers++;
      this.addEventListener("message", () => woken++);
    }
  };
"""


class Chromium:
    """A browser with its tabs."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._sent = 0

    def call(self, method: str, session: str | None = None, **params: Any) -> Any:
        self._sent += 1
        message: dict[str, Any] = {"id": self._sent, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        self._socket.send(json.dumps(message))
        while True:
            answer = json.loads(self._socket.recv(timeout=20))
            if answer.get("id") == self._sent:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, url: str) -> "Tab":
        """A new tab, which hides the others."""
        target = self.call("Target.createTarget", url=url)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Target.activateTarget", targetId=target)
        return Tab(self, session)


class Tab:
    def __init__(self, browser: Chromium, session: str) -> None:
        self._browser, self._session = browser, session

    def run(self, expression: str) -> Any:
        """What an expression gives in the page."""
        params = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        answer = self._browser.call("Runtime.evaluate", self._session, **params)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def freeze(self, frozen: bool) -> None:
        """Stop all that runs in the page, or let it run again."""
        state = "frozen" if frozen else "active"
        self._browser.call("Page.setWebLifecycleState", self._session, state=state)


@contextmanager
def chromium(profile: Path) -> Iterator[Chromium]:
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    assert program is not None, "chromium is not installed"
    options = [
        "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--remote-debugging-port=0", f"--user-data-dir={profile}",
        f"--enable-features={THROTTLING}",
    ]  # fmt: skip
    with subprocess.Popen(
        [program, *options, "about:blank"], stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stderr is not None
            found = next(filter(None, (re.search(r"ws://\S+", line) for line in process.stderr)))
            with connect(found[0], max_size=None) as socket:
                yield Chromium(socket)
        finally:
            process.terminate()


def closed(gateway: GatewayProcess) -> dict[str, float]:
    """How many connections have ended, by their close code."""
    with urlopen(f"{gateway.url}/ws/metrics", timeout=5) as reply:
        text = reply.read().decode()
    found = re.findall(
        r'^wsgateway_connections_closed_total\{code="(\d+)"\} (\S+)$', text, re.MULTILINE
    )
    return {code: float(n) for code, n in found if float(n)}


def connected(gateway: GatewayProcess) -> int:
    with urlopen(f"{gateway.url}/ws/health", timeout=5) as reply:
        total: int = json.load(reply)["connections"]["total"]
        return total


@pytest.mark.parametrize("worker", [True, False], ids=["worker", "no worker"])
def test_a_hidden_tab_keeps_its_connections(redis_url: str, tmp_path: Path, worker: bool) -> None:
    """Those of the console, and one of a client of its own."""
    token = make_jwt(JWT_SECRET, roles=["KITCHEN"], sub="44")
    own = f"""
      import("/ws/client.js").then(({{ connect }}) => {{
        window.gateway = connect({{ url: "/ws/kitchen", token: "{token}" }});
      }})
    """
    with (
        serving(
            redis_url, WS_CONSOLE_TOKENS="true", WS_HEARTBEAT_TIMEOUT="8", WS_CLEANUP_INTERVAL="1"
        ) as gateway,
        chromium(tmp_path) as browser,
    ):
        page = browser.open(f"{gateway.url}/ws/console")
        until(lambda: page.run("document.getElementById('link')?.textContent") == "live")
        page.run(COUNTING if worker else "delete window.Worker")
        page.run(own)
        until(lambda: page.run("window.gateway?.state") == "open")
        page.run("document.getElementById('endpoint').value = 'diner'")
        page.run("document.getElementById('connect').click()")
        state = "document.getElementById('playState').textContent"
        until(lambda: page.run(state) == "connected to /ws/diner")
        page.run("window.ticks = []; setInterval(() => ticks.push(performance.now()), 1000)")
        browser.open("about:blank")
        until(lambda: page.run("document.visibilityState") == "hidden")
        gaps = "Math.max(0, ...ticks.map((at, i) => at - (ticks[i - 1] ?? at)))"
        until(lambda: page.run(gaps) > 20_000, seconds=150)
        time.sleep(2)
        assert closed(gateway) == {}
        assert page.run("document.getElementById('link').textContent") == "live"
        assert page.run(state) == "connected to /ws/diner"
        assert page.run("gateway.state") == "open"
        if worker:  # one for each connection
            assert page.run("workers") == 3
            assert page.run("woken") > 10


def test_a_page_that_was_frozen_is_connected_again_when_it_runs_again(
    redis_url: str, tmp_path: Path
) -> None:
    """As phones and energy savers do; the gateway has ended its connections meanwhile."""
    with (
        serving(
            redis_url, WS_CONSOLE_TOKENS="true", WS_HEARTBEAT_TIMEOUT="2", WS_CLEANUP_INTERVAL="0.5"
        ) as gateway,
        chromium(tmp_path) as browser,
    ):
        page = browser.open(f"{gateway.url}/ws/console")
        text = "document.getElementById('link')?.textContent"
        until(lambda: page.run(text) == "live")
        page.freeze(True)
        until(lambda: closed(gateway) == {"4008": 1})
        page.freeze(False)
        until(lambda: connected(gateway) == 1 and page.run(text) == "live", seconds=10)
