"""The command line as a user sees it: processes, signals, exit statuses, output."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jwt
import pytest
import redis
import trio

from tests.support import gateways as harness
from tests.support.commands import EVENT, SAMPLES, SECRETS, clear_settings, run, run_process
from trio_gateway.cli import check_server
from trio_gateway.core.routing import ROUTES
from trio_gateway.core.tokens import read_jwt, read_legacy_table_token, read_table_token
from trio_gateway.settings import Settings
from trio_gateway.testing import make_jwt

CART = '{"type":"CART_CLEARED","tenant_id":1,"branch_id":1,"session_id":456}'


@pytest.fixture(autouse=True)
def own_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clear_settings(monkeypatch)
    monkeypatch.chdir(tmp_path)


# token


def test_minted_staff_token_is_accepted_by_the_gateway() -> None:
    options = "--user 7 --tenant 2 --branch 3 --branch 4 --role MANAGER --role WAITER --sector 5"
    done = run("token", "staff", *options.split(), "--jti", "x", env=SECRETS)
    assert done.stderr == ""
    settings = Settings(jwt_secret=harness.JWT_SECRET)
    token = done.stdout.removesuffix("\n")
    staff = read_jwt(token, settings.staff_keys, settings.rules, time.time())
    assert staff.tenant == 2
    assert staff.user == "7"
    assert sorted(staff.branches) == [3, 4]
    assert sorted(staff.roles) == ["MANAGER", "WAITER"]
    assert list(staff.sectors) == [5]
    assert staff.token_id == "x"


def test_minted_token_has_the_configured_issuer_and_audience() -> None:
    env = {**SECRETS, "JWT_ISSUER": "us", "JWT_AUDIENCE": "them", "JWT_ALGORITHMS": "HS512"}
    minted = run("token", "staff", "--life", "5", env=env).stdout.strip()
    claims = jwt.decode(minted, harness.JWT_SECRET, ["HS512"], audience="them", issuer="us")
    assert claims["exp"] - claims["iat"] == 5


def test_minted_table_tokens_are_accepted_by_the_gateway() -> None:
    options = ["--tenant", "2", "--branch", "3", "--table", "4", "--session", "5"]
    settings = Settings(table_token_secret=harness.TABLE_SECRET)
    minted = run("token", "table", *options, env=SECRETS).stdout.strip()
    table = read_table_token(minted, settings.table_keys, settings.rules, time.time())
    minted = run("token", "legacy", *options, env=SECRETS).stdout.strip()
    legacy = read_legacy_table_token(minted, harness.TABLE_SECRET, time.time())
    for found in (table, legacy):
        assert (found.tenant, found.branch, found.table, found.session) == (2, 3, 4, 5)


def test_legacy_token_has_a_warning_unless_allowed() -> None:
    assert "ALLOW_LEGACY_TABLE_TOKENS" in run("token", "legacy", env=SECRETS).stderr
    allowed = {**SECRETS, "ALLOW_LEGACY_TABLE_TOKENS": "true"}
    assert run("token", "legacy", env=allowed).stderr == ""


@pytest.mark.parametrize(
    ("kind", "name"),
    [("staff", "JWT_SECRET"), ("table", "TABLE_TOKEN_SECRET"), ("legacy", "TABLE_TOKEN_SECRET")],
)
def test_token_needs_a_secret(kind: str, name: str) -> None:
    done = run("token", kind)
    assert (done.exit_code, done.stdout) == (2, "")
    says = "set it to the gateway's value, in the environment or in .env"
    assert done.stderr == f"trio-gateway: {name} is not set: {says}\n"


def test_staff_token_needs_an_hmac_algorithm(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ed25519

    public = ed25519.Ed25519PrivateKey.generate().public_key()
    pem = public.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    env = {**SECRETS, "JWT_ALGORITHMS": "EdDSA", "JWT_PUBLIC_KEY": pem.decode()}
    done = run("token", "staff", env=env)
    assert done.exit_code == 2
    assert "can't mint a staff token: JWT_ALGORITHMS is EdDSA" in done.stderr


def test_table_token_is_valid_for_three_hours_at_most() -> None:
    assert run("token", "table", "--life", "10801", env=SECRETS).exit_code == 2


# routes


def test_routes_says_which_types_must_reach_somebody(tmp_path: Path) -> None:
    file = tmp_path / "routes.toml"
    file.write_text(
        '[routes.SERVICE_CALL_CREATED]\nmust_reach = "waiters"\nwithin = 10\n'
        'then = [{to = "floor", within = 2.5}]\n[routes.ROUND_READY]\nreceipt = true\n'
    )
    env = {"WS_ROUTES_FILE": str(file)}

    lines = run("routes", env=env).stdout.splitlines()
    assert "ROUND_READY: receipts" in lines
    assert (
        "SERVICE_CALL_CREATED: receipts; must reach waiters within 10 s, then floor within 2.5 s"
        in lines
    )
    found = json.loads(run("routes", "--json", env=env).stdout)["SERVICE_CALL_CREATED"]
    assert found["receipt"] is True
    assert found["steps"] == [{"to": "waiters", "within": 10}, {"to": "floor", "within": 2.5}]


def test_routes_shows_the_whole_table() -> None:
    done = run("routes", env={"COLUMNS": "30"})
    assert done.exit_code == 0
    row = next(line for line in done.stdout.splitlines() if "ROUND_SUBMITTED" in line)
    assert row.split() == ["ROUND_SUBMITTED", "●", "·", "·", "●", "●", "·", "yes"]
    assert all(name in done.stdout for name in ROUTES)


def test_routes_marks_what_a_file_changes(tmp_path: Path) -> None:
    file = tmp_path / "routes.toml"
    file.write_text('[routes.ROUND_READY]\nto = ["kitchen"]\n[routes.BREAD]\nto = ["floor"]\n')
    env = {"WS_ROUTES_FILE": str(file)}
    lines = run("routes", env=env).stdout.splitlines()
    assert [line.split()[0] for line in lines if line.split()[-1:] == ["changed"]] == [
        "ROUND_READY"
    ]
    assert [line.split()[0] for line in lines if line.split()[-1:] == ["new"]] == ["BREAD"]
    found = json.loads(run("routes", "--json", env=env).stdout)
    assert found["ROUND_READY"] == {
        "to": ["kitchen"],
        "durable": True,
        "receipt": False,
        "steps": [],
        "differs": "changed",
    }
    assert found["BREAD"]["to"] == ["floor"]
    assert (found["BREAD"]["durable"], found["BREAD"]["differs"]) == (False, "new")
    assert found["ROUND_SERVED"]["differs"] is None


# asyncapi


def test_completion_works_in_a_real_shell() -> None:
    line = (
        'eval "$(trio-gateway completion bash)"; COMP_WORDS=(trio-gateway ex); COMP_CWORD=1;'
        " _trio_gateway_completion trio-gateway; echo ${COMPREPLY[@]}"
    )
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    found = subprocess.run(
        ["bash", "-c", line], env=os.environ | {"PATH": path}, capture_output=True, text=True
    )

    assert found.stdout.split() == ["explain"], found.stderr
    assert run("completion", "csh").exit_code == 2


def test_asyncapi_prints_the_document_of_these_settings() -> None:
    done = run("asyncapi", env={"REDIS_STREAMS": "events:elsewhere"})
    assert done.exit_code == 0
    document = json.loads(done.stdout)
    assert document["asyncapi"] == "3.0.0"
    assert document["channels"]["stream_1"]["address"] == "events:elsewhere"


def test_openapi_prints_the_document_of_these_settings(tmp_path: Path) -> None:
    (tmp_path / "routes.toml").write_text('[routes.BREAD]\nto = ["floor"]\n')
    done = run("openapi", env={"WS_ROUTES_FILE": str(tmp_path / "routes.toml")})
    assert done.exit_code == 0
    document = json.loads(done.stdout)
    assert document["openapi"] == "3.1.0"
    assert document["x-event-types"]["BREAD"] == {"durable": False, "to": ["floor"]}


# publish


def published(backend: "redis.Redis") -> list[bytes]:
    found: Any = backend.xrange("events:critical")
    return [fields[b"data"] for _, fields in found]


def test_one_event_is_published_byte_for_byte(redis_url: str, backend: "redis.Redis") -> None:
    event = '{ "type":"ROUND_READY", "tenant_id":1,"branch_id":1, "x":1.50}'
    done = run("publish", "-", env={"REDIS_URL": redis_url}, stdin=event)
    assert done.exit_code == 0
    assert done.stdout.startswith("1 published (1 to streams, 0 on channels), 0 invalid")
    assert published(backend) == [event.encode()]


def test_event_on_several_lines_is_one_event(redis_url: str, backend: "redis.Redis") -> None:
    event = json.dumps(json.loads(EVENT), indent=2)
    assert run("publish", "-", env={"REDIS_URL": redis_url}, stdin=event + "\n").exit_code == 0
    assert published(backend) == [event.encode()]


def test_sample_events_are_published_on_their_channels(
    redis_url: str, backend: "redis.Redis"
) -> None:
    pubsub: Any
    with backend.pubsub() as pubsub:  # type: ignore[no-untyped-call]
        pubsub.psubscribe("*")
        done = run("publish", str(SAMPLES), env={"REDIS_URL": redis_url})
        assert done.exit_code == 0
        channels = []
        while message := pubsub.get_message(timeout=0.2):
            channels += [message["channel"].decode()] * (message["type"] == "pmessage")
    wanted = [json.loads(line) for line in SAMPLES.read_text("utf-8").splitlines()]
    critical = [line["event"] for line in wanted if line["channel"] == "events:critical"]
    assert [json.loads(entry) for entry in published(backend)] == critical
    assert channels == [w["channel"] for w in wanted if w["channel"] != "events:critical"]


def test_invalid_lines_are_named_and_the_others_are_published(
    redis_url: str, backend: "redis.Redis"
) -> None:
    lines = [EVENT, "{", '{"type":"X","tenant_id":0,"branch_id":1}', "", EVENT]
    done = run("publish", "-", env={"REDIS_URL": redis_url}, stdin="\n".join(lines))
    assert done.exit_code == 1
    first, second = done.stderr.splitlines()
    assert first == "line 2: event is not JSON"
    assert second.startswith("line 3: ")
    assert "2 published (2 to streams, 0 on channels), 2 invalid" in done.stdout
    assert len(published(backend)) == 2


def test_first_line_may_be_the_invalid_one(redis_url: str, backend: "redis.Redis") -> None:
    done = run("publish", "-", env={"REDIS_URL": redis_url}, stdin=f"nonsense\n{EVENT}\n")
    assert (done.exit_code, done.stderr) == (1, "line 1: event is not JSON\n")
    assert len(published(backend)) == 1


def test_now_changes_only_ts(redis_url: str, backend: "redis.Redis", tmp_path: Path) -> None:
    (tmp_path / "one").write_text(EVENT[:-1] + ',"x":1.50,"ts":"2001-01-01T00:00:00Z","v":1}')
    assert run("publish", "one", "--now", env={"REDIS_URL": redis_url}).exit_code == 0
    (entry,) = published(backend)
    assert entry.startswith(EVENT[:-1].encode() + b',"x":1.50,"ts":"2')
    assert b"2001" not in entry


def test_rate_and_repeat_are_applied(
    redis_url: str, backend: "redis.Redis", tmp_path: Path
) -> None:
    (tmp_path / "one").write_text(EVENT)
    started = time.monotonic()
    done = run("publish", "one", "--rate", "50", "--repeat", "11", env={"REDIS_URL": redis_url})
    assert done.exit_code == 0
    assert 0.2 <= time.monotonic() - started < 2
    assert len(published(backend)) == 11


def test_channel_without_a_listener_is_reported(redis_url: str, backend: "redis.Redis") -> None:
    done = run("publish", "-", env={"REDIS_URL": redis_url}, stdin=CART)
    assert done.exit_code == 0
    assert "had no subscriber" in done.stderr


def test_publish_stops_when_redis_is_down() -> None:
    env = {"REDIS_URL": f"redis://:hunter2@127.0.0.1:{harness.free_port()}"}
    done = run("publish", "-", env=env, stdin=f"{EVENT}\n{EVENT}\n")
    assert done.exit_code == 1
    assert len(done.stderr.splitlines()) == 1
    assert "can't connect to Redis at 127.0.0.1" in done.stderr
    assert "hunter2" not in done.output


@pytest.mark.parametrize("confirm", ["1", "all"])
def test_publish_stops_at_an_event_that_no_replica_confirms(
    redis_url: str, backend: "redis.Redis", confirm: str
) -> None:
    done = run(
        "publish",
        "--confirm",
        confirm,
        "-",
        env={"REDIS_URL": redis_url},
        stdin=f"{EVENT}\n{EVENT}\n",
    )
    assert done.exit_code == 1
    assert "0 of 1 replicas" in done.stderr or "has no replica" in done.stderr
    assert len(published(backend)) == 1


def test_publish_does_not_take_other_values_of_confirm(redis_url: str) -> None:
    done = run("publish", "--confirm", "most", "-", env={"REDIS_URL": redis_url}, stdin=EVENT)
    assert done.exit_code == 2
    assert 'must be a number of replicas or "all"' in done.stderr


# check


@pytest.mark.parametrize("option", [[], ["--now"]])
def test_publish_says_that_an_event_is_nested_too_deeply(redis_url: str, option: list[str]) -> None:
    event = EVENT[:-1] + ',"entity":' + "[" * 5000 + "]" * 5000 + "}"
    done = run("publish", *option, "-", env={"REDIS_URL": redis_url}, stdin=event)
    assert done.exit_code == 1
    assert "event is nested too deeply" in done.stderr


def test_publish_does_not_trim_the_stream(redis_url: str, backend: "redis.Redis") -> None:
    backend.config_set("slowlog-log-slower-than", 0)
    try:
        assert run("publish", "-", env={"REDIS_URL": redis_url}, stdin=EVENT).exit_code == 0
        said: Any = backend.slowlog_get(20)
    finally:
        backend.config_set("slowlog-log-slower-than", 10_000)
    [added] = [entry["command"] for entry in said if entry["command"].startswith(b"XADD")]
    assert b"MAXLEN" not in added


def test_check_finds_no_problem_in_a_valid_setup(redis_url: str) -> None:
    done = run("check", env={"REDIS_URL": redis_url, **SECRETS})
    assert (done.exit_code, done.stderr) == (0, "")
    assert "error" not in done.stdout
    assert done.stdout.splitlines()[-1] == "The gateway can start."


def test_check_names_the_redis_version_that_counts_entries(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_server, "MIN_REDIS", 99)
    done = run("check", env={"REDIS_URL": redis_url, **SECRETS})
    assert done.exit_code == 0
    assert "does not count the entries" in done.stdout
    assert "Redis 99" in done.stdout


def test_check_finds_that_redis_is_a_replica(redis_url: str, backend: "redis.Redis") -> None:
    backend.replicaof("127.0.0.1", "1")
    try:
        done = run("check", env={"REDIS_URL": redis_url, **SECRETS})
    finally:
        backend.replicaof("NO", "ONE")
    assert done.exit_code == 1
    assert "Redis is a replica" in done.stdout
    assert "resolves to the primary" in done.stdout


def test_check_does_not_change_redis(
    redis_url: str, backend: "redis.Redis", tmp_path: Path
) -> None:
    (tmp_path / "routes.toml").write_text(
        '[routes.SERVICE_CALL_CREATED]\nmust_reach = "waiters"\nwithin = 1\n'
    )
    settings = {
        "WS_ROUTES_FILE": str(tmp_path / "routes.toml"),
        "REDIS_STREAM_SHARDS": "8",
        "WS_CLUSTER": "true",
    }
    done = run("check", env={"REDIS_URL": redis_url, **SECRETS, **settings})
    assert "shards without clients (HSET, PEXPIRE)" in done.stdout
    assert done.exit_code == 0
    assert not backend.keys()


def test_check_gives_a_remedy_for_each_problem(redis_url: str, backend: "redis.Redis") -> None:
    backend.set("events:critical", "no stream")
    env = {
        "REDIS_URL": redis_url,
        "WS_MAX_TOTAL_CONNECTIONS": str(10**12),
    }
    done = run("check", env=env)
    assert done.exit_code == 1
    for text in (
        "JWT_SECRET is not set",
        "WRONGTYPE",
        "name another one in REDIS_STREAMS",
        "LimitNOFILE",
        "2 problems",
    ):
        assert text in done.stdout


def test_check_looks_at_every_shard(redis_url: str, backend: "redis.Redis") -> None:
    env = {"REDIS_URL": redis_url, **SECRETS, "REDIS_STREAM_SHARDS": "8"}
    assert "stream events:critical, 9 streams" in run("check", env=env).stdout
    backend.set("events:critical:{7}", "no stream")
    done = run("check", env=env)
    assert done.exit_code == 1
    assert "9 streams: events:critical:{7}: XREAD failed: WRONGTYPE" in done.stdout
    assert "one of the keys events:critical* is not a stream" in done.stdout


@pytest.mark.parametrize(
    ("settings", "published_to", "named"),
    [
        ({}, ["events:critical:{7}"], "events:critical:{7} (last"),
        ({"REDIS_STREAM_SHARDS": "8"}, ["events:critical:{7}", "events:critical"], ""),
        (
            {"REDIS_STREAM_SHARDS": "8", "REDIS_STREAM_SHARDS_PREVIOUS": "8"},
            ["events:critical", *(f"events:critical:{{{k}}}" for k in range(7, 12))],
            "events:critical, events:critical:{8}, events:critical:{9} and 2 more (last",
        ),
    ],
)
def test_check_finds_publishers_with_another_number_of_shards(
    redis_url: str,
    backend: "redis.Redis",
    settings: dict[str, str],
    published_to: list[str],
    named: str,
) -> None:
    for stream in published_to:
        backend.xadd(stream, {"data": EVENT})
    backend.xadd("events:critical:{200}", {"data": EVENT}, id="1700000000000-0")  # long ago
    done = run("check", env={"REDIS_URL": redis_url, **SECRETS, **settings})
    assert done.exit_code == 0
    assert ("not read, but published to" in done.stdout) is bool(named)
    assert named in done.stdout


def test_publish_adds_to_the_shard_of_the_tenant(redis_url: str, backend: "redis.Redis") -> None:
    done = run(
        "publish", "-", env={"REDIS_URL": redis_url, "REDIS_STREAM_SHARDS": "64"}, stdin=EVENT
    )
    assert done.exit_code == 0
    assert backend.dbsize() == 1
    assert backend.xlen("events:critical:{50}") == 1


@pytest.mark.parametrize(
    ("replies", "remedy"),
    [
        ("refused", "start Redis there, or set REDIS_URL"),
        ("WRONGPASS", "the user or the password in REDIS_URL is wrong"),
        ("NOPERM", "allow this user the keys"),
    ],
)
def test_check_names_what_redis_refuses(
    redis_url: str, backend: "redis.Redis", replies: str, remedy: str
) -> None:
    backend.execute_command(
        *["ACL", "SETUSER", "meek", "on", ">pw", "~events:*", "+client", "+xread", "+xrevrange"]  # type: ignore[no-untyped-call]
    )
    where = {
        "refused": f"redis://127.0.0.1:{harness.free_port()}",
        "WRONGPASS": redis_url.replace("//", "//meek:hunter2@"),
        "NOPERM": redis_url.replace("//", "//meek:pw@"),
    }[replies]
    done = run("check", env={"REDIS_URL": where, **SECRETS})
    assert done.exit_code == 1
    assert replies in done.stdout
    assert remedy in done.stdout
    assert "hunter2" not in done.output


@pytest.mark.parametrize("command", ["check", "routes", "serve", "serve --workers 2"])
def test_invalid_settings_are_named(command: str) -> None:
    done = run(*command.split(), env={"WS_MAX_CONECTIONS": "1", "LOG_LEVEL": "loud"})
    assert (done.exit_code, done.stdout) == (2, "")
    assert "trio-gateway: unknown setting: WS_MAX_CONECTIONS" in done.stderr
    assert "trio-gateway: LOG_LEVEL: " in done.stderr


# serve


@pytest.fixture(scope="module")
def gateway(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a gateway process, which must end with status 0 on SIGTERM."""
    port = harness.free_port()
    log = tmp_path_factory.mktemp("gateway") / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "trio_gateway", "serve", "-b", f"127.0.0.1:{port}"],
            env=harness.environment(redis_url),
            stderr=output,
        )
    try:
        ready = f"http://127.0.0.1:{port}/ws/health/ready"
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline and process.poll() is None:
            try:
                with urllib.request.urlopen(ready):
                    break
            except urllib.error.HTTPError as not_ready:
                not_ready.close()
            except OSError:
                pass
            time.sleep(0.05)
        else:
            raise AssertionError("the gateway is not ready")
        yield port
        process.terminate()
        status = process.wait(20)
    finally:
        process.kill()
        process.wait()
    errors = log.read_text()
    assert status == 0, errors
    assert "Traceback" not in errors


