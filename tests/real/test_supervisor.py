"""``serve`` with several workers: how it starts and ends, with a supervisor for each test."""

import os
import resource
import signal
import socket

import pytest
import trio

from tests.support.gateways import (
    accepts,
    closed,
    connect,
    environment,
    free_port,
    http,
    metrics,
    process,
    until,
    wait,
)
from tests.support.ports import free_ports
from tests.support.supervisors import START, Master, is_python, is_served, replaced, until_ready
from trio_gateway import serve


async def answers(port: int) -> bool:
    """Whether a gateway is ready; False if it refuses the connection or does not answer yet."""
    try:
        return (await http(port, "/ws/health/ready")).status == 200
    except (OSError, trio.TooSlowError):
        return False


@pytest.mark.parametrize("change", ["death", pytest.param("sighup", marks=pytest.mark.chaos)])
async def test_workers_with_ports_of_their_own_keep_them_over_a_death_or_a_sighup(
    redis_url: str, change: str
) -> None:
    port = free_ports(2)
    command = ("trio_gateway", "serve", "-w", "2", "--own-ports", "-b", f"127.0.0.1:{port}")
    async with process(*command, env=environment(redis_url)) as started:
        master = Master(started.pid, port, port)
        for each in (port, port + 1):
            await until(lambda each=each: answers(each), 30)  # type: ignore[misc]
        async with connect(master.url(1)) as client, connect(master.url(2)) as other:
            assert await is_served(client)
            assert await is_served(other)
            assert (await http(port, "/ws/health")).json["connections"]["total"] == 2
            assert (await http(port + 1, "/ws/health")).json["connections"]["total"] == 0

        before = master.workers
        if change == "death":
            os.kill(min(before), signal.SIGKILL)
            refused: set[int] = set()
            with trio.fail_after(15):
                while not refused:
                    refused = {each for each in (port, port + 1) if not accepts(each)}
                    await trio.sleep(0.01)
            assert len(refused) == 1
            await until(lambda: answers(*refused), 30)
            assert len(master.workers & before) == 1
        else:
            os.kill(master.pid, signal.SIGHUP)
            while len(master.workers) != 2 or master.workers & before:
                assert accepts(port)
                assert accepts(port + 1)
                await trio.sleep(0.02)
        async with connect(master.url()) as client:
            assert await is_served(client)
        os.kill(started.pid, signal.SIGTERM)
        status, _, errors = await wait(started, 20)
        assert status == 0, errors.decode()


@pytest.mark.parametrize(
    ("bind", "problem"),
    [
        ("127.0.0.1:65535", "the last port is 65535"),
        ("unix:/tmp/gateway.sock", "needs host:port"),
    ],
)
def test_ports_that_workers_can_t_have_are_refused(bind: str, problem: str) -> None:
    config = serve.read_config(None, (bind,))
    config.workers = 2
    with pytest.raises(serve.BadConfig, match=problem):
        serve.supervise(config, [], {}, own_ports=True)


async def test_port_in_use_of_a_second_worker_ends_the_supervisor(redis_url: str) -> None:
    port = free_ports(2)
    with socket.create_server(("127.0.0.1", port + 1)):
        command = ("trio_gateway", "serve", "-w", "2", "--own-ports", "-b", f"127.0.0.1:{port}")
        async with process(*command, env=environment(redis_url)) as started:
            ended, _, errors = await wait(started)
    assert ended == 1
    assert f"can't serve on 127.0.0.1:{port + 1}: Address already in use" in errors.decode()


async def test_workers_do_not_outlive_a_supervisor_that_is_killed(
    redis_url: str,
) -> None:
    port = free_port()
    arguments = ["trio_gateway", "serve", "-w", "2", "-b", f"127.0.0.1:{port}"]
    async with process(*arguments, env=environment(redis_url)) as started:
        master = Master(started.pid, port, port)
        await until_ready(master, 2)
        async with connect(master.url()) as client:
            assert await is_served(client)
            workers = master.workers
            os.kill(started.pid, signal.SIGKILL)
            assert (await closed(client))[0] == 1001
        await all_gone(workers)


@pytest.mark.chaos
async def test_workers_that_were_never_ready_do_not_outlive_their_supervisor() -> None:
    port = free_port()
    arguments = ["trio_gateway", "serve", "-w", "2", "-b", f"127.0.0.1:{port}"]
    async with process(*arguments, env=environment("redis://127.0.0.1:1")) as started:
        master = Master(started.pid, port, port)
        await until_ready(master, 2)  # so wait until it answers
        workers = master.workers
        os.kill(started.pid, signal.SIGKILL)
        await all_gone(workers)


async def all_gone(workers: set[int]) -> None:
    with trio.fail_after(START):
        while any(map(is_python, workers)):
            await trio.sleep(0.05)


@pytest.mark.parametrize("change", ["none", pytest.param("sighup", marks=pytest.mark.chaos)])
async def test_without_a_temporary_folder_workers_serve_and_metrics_report_it(
    redis_url: str, change: str
) -> None:
    """No file can be written anywhere, as on a read-only file system."""
    port = free_port()
    arguments = ["trio_gateway", "serve", "-w", "2", "-b", f"127.0.0.1:{port}"]

    def write_no_file() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

    env = {k: v for k, v in environment(redis_url).items() if not k.startswith("COV")}
    async with process(*arguments, env=env, preexec_fn=write_no_file) as started:
        master = Master(started.pid, port, port)
        await until_ready(master, 2)
        assert (await metrics(port))["metrics_partial"] == 1
        async with connect(master.url()) as client:
            assert await is_served(client)
        if change == "sighup":
            before = master.workers
            os.kill(started.pid, signal.SIGHUP)
            await replaced(master, before)
        os.kill(started.pid, signal.SIGTERM)
        status, _, errors = await wait(started, 20)

    assert status == 0
    assert errors.count(b"snapshots not shared") == 1
    assert b"bug" not in errors
