"""Redis URLs: what they may contain, and that an error shows no secret."""

import re
import ssl
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import redis
import redis.asyncio
import trustme
from hypothesis import given
from hypothesis import strategies as st

from trio_gateway.publisher import Publisher
from trio_gateway.redis_tls import Tls
from trio_gateway.redis_url import RedisAddress, RedisKind, RedisUrl
from trio_gateway.settings import Settings


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://", RedisAddress()),
        ("redis://h:7/3", RedisAddress("h", 7, db=3)),
        ("redis://u%40:p%2Fw@h?db=2", RedisAddress("h", db=2, user="u@", password="p/w")),
        ("redis://h?username=u&password=p&client_name=x",
         RedisAddress("h", user="u", password="p", client_name="x")),
        ("unix:///run/r.sock?db=1", RedisAddress(path="/run/r.sock", db=1)),
        ("unix://u:p@/run/r.sock", RedisAddress(path="/run/r.sock", user="u", password="p")),
        ("rediss://h", RedisAddress("h", tls=Tls())),
        ("rediss://h?ssl_cert_reqs=none&ssl_check_hostname=false&ssl_min_version=772",
         RedisAddress("h", tls=Tls(cert_reqs="none", check_hostname=False,
                              min_version=ssl.TLSVersion.TLSv1_3))),
        ("redis://h?socket_timeout=9&decode_responses=true&protocol=3",
         RedisAddress("h", ignored=("decode_responses", "protocol", "socket_timeout"))),
    ],
)  # fmt: skip
def test_url_is_read(url: str, address: RedisAddress) -> None:
    assert RedisAddress.from_url(url) == address
    assert RedisUrl.from_url(url) == RedisUrl(RedisKind.SINGLE, (address,), address)
    for library in (redis, redis.asyncio):
        options = address.pool_options(library)
        kind = options.pop("connection_class")
        kind(**options)  # it takes them all


def test_sentinels_have_their_own_port_and_the_nodes_the_database() -> None:
    url = RedisUrl.from_url("redis+sentinel://u:p%40w@a,b:1,[::1]:2,b:1/my-master/3?client_name=x")
    data = RedisAddress("a", 26379, db=3, user="u", password="p@w", client_name="x")
    assert url.kind is RedisKind.SENTINEL
    assert url.master_name == "my-master"
    assert [(each.host, each.port, each.db) for each in url.seeds] == [
        ("a", 26379, 0), ("b", 1, 0), ("::1", 2, 0),
    ]  # fmt: skip
    assert str(url) == "a:26379,b:1,[::1]:2/my-master"
    assert url.node("n", 5) == replace(data, host="n", port=5)
    assert not url.node("n", 5).optional_auth


@pytest.mark.parametrize(
    ("options", "credentials"),
    [
        ("", ("u", "p", True)),  # tried; a Sentinel without a password refuses them
        ("?sentinel_password=s", (None, "s", False)),
        ("?sentinel_username=v&sentinel_password=s", ("v", "s", False)),
        ("?sentinel_password=", (None, None, False)),
    ],
)
def test_sentinels_may_have_credentials_of_their_own(
    options: str, credentials: tuple[str | None, str | None, bool]
) -> None:
    url = RedisUrl.from_url(f"redis+sentinel://u:p@a/m{options}")
    (seed,) = url.seeds
    assert (seed.user, seed.password, seed.optional_auth) == credentials
    assert (url.data.user, url.data.password) == ("u", "p")
    assert "p" not in {*re.findall(r"\w+", f"{url!r} {url}")}


@pytest.mark.parametrize("path", ["", "/", "/0", "?db=0"])
def test_nodes_of_a_cluster_have_the_usual_port_and_no_database(path: str) -> None:
    url = RedisUrl.from_url(f"redis+cluster://:p@a,[::1]{path}")
    assert url.kind is RedisKind.CLUSTER
    assert url.seeds == (RedisAddress("a", password="p"), RedisAddress("::1", password="p"))
    assert str(url) == "a:6379,[::1]:6379"


