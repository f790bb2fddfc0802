"""A process with network access and no key, or only a client's, tries what it should not reach.

Over real sockets: a router in front of fake engines, and the sockets of a real engine (no model
behind them: nothing that reaches its mailbox would be stopped there). All of it is refused, and
the router's metrics say how often.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from pathlib import Path

import orjson
import pytest
import zmq

from router.fleet import WAIT_S, FakeEngine, eventually, fleet, request_status
from router.test_proxy import STREAM, run
from sglang_star.fleet_key import FleetKey, create
from sglang_star.migration.links import Links
from sglang_star.protocol import Heartbeat, Peer, Release, Route, TokenChunk, Tokens, encode
from unit.test_protocol import MESSAGES

CLIENT = {"Authorization": "Bearer client"}
ADMIN = {"Authorization": "Bearer admin"}
KEYS = {"api_key": "client", "admin_api_key": "admin"}
VICTIM = request_status("victim")


class Lair:
    """Where the attacker listens: nothing of the fleet may ever connect to it."""

    async def __aenter__(self) -> Lair:
        self.visits = 0
        self._server = await asyncio.start_server(self._visit, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._server.close()

    async def _visit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.visits += 1
        writer.close()


def attacks(engine: FakeEngine, lair: Lair) -> list[tuple[str, str, object]]:
    """What needs the admin's key."""
    return [
        # list requests
        ("GET", "/star/cluster", None),
        ("GET", "/star/migrations?limit=1000", None),
        # have a prompt sent to itself, and make somebody connect out
        ("POST", "/star/migrate", {"rid": "victim", "target": lair.url}),
        ("POST", "/star/drain", {"instance": engine.name, "targets": [lair.url]}),
        # end a stream, or all of them
        ("POST", "/abort_request", {"rid": "victim"}),
        ("POST", "/abort_request", {"rid": "", "abort_all": True}),
        ("POST", "/flush_cache", None),
        ("GET", "/flush_cache", None),
        ("POST", "/star/drain", {"instance": engine.name}),
        ("POST", "/star/undrain", {"instance": engine.name}),
        ("POST", "/start_profile", {}),
        ("POST", "/stop_profile", {}),
    ]


ORDINARY = [
    ("POST", "/generate", STREAM),
    ("POST", "/v1/chat/completions", {"messages": []}),
    ("GET", "/v1/responses/resp_1", None),
    ("POST", "/v1/responses/resp_1/cancel", None),
    ("GET", "/v1/models", None),
    ("GET", "/server_info", None),
    ("GET", "/v1/realtime", None),
]
"""What needs the client's."""


async def counted(running, name):
    """The sum of a counter over its labels."""
    text = (await running.get("/metrics"))[1].decode()
    return sum(float(n) for n in re.findall(rf"^star_router_{name}(?:{{.*}})? (.+)$", text, re.M))


async def tried(running, headers, what):
    statuses = []
    for method, path, body in what:
        async with running.session.request(
            method, running.url + path, json=body, headers=headers, allow_redirects=False
        ) as answer:
            assert b"victim" not in await answer.read(), path
            statuses.append(answer.status)
    return statuses


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer x"}, CLIENT])
def test_over_http(headers):
    async def check():
        engine = FakeEngine()
        async with Lair() as lair, fleet(engine, **KEYS) as running:
            await running.publish(engine, VICTIM)
            what = attacks(engine, lair) + (ORDINARY if headers != CLIENT else [])
            assert await tried(running, headers, what) == [401] * len(what)
            assert await counted(running, "denied_total") == len(what)
            assert engine.requests == engine.orders == engine.others == []
            assert lair.visits == 0
            assert not running.instance(engine).draining

    run(check())


def test_an_order_names_instances_of_the_fleet_whoever_gives_it():
    async def check():
        engine, other = FakeEngine(), FakeEngine()
        async with Lair() as lair, fleet(engine, other, **KEYS) as running:
            await running.publish(engine, VICTIM)
            for path, body in (
                ("/star/migrate", {"rid": "victim", "target": lair.url}),
                ("/star/drain", {"instance": engine.name, "targets": [lair.url]}),
                ("/star/drain", {"instance": lair.url}),
            ):
                status, _ = await running.post(path, body, headers=ADMIN)
                assert status in (400, 404, 409)
            assert lair.visits == 0
            assert engine.orders == other.orders == []

    run(check())


def test_a_client_cannot_choose_where_the_halves_of_a_request_meet():
    """The decode instance connects to the bootstrap address that it is told."""

    async def check():
        engines = [FakeEngine("prefill"), FakeEngine("decode")]
        async with Lair() as lair, fleet(*engines, **KEYS) as running:
            wish = {"bootstrap_host": "127.0.0.1", "bootstrap_port": lair.port, "bootstrap_room": 1}
            body = orjson.dumps(STREAM | wish)
            for sent in (body, body[:-1] + b"," + orjson.dumps(wish)[1:-1] + b" } \r\n"):
                async with running.session.post(
                    running.url + "/generate", data=sent, headers=CLIENT
                ) as answer:
                    assert answer.status == 200
                    await answer.read()
            for engine in engines:
                for got in engine.requests:
                    assert got["bootstrap_port"] != lair.port
                    assert got["bootstrap_room"] != 1
            assert lair.visits == 0

    run(check())


