"""The console as an operator uses it."""

import json
import re
from collections.abc import Iterator
from typing import Any
from urllib.request import urlopen

import pytest
import redis
from playwright.sync_api import Browser, Page, expect

from tests.support.gateways import JWT_SECRET
from tests.support.processes import GatewayProcess
from trio_gateway.testing import make_jwt

from .consoles import check_accessibility, console
from .gateways import is_ready, serving, until

pytestmark = pytest.mark.browser
TABS = ["Live", "Who is connected", "Playground", "Was it received?", "Who receives this?"]


@pytest.fixture(scope="module")
def backend(redis_url: str) -> Iterator["redis.Redis"]:
    with redis.Redis.from_url(redis_url) as found:
        yield found


@pytest.fixture(scope="module")
def gateway(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    routes = tmp_path_factory.mktemp("routes") / "routes.toml"
    routes.write_text("[routes.SERVICE_CALL_CREATED]\nreceipt = true\n")
    settings = {
        "WS_CONSOLE_TOKENS": "true", "WS_CLUSTER": "true", "WS_ROUTES_FILE": str(routes),
    }  # fmt: skip
    with serving(redis_url, **settings) as found:
        yield found


@pytest.fixture
def page(browser: Browser, gateway: GatewayProcess) -> Iterator[Page]:
    with console(browser, gateway) as found:
        yield found


def publish(backend: "redis.Redis", marker: object, **keys: Any) -> None:
    event = {
        "type": "ROUND_READY", "tenant_id": 1, "branch_id": 1, "sector_id": 5, "session_id": 456,
        "marker": marker,
    }  # fmt: skip
    backend.xadd("events:critical", {"data": json.dumps(event | keys)})


def join(page: Page, endpoint: str) -> None:
    page.get_by_role("tab", name="Playground").click()
    page.get_by_label("Endpoint").select_option(endpoint)
    page.get_by_role("button", name="Connect", exact=True).click()
    expect(page.locator("#playState")).to_have_text(f"connected to /ws/{endpoint}")


def test_figures_change_with_events(page: Page, backend: "redis.Redis") -> None:
    expect(page.locator("#endpoints")).to_contain_text("admin1")
    expect(page.locator("#breakers")).to_contain_text("link: streamsconnected")
    events = page.locator("#stats .card").nth(1).locator(".figure span")
    expect(events).to_have_text("0")
    for n in range(50):
        publish(backend, n)
    expect(events).not_to_have_text("0")
    written = page.get_by_role("row", name="written, 5 min")
    expect(written).to_contain_text(re.compile(r"written, 5 min[1-9].*ms"))
    chart = page.locator("#stats svg").nth(1)
    expect(chart).to_have_attribute(
        "aria-label", re.compile(r"Events a second, last two minutes: now .+, at most [1-9]")
    )
    page.set_viewport_size({"width": 360, "height": 740})
    times = page.get_by_role("region", name="Delivery times")
    assert times.evaluate("(table) => table.scrollWidth - table.clientWidth") == 0


@pytest.mark.parametrize("endpoint", ["waiter", "kitchen", "admin", "diner"])
def test_every_role_receives_its_events_in_the_playground(
    page: Page, backend: "redis.Redis", endpoint: str
) -> None:
    join(page, endpoint)
    log = page.get_by_role("log")
    publish(backend, f"for {endpoint}")
    expect(log).to_contain_text(f"for {endpoint}")
    page.get_by_role("button", name="Ping").click()
    expect(log).to_contain_text('{"type":"pong"}')
    if endpoint == "waiter":
        page.get_by_role("button", name="Refresh sectors").click()
        expect(log).to_contain_text('"sector_ids":[5]')
    leave = page.get_by_role("button", name="Disconnect")
    leave.focus()
    page.keyboard.press("Enter")
    expect(leave).to_be_disabled()
    expect(leave).to_be_focused()
    page.keyboard.press("Enter")
    expect(log.get_by_text("disconnected")).to_have_count(1)


def test_published_sample_is_received(page: Page) -> None:
    join(page, "waiter")
    page.get_by_label("Sample").select_option("SERVICE_CALL_CREATED")
    page.get_by_role("button", name="Publish").click()
    expect(page.locator("#published")).to_have_text("published on the stream events:critical")
    expect(page.get_by_role("log")).to_contain_text('"SERVICE_CALL_CREATED"')
    page.locator("#event").fill("{")
    page.get_by_role("button", name="Publish").click()
    expect(page.locator("#published")).to_have_text("not valid JSON")


def test_event_with_receipts_can_be_confirmed_by_keyboard(
    page: Page, backend: "redis.Redis", gateway: GatewayProcess
) -> None:
    join(page, "waiter")
    page.set_viewport_size({"width": 375, "height": 700})
    log = page.get_by_role("log")
    publish(backend, "untracked")
    publish(backend, "tracked", type="SERVICE_CALL_CREATED")
    button = log.get_by_role("button", name="Seen: SERVICE_CALL_CREATED")
    button.focus()
    page.keyboard.press("Enter")
    expect(button).to_be_disabled()
    expect(button).to_be_focused()
    page.keyboard.press("Enter")
    expect(log.get_by_role("button", name="Seen")).to_have_count(1)
    (event_id,) = re.findall(r"^.* seen ([\w-]+)$", log.inner_text(), re.MULTILINE)
    token = make_jwt(JWT_SECRET, roles=["ADMIN"])
    url = f"{gateway.url}/ws/receipts?event_id={event_id}&token={token}"

    def states() -> set[tuple[str, str]]:
        with urlopen(url) as reply:
            return {(each["endpoint"], each["state"]) for each in json.load(reply)["by"]}

    # The page has a connection as an admin, too, which shows events to nobody.
    until(lambda: states() == {("waiter", "seen"), ("admin", "written")})


def test_page_reports_a_lost_gateway_reconnects_and_resumes(
    page: Page, backend: "redis.Redis", gateway: GatewayProcess
) -> None:
    join(page, "kitchen")
    log = page.get_by_role("log")
    publish(backend, "before")
    expect(log).to_contain_text('"before"')
    gateway.kill()
    try:
        expect(page.locator("#link")).to_contain_text("connection lost")
        expect(page.locator("#playState")).to_contain_text("connection lost")
        expect(page.locator("#playWait")).to_contain_text("reconnecting in")
        publish(backend, "meanwhile")
    finally:
        gateway.start_sync()
        until(lambda: is_ready(gateway))
    expect(page.locator("#link")).to_have_text("live", timeout=20_000)
    expect(log).to_contain_text('"meanwhile"', timeout=20_000)
    publish(backend, "after")
    expect(log).to_contain_text('"after"')
    text = log.inner_text()
    assert [text.count(f'"{word}"') for word in ("before", "meanwhile", "after")] == [1, 1, 1]


def test_recipients_of_an_event_are_shown(page: Page) -> None:
    page.get_by_role("tab", name="Who receives this?").click()
    waiter = make_jwt(JWT_SECRET, sector_ids=[7])
    page.get_by_label("Tokens to check").fill(waiter)
    page.get_by_role("button", name="Ask").click()
    verdict = page.locator("#verdict")
    expect(verdict).to_contain_text("ROUND_READY: durable")
    expect(verdict).to_contain_text("waiters: branch 1, sector 5")
    expect(verdict).to_contain_text("does not receive it")
    expect(verdict).to_contain_text("sector")


def test_every_control_is_reachable_by_keyboard(page: Page) -> None:
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Dark")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    page.keyboard.press("Tab")
    expect(page.get_by_role("tab", name="Live")).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Who is connected")).to_be_focused()
    expect(page.get_by_role("tabpanel", name="Who is connected")).to_be_visible()
    page.keyboard.press("End")
    expect(page.get_by_role("tab", name="Who receives this?")).to_have_attribute(
        "aria-selected", "true"
    )
    page.keyboard.press("Home")
    expect(page.get_by_role("tabpanel", name="Live")).to_be_visible()


@pytest.mark.parametrize("tab", TABS)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_accessibility_check_finds_nothing_serious(page: Page, tab: str, theme: str) -> None:
    if theme == "dark":
        page.get_by_role("button", name="Dark").click()
    page.get_by_role("tab", name=tab).click()
    check_accessibility(page)


@pytest.mark.parametrize("tab", TABS)
def test_it_fits_a_phone(page: Page, tab: str) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    page.get_by_role("tab", name=tab).click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    small = page.evaluate(
        "[...document.querySelectorAll('button, select, input')].filter((each) =>"
        " each.offsetParent && each.getBoundingClientRect().height < 44).length"
    )
    assert small == 0


def test_in_production_only_admins_open_it(browser: Browser, redis_url: str) -> None:
    production = serving(
        redis_url, ENVIRONMENT="production", ALLOWED_ORIGINS="http://127.0.0.1:{port}"
    )
    with production as gateway:
        context = browser.new_context()
        try:
            page = context.new_page()
            page.goto(f"{gateway.url}/ws/console")
            for role, answer in {
                "WAITER": "not an ADMIN's",
                "MANAGER": "not an ADMIN's",
            }.items():
                page.get_by_label("Token").fill(make_jwt(JWT_SECRET, roles=[role]))
                page.get_by_role("button", name="Open").click()
                expect(page.get_by_role("alert")).to_contain_text(answer)
            page.get_by_label("Token").fill(make_jwt(JWT_SECRET, roles=["ADMIN"], sub="5"))
            page.get_by_role("button", name="Open").click()
            expect(page.locator("#link")).to_have_text("live")
            page.get_by_role("tab", name="Playground").click()
            expect(page.locator("#publisher")).to_be_hidden()
            assert "eyJ" not in page.url
            assert (
                page.evaluate(
                    "Object.keys(localStorage).length + Object.keys(sessionStorage).length"
                )
                == 0
            )
        finally:
            context.close()
