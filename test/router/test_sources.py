"""Instances that have fallen silent, and watchers that must not."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import subprocess
import sys
import time
from collections import Counter

import orjson
import pytest
import zmq

from router.fleet import FakeEngine, eventually, fleet, free_port, request_status
from router.test_faults import limits, metric
from router.test_proxy import STREAM, run
from router.test_rescheduler import Scripted, always, history, order
from sglang_star_router.members import Endpoint


@pytest.mark.parametrize("how", ["stale", "unhealthy"])
def test_nothing_is_moved_off_a_dead_source(how):
    async def check():
        policy = Scripted()
        a, b = FakeEngine(), FakeEngine()
        async with fleet(
            a, b, policies={"rescheduler_policy": policy}, status_stale=600.0
        ) as running:
            await running.publish(a, request_status("r1"))
            await running.publish(b)
            await eventually(lambda: policy.snapshots and policy.snapshots[-1].requests.rids)
            assert policy.snapshots[-1].requests.movable.tolist() == [True]
            if how == "stale":
                running.instance(a).status_at -= 1000.0
            else:
                a.health_status = 500
                await eventually(lambda: not running.instance(a).healthy)
            seen = len(policy.snapshots)
            await eventually(lambda: len(policy.snapshots) > seen)
            assert policy.snapshots[-1].requests.movable.tolist() == [False]
            # Whatever a policy says.
            policy.script = always(order("r1", a, b))
            await eventually(lambda: running.router.rescheduler.skipped["source"] >= 2)
            assert a.orders == []

    run(check())


class HalfOpen:
    """A TCP relay that can stop passing bytes without closing anything."""

    def __init__(self, port: int) -> None:
        self.port = free_port()
        self._to = port
        self.frozen: set[int] = set()
        self.connections = 0
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> HalfOpen:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        return self

    def freeze(self) -> None:
        self.frozen = set(range(self.connections))

    async def _serve(self, reader, writer):
        number, self.connections = self.connections, self.connections + 1
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", self._to)

        async def pump(source, sink):
            with contextlib.suppress(ConnectionError):
                while data := await source.read(65536):
                    if number in self.frozen:
                        await asyncio.Event().wait()
                    sink.write(data)

        self._tasks += [
            asyncio.create_task(pump(reader, inner_writer)),
            asyncio.create_task(pump(inner_reader, writer)),
        ]

    async def close(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def test_a_status_socket_that_hangs_half_open_is_opened_again():
    async def check():
        engine = await FakeEngine().start()
        link = await HalfOpen(engine.pub_port).start()
        engine.told_port = link.port
        async with fleet(engine, start=False, status_stale=1.0) as running:
            await running.until_healthy()
            await running.publish(engine)
            link.freeze()
            # The engine talks all the time, and nothing of it arrives on the old connection.
            await running.publish(engine)
            assert link.connections >= 2
            await link.close()

    run(check())


STALLED = """
import asyncio, sys, time
import zmq, zmq.asyncio
from sglang_star.fleet_key import Unlocked
from sglang_star_router.telemetry import RECEIVE_QUEUE, subscribe

async def main():
    context = zmq.asyncio.Context()
    with context.socket(zmq.SUB) as socket:
        subscribe(socket, Unlocked(), sys.argv[1])
        await socket.recv_multipart()
        time.sleep(6)  # the loop has other things to do, and the queue fills up
        for _ in range(20 * RECEIVE_QUEUE):
            await socket.recv_multipart()
    print("read on")

