"""Origins: compared as browsers compare them, in any notation."""

import pytest

from trio_gateway.core.origins import is_loopback, is_own_page, normalise, read_origin

ORIGINS = [
    "http://localhost:5176", "https://a.b", "https://A.b:443", "http://[::1]:80", "capacitor://x",
    "http://10.0.0.1",
]  # fmt: skip
NO_ORIGINS = [
    "", "null", "*", "a.b", "//a.b", "http:", "http://", "http:a.b", "http://a.b/", "http://a.b/c",
    "http://a.b?", "http://a.b#", "http://u@a.b", "http://u:p@a.b", "http://a.b:", "http://a.b:x",
    "http://a.b:0", "http://a.b:65536", "http://a.b:-1", "http://a b", " http://a.b",
    "http://a.b ", "http://a.b\n", "http://ñ.b", "http://a.b,http://c.d", "http://[::1", "null ",
    "http://:80", "http://a.b\\c", "http://a.b:123456", "http://*.b", 'http://a"b', "http://\u212a.b",
    "http://a.b:٨٠", "://a.b", "http://[a.b]x", "http://a,b", "1http://a.b", "http://a.b:80:80",
    "http://[:::1]", "http://[1.2.3.4]",
]  # fmt: skip


@pytest.mark.parametrize("text", ORIGINS)
def test_an_origin_is_scheme_host_and_port(text: str) -> None:
    assert normalise(text)


@pytest.mark.parametrize("text", NO_ORIGINS)
def test_anything_else_is_not_an_origin(text: str) -> None:
    with pytest.raises(ValueError, match=r"not scheme|no such port| in '"):
        normalise(text)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("https://app.example.com:443", "https://app.example.com"),
        ("HTTPS://App.Example.Com", "https://app.example.com"),
        ("http://a.b:80", "http://a.b"),
        ("http://a.b:08080", "http://a.b:8080"),
        ("https://[::1]:443", "https://[0:0:0:0:0:0:0:1]"),
        ("http://[2001:DB8::A]", "http://[2001:db8:0::a]:80"),
        ("wss://a.b:443", "wss://a.b"),
    ],
)
def test_same_origin_in_two_forms(a: str, b: str) -> None:
    assert normalise(a) == normalise(b)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("http://a.b:443", "http://a.b"),
        ("https://a.b:80", "https://a.b"),
        ("http://a.b", "https://a.b"),
        ("https://a.b", "https://a.b."),
        ("https://a.b", "https://c.a.b"),
        ("capacitor://x:80", "capacitor://x"),
    ],
)
def test_different_origins_stay_different(a: str, b: str) -> None:
    assert normalise(a) != normalise(b)


@pytest.mark.parametrize(
    ("written", "sent"),
    [
        ("https://Straße.example", "https://xn--strae-oqa.example"),
        ("https://café.example:443", "https://xn--caf-dma.example"),
        ("http://例え.jp:8080", "http://xn--r8jz45g.jp:8080"),
    ],
)
def test_name_in_any_script_becomes_what_a_browser_sends(written: str, sent: str) -> None:
    assert read_origin(written) == sent
    with pytest.raises(ValueError, match="not scheme"):  # on the wire it is ASCII
        normalise(written)


@pytest.mark.parametrize("text", ["https://é é.example", "https://é.example/", "https://é@b", "é"])
def test_invalid_origin_in_any_script_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        read_origin(text)


@pytest.mark.parametrize("host", ["localhost", "LocalHost", "127.0.0.1", "127.9.9.9", "::1"])
def test_loopback_addresses_and_localhost_are_this_machine(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["", "localhost.evil.example", "10.0.0.1", "a.localhost", "::"])
def test_other_names_and_addresses_are_not_this_machine(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize("host", ["localhost:8001", "127.0.0.1:8001", "[::1]:8001", "localhost"])
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_page_that_was_served_on_this_machine_is_our_own(host: str, scheme: str) -> None:
    assert is_own_page(f"{scheme}://{host}", host)


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("http://rebound.example:8001", "rebound.example:8001"),
        ("http://localhost:8002", "localhost:8001"),
        ("http://127.0.0.1:8001", "localhost:8001"),
        ("null", "localhost:8001"),
        (None, "localhost:8001"),
        ("http://localhost:8001", ""),
    ],
    ids=["DNS rebinding", "another port", "another name", "null", "no origin", "no host"],
)
def test_other_page_is_not_our_own(origin: str | None, host: str) -> None:
    assert not is_own_page(origin, host)