def test_connections_that_say_nothing_are_closed():
    async def check():
        engine = FakeEngine()
        async with fleet(engine, head_timeout=0.3, **KEYS) as running:
            host, port = running.url.removeprefix("http://").split(":")
            silent = [await asyncio.open_connection(host, int(port)) for _ in range(50)]
            for reader, writer in silent:
                assert await asyncio.wait_for(reader.read(), WAIT_S) == b""
                writer.close()
            assert await counted(running, "slow_heads_total") == 50
            assert (await running.post("/generate", STREAM, headers=CLIENT))[0] == 200

    run(check())


def test_bodies_of_those_without_a_key_are_not_kept():
    async def check():
        engine = FakeEngine()
        async with fleet(engine, **KEYS) as running:
            host, port = running.url.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 900000000\r\n\r\n")
            writer.write(b"{" * 100_000)
            assert b" 401 " in await reader.readline()
            assert await counted(running, "buffered_bytes") == 0
            writer.close()

    run(check())


# --------------------------------------------------------------------------- engines' sockets


def member(key: FleetKey) -> Links:
    return Links(
        "a", 1, host="127.0.0.1", advertise_host="127.0.0.1", migration_port=0, status_port=0,
        heartbeat_s=0.05, timeout_s=WAIT_S, stuck_s=WAIT_S, access=key,
    )  # fmt: skip


def lies(lair: Lair, key: FleetKey) -> list[bytes]:
    """Tokens into a stream, its end, its hand-over, and addresses to connect to."""
    route = Route(migration_id="m", stream_id="s", receiver=1)
    chunk = TokenChunk(migration_id="m", stream_id="s", index=1, token_ids=(1, 2, 3))
    place = f"tcp://127.0.0.1:{lair.port}"
    homes = [
        Peer(instance_id="x", incarnation=1, address=address)
        for address in (place, f"{place}#{key.ids()[0]}")
    ]
    beats = [Heartbeat(sender=home, receiver=1, live=("s",)) for home in homes]
    said = [Tokens(receiver=1, chunks=(chunk,)), Release(route=route, reason="over"), *beats]
    return [encode(message) for message in (*said, *MESSAGES)]


@pytest.mark.parametrize("knows", ["nothing", "the server's public key"])
def test_over_the_sockets_of_engines(knows, tmp_path: Path):
    key = create(tmp_path / "fleet.key")

    async def check():
        links = member(key)
        context = zmq.Context()
        engine = FakeEngine()
        try:
            async with Lair() as lair, fleet(engine, **KEYS) as running:
                sockets = []
                for kind, address in (
                    (zmq.PUSH, links.peer.address), (zmq.SUB, links.status_address),
                ):  # fmt: skip
                    socket = context.socket(kind)
                    socket.linger = 0
                    if knows != "nothing":
                        socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
                        socket.curve_serverkey = zmq.curve_public(key.secrets[0])
                    socket.connect(address.partition("#")[0])
                    sockets.append(socket)
                push, sub = sockets
                sub.subscribe(b"")
                for lie in lies(lair, key):
                    push.send(lie)
                why = "no key" if knows == "nothing" else "unknown key"
                await eventually(lambda: links.dropped[why] >= 2)  # at either socket
                for _ in range(20):
                    links.publish(engine.status((VICTIM,)))
                    await asyncio.sleep(0.01)
                assert not sub.poll(0)
                assert links.mail.is_empty()
                assert not links._connections
                assert lair.visits == 0
                # As an engine tells it, and the router shows it.
                await running.publish(engine, dropped=dict(links.dropped))
                assert await counted(running, "dropped_messages_total") >= 2
        finally:
            context.destroy(linger=0)
            links.close()

    run(check())


def test_who_stands_in_for_a_members_status_socket_is_not_listened_to(tmp_path: Path):
    """An address without our key's name is not connected to; one with it has to prove it."""
    key = create(tmp_path / "fleet.key")

    class Impostor(FakeEngine):
        async def server_info(self, request):
            answer = await super().server_info(request)
            info = orjson.loads(answer.body)
            info["star"]["status_address"] += self.suffix
            answer.body = orjson.dumps(info)
            return answer

    async def check():
        bare, liar = Impostor(), Impostor()
        bare.suffix, liar.suffix = "", f"#{key.ids()[0]}"
        async with fleet(bare, liar, fleet_key=str(tmp_path / "fleet.key"), **KEYS) as running:
            feed = running.router.feed
            await eventually(lambda: feed.dropped[bare.url, "address"])
            until = time.monotonic() + 1.0
            while time.monotonic() < until:
                for engine in (bare, liar):
                    with contextlib.suppress(zmq.ZMQError):
                        await engine.publish(engine.status((VICTIM,)))
                await asyncio.sleep(0.02)
            assert feed.received == 0
            assert await counted(running, "statuses_dropped_total") >= 1

    run(check())