asyncio.run(main())
"""


def test_a_stall_that_fills_the_queue_of_statuses_does_not_end_the_router():
    context = zmq.Context()
    publisher = context.socket(zmq.PUB)
    port = publisher.bind_to_random_port("tcp://127.0.0.1")
    command = [sys.executable, "-c", STALLED, f"tcp://127.0.0.1:{port}"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        while child.poll() is None:
            publisher.send(b"a status")
            time.sleep(0.001)
        assert (child.returncode, child.communicate()[0]) == (0, "read on\n")
    finally:
        child.kill()
        publisher.close(linger=0)
        context.term()


def test_moves_expire_without_a_rescheduler():
    async def check():
        a, b = FakeEngine(), FakeEngine()
        async with fleet(a, b, move_report_timeout=0.2, move_cooldown=0.1) as running:
            await running.publish(a, request_status("r1"))
            status, _ = await running.post("/star/migrate", {"rid": "r1", "target": b.name})
            assert status == 202
            await eventually(lambda: history(running)[0].state == "lost")
            await eventually(lambda: not running.router.ledger.busy)

    run(check())


def test_a_watcher_outlives_what_nobody_thought_of(caplog):
    async def check():
        engine = await FakeEngine().start()
        async with fleet(engine, start=False) as running:
            instance = running.instance(engine)
            await running.until_healthy()
            # No name resolver takes it: not an error of any kind that was thought of.
            right = instance.endpoint
            wrong = "a" * 70 + ".invalid"
            instance.endpoint = Endpoint(right.url, wrong, right.port, False)
            running.router.pool.close()
            await eventually(lambda: "check" in " ".join(r.getMessage() for r in caplog.records))
            instance.endpoint = right
            engine.health_status = 500
            await eventually(lambda: not instance.healthy)

    run(check())


@contextlib.contextmanager
def router_process(engines, *flags: str, limit: str):
    port = free_port()
    command = [
        sys.executable, "-m", "sglang_star_router.launch_router", "--port", str(port),
        "--policy", "round-robin", "--worker-urls", *(one.url for one in engines), *flags,
    ]  # fmt: skip
    child = subprocess.Popen(["sh", "-c", f'ulimit {limit}; exec "$@"', "sh", *command])
    try:
        yield child, f"http://127.0.0.1:{port}"
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()


async def until_up(session, url: str) -> None:
    while True:
        with contextlib.suppress(OSError):
            async with session.get(url + "/health") as answer:
                if answer.status == 200:
                    return
        await asyncio.sleep(0.05)


def test_the_soft_limit_of_descriptors_is_raised():
    import aiohttp

    async def check():
        engine = await FakeEngine().start()
        with router_process([engine], limit="-Sn 100") as (child, url):
            async with aiohttp.ClientSession() as session:
                await until_up(session, url)
            with open(f"/proc/{child.pid}/limits") as limits_:
                soft, hard = re.search(r"Max open files\s+(\d+)\s+(\d+)", limits_.read()).groups()
            assert soft == hard
        await engine.stop()

    run(check())


def test_running_out_of_descriptors_costs_no_engine_its_health():
    import aiohttp

    streams = 120

    async def check():
        gate = asyncio.Event()
        engines = [await FakeEngine(gate=gate).start() for _ in range(2)]
        flags = ("--descriptor-reserve", "40", "--health-check-interval-secs", "0.2")
        with router_process(engines, *flags, limit="-n 160") as (_, url):
            connector = aiohttp.TCPConnector(limit=0, force_close=True)
            async with aiohttp.ClientSession(connector=connector) as session:
                await until_up(session, url)

                async def one():
                    async with session.post(url + "/generate", json=STREAM) as answer:
                        body = await answer.read()
                        return answer.status, answer.headers.get("Retry-After"), body

                tasks = [asyncio.create_task(one()) for _ in range(streams)]
                await eventually(
                    lambda: sum(e.active for e in engines) + sum(t.done() for t in tasks) == streams
                )
                served = sum(engine.active for engine in engines)
                gate.set()
                answers = await asyncio.gather(*tasks)
                assert served > 20
                assert sum(status == 200 for status, _, _ in answers) == served
                refused = [(status, after) for status, after, _ in answers if status != 200]
                assert refused
                assert all(status == 503 and int(after) >= 1 for status, after in refused)
                async with session.get(url + "/metrics") as answer:
                    text = await answer.text()
                assert 'star_router_local_errors_total{what="descriptors"}' in text
                healthy = re.findall(r"star_router_instance_healthy\{.*\} (\S+)", text)
                assert healthy == ["1.0", "1.0"]
                assert not re.findall(r'attempts_total\{.*outcome="(?!ok").*', text)
        for engine in engines:
            await engine.stop()

    run(check())


@pytest.mark.parametrize("clients", [120, 600])
def test_nobody_is_hung_up_on_for_want_of_descriptors(clients):
    """Many more connections at once than descriptors: each gets an answer, be it a refusal."""
    import aiohttp

    async def check():
        engine = await FakeEngine().start()
        with router_process([engine], limit="-n 160") as (_, url):
            async with aiohttp.ClientSession() as session:
                await until_up(session, url)
            host, _, port = url.removeprefix("http://").partition(":")
            body = orjson.dumps(STREAM)
            request = (
                b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
            ) + body
            # All are connected before the first of them asks.
            streams = await asyncio.gather(
                *(asyncio.open_connection(host, int(port)) for _ in range(clients))
            )
            for _, writer in streams:
                writer.write(request)
            answers = await asyncio.gather(*(reader.read() for reader, _ in streams))
            for _, writer in streams:
                writer.close()
            statuses = Counter(answer[9:12] for answer in answers)
            async with aiohttp.ClientSession() as session, session.get(url + "/metrics") as told:
                text = await told.text()
            counts = re.findall(r"^star_router_(?:slow_heads|local_errors).* .*$", text, re.M)
            assert set(statuses) <= {b"200", b"503"}, (statuses, counts)
            assert statuses[b"200"] > 20
            assert all(b"Retry-After" in one for one in answers if one[9:12] == b"503")
        await engine.stop()

    run(check())


def test_idle_clients_do_not_keep_others_out():
    import aiohttp

    async def check():
        engine = await FakeEngine().start()
        with router_process([engine], limit="-n 160") as (_, url):
            async with aiohttp.ClientSession() as session:
                await until_up(session, url)
            host, _, port = url.removeprefix("http://").partition(":")
            idle = []
            for _ in range(300):
                reader, writer = await asyncio.open_connection(host, int(port))
                writer.write(b"GET /liveness HTTP/1.1\r\nHost: x\r\n\r\n")
                assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
                idle.append(writer)
            for writer in idle:
                writer.close()
        await engine.stop()

    run(check())


def test_a_client_that_leaves_is_no_outcome_of_the_engine():
    async def check():
        engine = FakeEngine(stall=True)
        async with fleet(engine, faults=limits()) as running:
            request = asyncio.create_task(running.post("/generate", STREAM))
            await eventually(lambda: engine.active)
            request.cancel()
            await eventually(lambda: engine.disconnects)
            name = f'attempts_total{{instance="{engine.name}",outcome="left"}}'
            assert await metric(running, name) == 1
            assert running.instance(engine).breaker.tally() == (0, 0)

    run(check())