@pytest.mark.parametrize("scheme", ["sentinel", "cluster"])
def test_tls_is_for_all_servers_of_a_url(scheme: str) -> None:
    name = "/m" if scheme == "sentinel" else ""
    url = RedisUrl.from_url(f"rediss+{scheme}://a,b{name}?ssl_cert_reqs=none")
    for each in (*url.seeds, url.node("c", 1)):
        assert each.tls == Tls(cert_reqs="none")


REFUSED = [
    ("http://h", "must begin with redis://"),
    ("redis://h:x", "an invalid port"),
    ("redis://h/one", "database that is not a number"),
    ("redis://h/1/2", "database that is not a number"),
    ("redis://h?db=-1", "database that is not a number"),
    ("unix://", "no path of a unix socket"),
    ("redis://[h", "is not a URL"),
    ("rediss://h?ssl_ca_cert=x", "unknown option: ssl_ca_cert .did you mean ssl_ca_certs"),
    ("rediss://h?ssl_validate_ocsp=1", "unknown option: ssl_validate_ocsp"),
    ("redis://h?sentinel=1", "unknown option: sentinel"),
    ("unix:///s?port=1", "unknown option: port"),
    ("redis://h?ssl_ca_certs=/ca", "ssl_ca_certs, which needs rediss://"),
    ("unix:///s?ssl_cert_reqs=none", "ssl_cert_reqs, which needs rediss://"),
    ("rediss://h?ssl_cert_reqs=maybe", "ssl_cert_reqs, which must be one of none"),
    ("rediss://h?ssl_check_hostname=perhaps", "ssl_check_hostname, which must be true"),
    ("rediss://h?ssl_min_version=1", "ssl_min_version, which must be 771"),
    ("rediss://h?ssl_include_verify_flags=X", "ssl_include_verify_flags, which must be"),
    ("rediss://h?ssl_ca_certs=", "empty ssl_ca_certs"),
    ("rediss://h?ssl_ca_certs=a&ssl_ca_certs=b", "ssl_ca_certs twice"),
    ("rediss://h?ssl_keyfile=/nowhere", "ssl_keyfile needs ssl_certfile"),
    ("rediss://h?ssl_ca_certs=/nowhere/ca.pem", "ssl_ca_certs can't be read"),
    ("rediss://h?ssl_certfile=/nowhere/c.pem", "ssl_certfile can't be read"),
    ("rediss://h?ssl_ciphers=none-such", "ssl_ciphers can't be used"),
    ("redis://a,b", "several hosts: write redis.sentinel://"),
    ("redis://h?sentinel_password=x", "sentinel_password, which needs redis.sentinel://"),
]
REFUSED_BY_NAME = [
    ("redis+sentinel://h", "must name the primary"),
    ("redis+sentinel://h?db=1", "must name the primary"),
    ("redis+sentinel://h/a%20b", "must name the primary"),
    ("redis+sentinel://h/m/one", "database that is not a number"),
    ("redis+sentinel://h/m/1/2", "database that is not a number"),
    ("redis+sentinel://a,,b/m", "no host between two commas"),
    ("redis+sentinel://u:p@/m", "none at all"),
    ("redis+sentinel://a:x/m", "an invalid port"),
    ("redis+sentinel://a,b:99999/m", "an invalid port"),
    ("redis+sentinel://[::1/m", "is not a URL"),
    ("redis+sentinel://a/m?sentinal_password=x", "did you mean sentinel_password"),
    ("redis+sentinel://a/m?ssl_ca_certs=/ca", "ssl_ca_certs, which needs rediss://"),
    ("rediss+sentinel://a/m?ssl_ca_certs=/nowhere/ca.pem", "ssl_ca_certs can't be read"),
    ("redis+cluster://a/1", "a Cluster has only database 0"),
    ("redis+cluster://a?db=2", "a Cluster has only database 0"),
    ("redis+cluster://a/mymaster", "database that is not a number"),
    ("redis+cluster://a?sentinel_password=x", "sentinel_password, which needs redis.sentinel://"),
    ("rediss+cluster://a?ssl_certfile=/nowhere/c.pem", "ssl_certfile can't be read"),
    ("unix+sentinel:///s", "must begin with redis://"),
    ("sentinel://h/m", "must begin with redis://"),
]


