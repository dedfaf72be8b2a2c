"""The files of the package that are served unchanged."""

from importlib.resources import files

import pytest
from quart import Response

from tests.support.gateways import make_settings
from trio_gateway.gateway import create_app
from trio_gateway.web.static import ASYNCAPI, FILES, OPENAPI


async def get(path: str, **headers: str) -> Response:
    """The response of a gateway without Redis."""
    app = create_app(make_settings("redis://127.0.0.1:1"))
    response: Response = await app.test_client().get(path, headers=headers)
    return response


@pytest.mark.parametrize("path", FILES)
async def test_file_of_the_package_is_served_unchanged_with_a_fixed_content_type(
    path: str,
) -> None:
    name, content_type, _ = FILES[path]
    response = await get(path)
    assert response.status_code == 200
    body = await response.get_data(as_text=False)
    assert body == files("trio_gateway").joinpath("static", name).read_bytes()
    assert response.headers["Content-Type"] == f"{content_type}; charset=utf-8"
    assert response.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize("path", [*FILES, ASYNCAPI, OPENAPI])
async def test_unchanged_file_is_304(path: str) -> None:
    first = await get(path)
    assert first.headers["Cache-Control"] == "no-cache"
    again = await get(path, **{"If-None-Match": first.headers["ETag"]})
    assert again.status_code == 304
    assert await again.get_data(as_text=False) == b""
    changed = await get(path, **{"If-None-Match": '"another"'})
    assert changed.status_code == 200


async def test_page_of_any_origin_may_import_the_client() -> None:
    response = await get("/ws/client.js", Origin="https://anywhere.example")
    assert response.headers["Access-Control-Allow-Origin"] == "*"