async def test_serve_reports_a_port_in_use(redis_url: str, gateway: int) -> None:
    bind = f"127.0.0.1:{gateway}"
    status, _, err = await run_process("serve", "-b", bind, env=harness.environment(redis_url))
    assert status == 1
    assert f"trio-gateway: can't serve on {bind}: Address already in use\n" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("workers", ["0", pytest.param("1", marks=pytest.mark.chaos)])
async def test_other_worker_class_is_refused_in_one_sentence(redis_url: str, workers: str) -> None:
    bind = f"127.0.0.1:{harness.free_port()}"
    async with harness.process(
        "hypercorn", "-k", "asyncio", "-w", workers, "-b", bind, "trio_gateway.app:app",
        env=harness.environment(redis_url),
    ) as process:  # fmt: skip
        status, _, err = await harness.wait(process)
    assert err.decode().splitlines() == [
        'trio-gateway runs on Trio only: use hypercorn -k trio (worker_class = "trio")'
    ]
    if workers == "0":  # the master of Hypercorn 0.18 loses the status of its last worker
        assert status == 2


# tail


async def test_tail_prints_one_line_of_json_per_event(
    redis_url: str, backend: "redis.Redis", gateway: int
) -> None:
    arguments = f"tail --as waiter --json --count 2 --url ws://127.0.0.1:{gateway}".split()
    async with harness.process(
        "trio_gateway", *arguments, env=harness.environment(redis_url)
    ) as process:
        assert process.stderr is not None
        connected = await trio.to_thread.run_sync(process.stderr.readline)
        assert connected.startswith(b"connected to ws://127.0.0.1")
        backend.publish("branch:1:waiters", EVENT)
        backend.publish("branch:1:waiters", EVENT.replace(",", ",\n"))
        status, out, _ = await harness.wait(process)
    assert (status, out.decode()) == (0, f"{EVENT}\n{EVENT.replace(',', ', ')}\n")


