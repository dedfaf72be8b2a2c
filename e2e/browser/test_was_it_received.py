"""The console's tab *Was it received?*."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from playwright.sync_api import Browser, Page, expect
from websockets.sync.client import connect

from tests.support.gateways import JWT_SECRET
from tests.support.processes import GatewayProcess
from trio_gateway.testing import make_jwt

from .consoles import check_accessibility, console
from .gateways import serving

pytestmark = pytest.mark.browser
ROUTES = """
[routes.SERVICE_CALL_CREATED]
must_reach = "waiters"
within = 2
then = [{to = "floor", within = 60}]
"""


@pytest.fixture(scope="module")
def gateway(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    routes = tmp_path_factory.mktemp("routes") / "routes.toml"
    routes.write_text(ROUTES)
    with serving(redis_url, WS_CONSOLE_TOKENS="true", WS_ROUTES_FILE=str(routes)) as found:
        yield found


@pytest.fixture
def page(browser: Browser, gateway: GatewayProcess) -> Iterator[Page]:
    with console(browser, gateway) as found:
        yield found


def publish(redis_url: str, **keys: Any) -> None:
    event = {"type": "SERVICE_CALL_CREATED", "tenant_id": 1, "branch_id": 1, "sector_id": 5}
    with redis.Redis.from_url(redis_url) as backend:
        backend.xadd("events:critical", {"data": json.dumps(event | keys)})


def test_path_of_a_call_that_nobody_confirms_is_followed_until_somebody_does(
    page: Page, gateway: GatewayProcess, redis_url: str
) -> None:
    page.set_viewport_size({"width": 375, "height": 740})
    token = make_jwt(JWT_SECRET, sub="22", sector_ids=[6])
    with connect(f"ws://127.0.0.1:{gateway.port}/ws/waiter?token={token}") as colleague:
        publish(redis_url)
        page.get_by_role("tab", name="Was it received?").click()
        heard = page.locator("#heard button")
        heard.filter(has_text="SERVICE_CALL_CREATED").first.focus()
        page.keyboard.press("Enter")
        expect(page.locator("#pathTitle")).to_contain_text("SERVICE_CALL_CREATED")
        summary = page.locator("#pathSummary")
        expect(summary).to_contain_text("waiters: nobody has confirmed yet")
        expect(page.locator("#pathTimeline .ahead")).to_contain_text("the event goes to floor")
        expect(summary).to_contain_text("waiters: nobody was connected for 2 s")
        event_id = json.loads(colleague.recv(timeout=10))["event_id"]
        expect(page.locator("#pathId")).to_have_value(event_id)
        expect(page.locator("#pathClients")).to_contain_text("user 22 (waiter)")
        assert page.evaluate("document.documentElement.scrollWidth") <= 375
        check_accessibility(page)
        page.get_by_role("button", name="Dark").click()
        check_accessibility(page)
        colleague.send(json.dumps({"type": "ack", "last_event_id": event_id}))
        expect(summary).to_contain_text("floor: confirmed after")
        expect(page.locator("#pathState")).to_have_text("")
    # The report that an admin gets leads to the event, too.
    heard.filter(has_text="nobody in waiters has confirmed").click()
    expect(summary).to_contain_text("You asked for the EVENT_UNHEARD")
    expect(page.locator("#pathTitle")).to_contain_text(event_id)


def test_path_of_an_event_in_the_playground_and_of_an_id_that_is_typed(
    page: Page, redis_url: str
) -> None:
    page.get_by_role("tab", name="Playground").click()
    page.get_by_label("Endpoint").select_option("waiter")
    page.get_by_role("button", name="Connect", exact=True).click()
    expect(page.locator("#playState")).to_have_text("connected to /ws/waiter")
    publish(redis_url, type="ROUND_READY")
    page.get_by_role("log").get_by_role("button", name="Path").click()
    expect(page.get_by_role("tabpanel", name="Was it received?")).to_be_visible()
    expect(page.locator("#pathSummary")).to_contain_text("Receipts are not kept for ROUND_READY")


def test_id_of_which_nothing_is_known_is_explained(
    browser: Browser, gateway: GatewayProcess
) -> None:
    with console(browser, gateway, expected="responded with a status of 4") as page:
        page.get_by_role("tab", name="Was it received?").click()
        for typed, words in {
            "x": "event_id must be the id of one event",
            "1-0-4723": "nothing is known of this event: it is older",
        }.items():
            page.get_by_label("Event id").fill(typed)
            page.keyboard.press("Enter")
            expect(page.locator("#pathState")).to_contain_text(words)
            expect(page.locator("#pathFound")).to_be_hidden()
