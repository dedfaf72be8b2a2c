"""The console in the browser."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, ConsoleMessage, Page, expect

from tests.support.processes import GatewayProcess

expect.set_options(timeout=10_000)


@contextmanager
def console(
    browser: Browser, gateway: GatewayProcess, expected: str = "ERR_CONNECTION"
) -> Iterator[Page]:
    """The open console; at the end it must have called no other server, and have logged no errors
    but those with this text.
    """
    errors: list[str] = []
    requested: set[str] = set()

    def record(message: ConsoleMessage) -> None:
        refused = "WebSocket connection" in message.text or expected in message.text
        if message.type in {"error", "warning"} and not refused:  # while the gateway is down
            errors.append(message.text)

    context = browser.new_context(color_scheme="light")
    found = context.new_page()
    found.on("console", record)
    found.on("pageerror", lambda error: errors.append(str(error)))
    found.on("request", lambda request: requested.add(request.url.split("/ws/")[0]))
    found.goto(f"{gateway.url}/ws/console")
    expect(found.locator("#link")).to_have_text("live")
    yield found
    context.close()
    assert errors == []
    assert requested <= {gateway.url, "data:,"}


def check_accessibility(page: Page) -> None:
    """Fail if axe-core finds anything serious in what the page shows."""
    axe = os.environ.get("AXE")
    assert axe, "nox -s browser sets the path of axe-core"
    time.sleep(0.3)  # colours have a transition
    page.evaluate(Path(axe).read_text("utf-8"))  # not a script tag: the page allows none
    found = page.evaluate("axe.run().then(({ violations }) => violations)")
    serious = [
        (each["id"], [node["html"] for node in each["nodes"]])
        for each in found
        if each["impact"] in {"serious", "critical"}
    ]
    assert serious == []