async def test_tail_loses_no_event_if_its_reader_stalls_and_ends_with_ctrl_c(
    redis_url: str, backend: "redis.Redis", gateway: int
) -> None:
    arguments = f"tail --as waiter --json --url ws://127.0.0.1:{gateway}".split()
    events = [EVENT.replace("}", f',"n":{n},"data":"{"x" * 1000}"}}') for n in range(200)]
    async with harness.process(
        "trio_gateway", *arguments, env=harness.environment(redis_url)
    ) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        await trio.to_thread.run_sync(process.stderr.readline)
        for _ in range(2):  # 200 KB, into a pipe that holds 64
            for text in events:
                backend.publish("branch:1:waiters", text)
            await trio.sleep(0.2)
            seen = [process.stdout.readline().decode().rstrip() for _ in range(100)]
            assert seen == events[:100]
            seen = [process.stdout.readline().decode().rstrip() for _ in range(100)]
            assert seen == events[100:]
        for text in events:
            backend.publish("branch:1:waiters", text)
        await trio.sleep(0.2)
        with trio.fail_after(3):
            while process.poll() is None:
                process.send_signal(signal.SIGINT)  # an impatient user
                await trio.sleep(0.002)
        _, err = process.communicate()
    assert (process.returncode, err) == (0, b"")