@pytest.mark.parametrize(("url", "why"), REFUSED)
def test_invalid_url_stops_the_start(url: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Settings(redis_url=url)
    with pytest.raises(ValueError, match=why):
        Publisher(url)


@pytest.mark.parametrize(("url", "why"), REFUSED_BY_NAME)
def test_invalid_url_of_a_redis_that_fails_over_stops_the_start(url: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Settings(redis_url=url)


@pytest.mark.parametrize(
    "url",
    [
        "redis://:hun?ter2=x@h", "redis://u:1?hunter2=x@h:6379", "redis://h?hunter",
        "redis://:1#hunter2@h", "redis://:[hunter2@h", "redis://:hunter2@h?Hunter2=1",
        "redis://:hunter2@h?nothing=hunter2", "redis://:hunter2@h:hunter2",
        "rediss://h?ssl_password=hunter2&ssl_certfile=/nowhere",
        "redis+sentinel://:hun?ter2=x@h/m", "redis+sentinel://:h/unter2@h/m",
        "redis+sentinel://:hunter2@h", "redis+sentinel://:hunter2@,h/m",
        "redis+sentinel://h,:hunter2/m", "redis+sentinel://:[hunter2@h/m",
        "redis+sentinel://h/m?sentinel_password=hunter2&sentinel_password=hunter2",
        "redis+cluster://:1#hunter2@h", "redis+cluster://:hunter2@h/1",
        "redis+cluster://h?sentinel_password=hunter2",
    ],
)  # fmt: skip
def test_no_part_of_a_password_is_shown(url: str) -> None:
    for refuse in (Publisher, lambda url: Settings(redis_url=url)):
        with pytest.raises(ValueError, match=r"\w") as refused:
            refuse(url)
        # pydantic's own text contains the input; we show only the message of each error.
        errors = getattr(refused.value, "errors", lambda: [{"msg": str(refused.value)}])()
        assert not [each for each in errors if "hunter" in each["msg"].lower()]


_PARTS = st.text(st.sampled_from("ab1:@/?#[],%&=. "), max_size=6)


@given(
    scheme=st.sampled_from(["redis", "rediss+sentinel", "redis+sentinel", "redis+cluster"]),
    parts=st.tuples(_PARTS, _PARTS),
    option=st.sampled_from(["", "?db=", "?sentinel_password=", "&ssl_password=", "?x"]),
)
def test_any_text_is_a_url_or_is_refused_without_showing_it(
    scheme: str, parts: tuple[str, str], option: str
) -> None:
    before, after = parts
    try:
        url = RedisUrl.from_url(f"{scheme}://{before}:hunter2{after}{option}hunter2")
    except ValueError as refused:
        shown = "".join(traceback.format_exception_only(refused))
        is_all = refused.__suppress_context__ or refused.__context__ is None
    else:
        public = [url.master_name, url.data.user, url.data.client_name]
        public += [each for seed in url.seeds for each in (seed.host, seed.user, seed.path)]
        if any("hunter" in (each or "") for each in public):
            return
        shown, is_all = f"{url!r} {url}", True
    assert "hunter" not in shown
    assert is_all  # no other exception is shown with it


def test_options_without_effect_are_named() -> None:
    settings = Settings(redis_url="redis://h?socket_timeout=9&db=1")
    assert [w for w in settings.warnings if w.startswith("REDIS_URL")] == [
        "REDIS_URL: socket_timeout has no effect: the gateway sets it itself"
    ]


def test_key_with_a_password_is_read_only_with_it(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    leaf = trustme.CA().issue_cert("client")
    for blob in leaf.cert_chain_pems:
        blob.write_to_path(tmp_path / "cert.pem")
    key = serialization.load_pem_private_key(leaf.private_key_pem.bytes(), None)
    locked = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"hunter2"),
    )
    (tmp_path / "key.pem").write_bytes(locked)
    url = f"rediss://h?ssl_certfile={tmp_path}/cert.pem&ssl_keyfile={tmp_path}/key.pem"

    RedisAddress.from_url(f"{url}&ssl_password=hunter2").check()
    for wrong in ("", "&ssl_password=other"):
        with pytest.raises(ValueError, match="ssl_certfile and ssl_keyfile can't be used"):
            RedisAddress.from_url(url + wrong).check()
