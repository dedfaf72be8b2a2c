"""The console's tab *Who is connected*, with two processes."""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect
from websockets.sync.client import ClientConnection, connect

from tests.support.gateways import JWT_SECRET, TABLE_SECRET
from tests.support.processes import GatewayProcess
from trio_gateway.testing import make_jwt, make_table_token

from .consoles import console
from .gateways import serving

pytestmark = pytest.mark.browser
GRACE = 0.5  # seconds


@contextmanager
def started(redis_url: str) -> Iterator[GatewayProcess]:
    settings = {"WS_CLUSTER": "true", "WS_PRESENCE_GRACE": str(GRACE), "WS_CONSOLE_TOKENS": "true"}
    with serving(redis_url, **settings) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def first(redis_url: str) -> Iterator[GatewayProcess]:
    with started(redis_url) as found:
        yield found


@pytest.fixture
def second(redis_url: str) -> Iterator[GatewayProcess]:
    with started(redis_url) as found:
        yield found


@pytest.fixture
def page(browser: Browser, first: GatewayProcess) -> Iterator[Page]:
    with console(browser, first) as found:
        found.get_by_role("tab", name="Who is connected").click()
        yield found


def staff(gateway: GatewayProcess, endpoint: str, user: int, **claims: Any) -> ClientConnection:
    roles = [endpoint.upper()]
    token = make_jwt(JWT_SECRET, roles=roles, sub=str(user), sector_ids=[5, 6], **claims)
    return connect(f"ws://127.0.0.1:{gateway.port}/ws/{endpoint}?token={token}")


def diner(gateway: GatewayProcess, session: int) -> ClientConnection:
    token = make_table_token(TABLE_SECRET, session_id=session)
    return connect(f"ws://127.0.0.1:{gateway.port}/ws/diner?table_token={token}")


def rows(page: Page, endpoint: str) -> Any:
    return page.locator(f"#present-{endpoint} tr")


def test_who_comes_and_leaves_is_shown_for_all_processes_together(
    page: Page, first: GatewayProcess, second: GatewayProcess
) -> None:
    expect(page.locator("#presenceState")).to_have_text("all processes together, live")
    expect(rows(page, "kitchen")).to_have_text(["nobody"])
    with ExitStack() as clients:
        one = clients.enter_context(staff(first, "waiter", 21))
        clients.enter_context(staff(second, "waiter", 9))
        clients.enter_context(staff(second, "waiter", 21))  # another device
        clients.enter_context(staff(second, "waiter", 22, branch_ids=[2]))
        clients.enter_context(staff(second, "waiter", 23, tenant_id=2))
        clients.enter_context(diner(second, 456))
        expect(rows(page, "waiter")).to_have_text([re.compile("^95, 6"), re.compile("^215, 6")])
        expect(rows(page, "diner")).to_have_text(["45610"])
        expect(page.locator("#present .figure span")).to_have_text(["2", "0", "1", "1"])
        one.close()
        page.locator("#branch").select_option("2")
        expect(rows(page, "waiter")).to_have_text([re.compile("^22")])
        page.locator("#branch").select_option("1")
        expect(rows(page, "waiter")).to_have_count(2)
    expect(rows(page, "waiter")).to_have_text(["nobody"])
    expect(rows(page, "diner")).to_have_text(["nobody"])


def test_one_process_can_be_chosen_until_it_ends(
    page: Page, first: GatewayProcess, second: GatewayProcess
) -> None:
    expect(page.locator("#nodes tr")).to_have_count(2)
    expect(page.locator("#nodes")).to_contain_text("in service")
    assert second.process is not None
    other = re.compile(rf"-{second.process.pid}-")
    name = page.locator("#process").locator("option", has_text=other).inner_text()
    with staff(first, "waiter", 21), staff(second, "waiter", 9), diner(second, 456):
        expect(rows(page, "waiter")).to_have_count(2)
        page.locator("#process").select_option(name)
        expect(page.locator("#presenceState")).to_have_text(f"{name} alone, every 3 seconds")
        expect(rows(page, "waiter")).to_have_text([re.compile("^9")])
        expect(rows(page, "diner")).to_have_count(1)
        second.process.terminate()
        second.process.wait()
        expect(page.locator("#process")).to_have_value("", timeout=15_000)
        expect(page.locator("#presenceState")).to_contain_text(f"{name} has ended.")
        expect(rows(page, "waiter")).to_have_text([re.compile("^21")])
        expect(page.locator("#nodes tr")).to_have_count(1)


def test_process_that_hangs_is_named_and_does_not_hold_up_the_page(
    page: Page, first: GatewayProcess, second: GatewayProcess
) -> None:
    import signal

    assert second.process is not None
    other = re.compile(rf"-{second.process.pid}-")
    name = page.locator("#process").locator("option", has_text=other).inner_text()
    page.locator("#process").select_option(name)
    expect(page.locator("#presenceState")).to_have_text(f"{name} alone, every 3 seconds")
    second.process.send_signal(signal.SIGSTOP)
    try:
        expect(page.locator("#presenceState")).to_have_text(f"{name} does not answer")
    finally:
        second.process.send_signal(signal.SIGCONT)


def test_without_the_setting_the_page_says_what_to_do(browser: Browser, redis_url: str) -> None:
    with (
        serving(redis_url, WS_CONSOLE_TOKENS="true") as alone,
        console(browser, alone) as page,
    ):
        page.get_by_role("tab", name="Who is connected").click()
        expect(page.get_by_role("tabpanel")).to_contain_text("Set WS_CLUSTER=true")
        expect(page.locator("#branch")).to_be_hidden()
        expect(page.locator("#processes")).to_be_hidden()