@pytest.mark.parametrize(
    ("command", "full", "status"),
    [("routes", "stdout", 1), ("check", "stdout", 1), ("nonsense", "stderr", 2)],
)
def test_command_that_cannot_write_ends_with_one_line_and_its_status(
    redis_url: str, command: str, full: str, status: int
) -> None:
    with open("/dev/full", "wb") as disk:
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, full: disk}
        arguments = [sys.executable, "-m", "trio_gateway", command]
        ended = subprocess.run(arguments, env=harness.environment(redis_url), timeout=20, **pipes)
    assert ended.returncode == status
    if full == "stdout":
        assert ended.stderr == b"trio-gateway: can't write: No space left on device\n"


@pytest.mark.parametrize("endpoint", [
    "waiter",
    "diner",
    pytest.param("kitchen", marks=pytest.mark.chaos),
    pytest.param("admin", marks=pytest.mark.chaos),
])  # fmt: skip
async def test_tail_is_admitted_on_every_endpoint_and_ends_with_ctrl_c(
    redis_url: str, backend: "redis.Redis", gateway: int, endpoint: str
) -> None:
    arguments = f"tail --as {endpoint} --url ws://127.0.0.1:{gateway}".split()
    async with harness.process(
        "trio_gateway", *arguments, env=harness.environment(redis_url)
    ) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        await trio.to_thread.run_sync(process.stderr.readline)
        product = '{"type":"PRODUCT_AVAILABILITY_CHANGED","tenant_id":1,"branch_id":1}'
        backend.publish("branch:1:waiters", product)
        summary = await trio.to_thread.run_sync(process.stdout.readline)
        assert endpoint in summary.decode().split()
        assert "PRODUCT_AVAILABILITY_CHANGED branch 1" in " ".join(summary.decode().split())
        assert (await trio.to_thread.run_sync(process.stdout.readline)).strip() == product.encode()
        process.send_signal(signal.SIGINT)
        status, out, err = await harness.wait(process)
    assert (status, out, err) == (0, b"", b"")


