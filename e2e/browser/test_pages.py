"""Pages of other origins call the gateway over HTTP, as a browser lets them."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from tests.support.gateways import JWT_SECRET, TABLE_SECRET
from tests.support.processes import GatewayProcess
from trio_gateway.testing import make_jwt, make_table_token

from .gateways import serving

pytestmark = pytest.mark.browser


class _EmptyPage(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[int]:
    """The port of a web server that has nothing to do with the gateway."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _EmptyPage) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.fixture(scope="module")
def gateway(redis_url: str, site: int) -> Iterator[GatewayProcess]:
    with serving(redis_url, ALLOWED_ORIGINS=f"http://localhost:{site}") as found:
        yield found


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    context = browser.new_context()
    yield context.new_page()
    context.close()


SEEN = '{"event_id":"1-0-4723"}'
FETCH = """async ([url, options]) => {
    try {
        const reply = await fetch(url, options);
        const header = (name) => reply.headers.get(name);
        return [reply.status, await reply.json().catch(() => null), header("WWW-Authenticate")];
    } catch (error) { return error.name; }
}"""

STREAM = """async (url) => {
    const source = new EventSource(url);
    const opened = await new Promise((tell) => {
        source.onopen = () => tell(true);
        source.onerror = () => tell(false);
    });
    source.close();
    return opened;
}"""


def fetch(
    page: Page, url: str, method: str = "GET", token: str | None = None, body: str = ""
) -> Any:
    options: dict[str, Any] = {"method": method, "headers": {}}
    if token is not None:
        options["headers"]["Authorization"] = f"Bearer {token}"
    if body:
        options |= {"body": body}
        options["headers"]["Content-Type"] = "application/json"
    return page.evaluate(FETCH, [url, options])


def test_page_on_an_allowed_origin_calls_every_path_and_reads_refusals(
    page: Page, gateway: GatewayProcess, site: int
) -> None:
    page.goto(f"http://localhost:{site}/")
    token, url = make_jwt(JWT_SECRET, roles=["ADMIN"]), gateway.url
    status, body, _ = fetch(page, f"{url}/ws/ticket", "POST", token)
    assert (status, body["expires_in"]) == (200, 30)
    event = '{"event":{"type":"ROUND_READY","tenant_id":1,"branch_id":1}}'
    assert fetch(page, f"{url}/ws/explain", "POST", token, event)[0] == 200
    assert fetch(page, f"{url}/ws/catchup?branch_id=1&since=0", token=token)[1]["count"] == 0
    assert page.evaluate(STREAM, f"{url}/ws/admin/events?token={token}")
    assert fetch(page, f"{url}/ws/receipts", "POST", token, SEEN)[0] == 204

    assert fetch(page, f"{url}/ws/ticket", "POST", "x.y")[::2] == [401, "Bearer"]
    assert fetch(page, f"{url}/ws/catchup?branch_id=0", token=token)[0] == 422
    assert fetch(page, f"{url}/ws/ticket", "PUT", token) == "TypeError"  # not a method of the path


def test_page_on_another_origin_reads_only_what_is_the_diners(
    page: Page, gateway: GatewayProcess, site: int
) -> None:
    page.goto(f"http://127.0.0.1:{site}/")
    token, url = make_jwt(JWT_SECRET, roles=["ADMIN"]), gateway.url
    assert fetch(page, f"{url}/ws/ticket", "POST", token) == "TypeError"
    assert fetch(page, f"{url}/ws/catchup?branch_id=1&since=0&token={token}") == "TypeError"
    assert not page.evaluate(STREAM, f"{url}/ws/admin/events?token={token}")
    assert fetch(page, f"{url}/ws/receipts?event_id=1-0-4723", token=token) == "TypeError"
    assert fetch(page, f"{url}/ws/receipts", "POST", token, SEEN)[0] == 403

    table = make_table_token(TABLE_SECRET)
    session = f"{url}/ws/catchup/session?session_id=456&since=0"
    assert fetch(page, session, token=table)[0] == 200
    assert fetch(page, session, token="x.y")[0] == 401
    assert fetch(page, f"{url}/ws/receipts", "POST", table, SEEN)[0] == 204
    assert page.evaluate(STREAM, f"{url}/ws/diner/events?table_token={table}")