def test_tail_reports_why_it_is_refused(redis_url: str, gateway: int) -> None:
    where = f"ws://127.0.0.1:{gateway}"
    env = {**harness.environment(redis_url), "TRIO_GATEWAY_TOKEN": "nonsense"}
    done = run("tail", "--url", where, env=env)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith(
        "trio-gateway: closed by the gateway: 4001 AUTH_FAILED (token invalid)"
    )
    env = {**harness.environment(redis_url), "JWT_SECRET": "another" * 8}
    done = run("tail", "--url", where, env=env)
    assert (done.exit_code, done.stdout) == (1, "")
    assert "4001 AUTH_FAILED" in done.stderr
    assert done.stderr.endswith("(it was signed with the JWT_SECRET that is set here)\n")

    arguments = f"tail --as kitchen --role WAITER --url {where}".split()
    done = run(*arguments, env=harness.environment(redis_url))
    assert (done.exit_code, done.stdout) == (1, "")
    assert "4003 FORBIDDEN" in done.stderr
    assert len(done.stderr.splitlines()) == 1


async def test_tail_reconnects_and_prints_the_missed_events(
    redis_url: str, backend: "redis.Redis"
) -> None:
    async with harness.running(harness.make_settings(redis_url)) as gateway:
        arguments = f"tail --as waiter --json --count 2 --url {gateway.url}".split()
        env = harness.environment(redis_url)
        async with harness.process("trio_gateway", *arguments, env=env) as process:
            assert process.stderr is not None
            assert b"connected to" in await trio.to_thread.run_sync(process.stderr.readline)
            backend.xadd("events:critical", {"data": EVENT})
            await harness.settle(gateway)
            (connection,) = gateway.app.parts.hub.connections
            connection.abort()
            backend.xadd("events:critical", {"data": EVENT.replace("READY", "SERVED")})
            status, out, err = await harness.wait(process)
    assert status == 0
    types = [json.loads(line)["type"] for line in out.decode().splitlines()]
    assert types == ["ROUND_READY", "ROUND_SERVED"]
    lost, again = err.decode().splitlines()
    assert lost.startswith(f"the connection to 127.0.0.1:{gateway.port} broke: is the gateway")
    assert "; reconnecting in " in lost
    assert again.startswith("connected again to ws://127.0.0.1")


def test_tail_without_a_gateway_shows_how_to_start_one(redis_url: str) -> None:
    where = f"ws://127.0.0.1:{harness.free_port()}"
    done = run("tail", "--url", where, env=harness.environment(redis_url))
    assert done.exit_code == 1
    assert done.stderr.startswith("trio-gateway: nothing listens on 127.0.0.1:")
    assert "trio-gateway serve" in done.stderr


def test_tail_reports_a_server_that_is_not_a_gateway(redis_url: str, gateway: int) -> None:
    where = f"ws://127.0.0.1:{gateway}/elsewhere"
    done = run("tail", "--url", where, env=harness.environment(redis_url))
    assert done.exit_code == 1
    assert f"127.0.0.1:{gateway} answers with HTTP 404" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("url", ["http://", "redis://x", "ws://x?token=y", "ws://x:y"])
def test_tail_refuses_an_invalid_address(url: str) -> None:
    done = run("tail", "--url", url, "--token", "x")
    assert done.exit_code == 2
    assert "--url" in done.stderr


# explain


async def test_explain_asks_a_gateway_for_connected_clients(redis_url: str, gateway: int) -> None:
    where = f"ws://127.0.0.1:{gateway}"
    waiter = make_jwt(harness.JWT_SECRET)
    async with harness.admitted(f"{where}/ws/waiter?token={waiter}"):
        arguments = ["explain", "-", "--json", "--url", where, "--token", waiter]
        done = await trio.to_thread.run_sync(lambda: run(*arguments, env=SECRETS, stdin=EVENT))
    assert (done.exit_code, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["connections"] == {"waiter": 1, "kitchen": 0, "admin": 0, "diner": 0}
    assert found["tokens"][0]["endpoints"] == ["waiter"]


@pytest.mark.parametrize(
    ("token", "path", "error"),
    [
        ("nonsense", "", "HTTP 401 (token invalid): put a token of this gateway"),
        (
            make_jwt(harness.JWT_SECRET),
            "",
            "HTTP 403 (for the role ADMIN only): put a token of an",
        ),
        ("nonsense", "/elsewhere", "HTTP 404: there is no gateway"),
        ("hunter2\n", "", "the value of TRIO_GATEWAY_TOKEN is not a token"),
        ("hünter2", "", "the value of TRIO_GATEWAY_TOKEN is not a token"),
    ],
)
def test_explain_reports_why_a_gateway_does_not_answer(
    gateway: int, token: str, path: str, error: str
) -> None:
    where = f"http://127.0.0.1:{gateway}{path}"
    env = {"TRIO_GATEWAY_TOKEN": token}
    done = run("explain", "-", "--url", where, env=env, stdin=EVENT)
    assert (done.exit_code, done.stdout) == (1, "")
    assert error in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert token.strip() not in done.stderr


# all


def test_start_of_the_cli_imports_little() -> None:
    code = (
        "import sys; import trio_gateway.cli;"
        "print(sorted({'trio', 'quart', 'redis', 'pydantic', 'rich'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
