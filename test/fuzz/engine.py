"""An engine: its sockets, its orders, its HTTP routes, what its moves say, and its key exchange."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import orjson
import zmq
import zmq.asyncio
from fastapi import FastAPI

from fuzz.found import Found
from sglang_star.endpoints import Endpoints, OrderClient
from sglang_star.errors import PeerError
from sglang_star.faults import Faults
from sglang_star.fleet_key import Access, FleetKey, Unlocked, create
from sglang_star.migration.links import Links
from sglang_star.migration.transport import nixl, shm
from sglang_star.migration.transport.memory import HostRegion
from sglang_star.orders import Orders
from sglang_star.protocol import (
    DisarmOrder,
    DrainOrder,
    MigrateOrder,
    OrderReply,
    Peer,
    Release,
    Route,
    StatusOrder,
    UndrainOrder,
    decode,
    encode,
)
from simulation import garble
from simulation.garbled import Garbled
from simulation.plan import Allowed, draw
from unit.test_protocol import MESSAGES

PEER = Peer(instance_id="b", incarnation=1, address="tcp://127.0.0.1:1")
ORDERS = (
    StatusOrder(order_id=1),
    MigrateOrder(order_id=2, rid="r0", target=PEER, at_tokens=0, hold_after=3),
    MigrateOrder(order_id=3, rid="r*", target=PEER, at_tokens=9, expire_s=5.0),
    DisarmOrder(order_id=4, rid="r0"),
    DrainOrder(order_id=5, targets=(PEER,)),
    UndrainOrder(order_id=6),
)
BODIES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/star/migrate", {"rid": "r", "target": "x", "peer": {"instance_id": "b", "incarnation": 1,
                       "address": "tcp://127.0.0.1:1"}, "reason": "x", "at_tokens": 3,
                       "hold_after": None, "expire_s": 4.0}),
    ("/star/migrate", {"rid": "r", "target": "http://127.0.0.1:1"}),
    ("/star/disarm", {"rid": "r"}),
    ("/star/drain", {"targets": ["http://127.0.0.1:1"], "peers": [None]}),
    ("/star/undrain", {}),
)  # fmt: skip
GREETING = Release(route=Route(migration_id="m", stream_id="s", receiver=1), reason="hello")
HANGS_S = 120.0


@contextlib.contextmanager
def links(access: Access) -> Iterator[Links]:
    one = Links(
        "a", 1, host="127.0.0.1", advertise_host="127.0.0.1", migration_port=0, status_port=0,
        heartbeat_s=0.05, timeout_s=HANGS_S, stuck_s=HANGS_S, access=access,
    )  # fmt: skip
    try:
        yield one
    finally:
        one.close()


def still_hears(here: Links, access: Access, found: Found, where: str) -> None:
    """Whether a member gets a message through."""
    with links(access) as other:
        other.send(here.peer, GREETING)
        deadline = time.monotonic() + HANGS_S
        while here.mail.take() != GREETING:
            if time.monotonic() > deadline:
                found.note(f"{where}: a member is not heard any more", here.dropped)
                return
            time.sleep(0.001)


def sockets(count: int, dice: random.Random, found: Found) -> None:
    """Changed messages at the migration and the order socket of a process that serves."""
    with links(Unlocked()) as here:
        context: zmq.Context[Any] = zmq.Context()
        push, dealer = context.socket(zmq.PUSH), context.socket(zmq.DEALER)
        push.connect(here.peer.address)
        dealer.connect(here.order_address)
        for number in range(count):
            if number % 4 == 3:
                data = garble.changed(dice.choice(ORDERS), dice)
                dealer.send_multipart([data] * dice.choice((1, 1, 2)))
            else:
                push.send(garble.changed(dice.choice(MESSAGES), dice))
            found.sent += 1
            if number % 100 == 99:
                time.sleep(0.002)
                while here.mail.take() is not None:
                    found.taken += 1
        context.destroy(linger=2000)
        if not here._thread.is_alive():
            found.note("sockets: the thread of the sockets has ended", here.dropped)
            return
        still_hears(here, Unlocked(), found, "sockets")


def recorded(here: Links, key: FleetKey) -> bytes:
    """What a member says to another on the wire, from the first byte on."""
    said = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as between:
        host, _, port = here.peer.address.removeprefix("tcp://").partition("#")[0].partition(":")

        def carry() -> None:
            client, _ = between.accept()
            server = socket.create_connection((host, int(port)))

            def back() -> None:
                with contextlib.suppress(OSError):
                    while data := server.recv(65536):
                        client.sendall(data)

            threading.Thread(target=back, daemon=True).start()
            with contextlib.suppress(OSError):
                while data := client.recv(65536):
                    said.extend(data)
                    server.sendall(data)
            server.close()
            client.close()

        threading.Thread(target=carry, daemon=True).start()
        context: zmq.Context[Any] = zmq.Context()
        push = context.socket(zmq.PUSH)
        key.connect(push, f"tcp://127.0.0.1:{between.getsockname()[1]}#{key.ids()[0]}")
        push.send(encode(GREETING))
        deadline = time.monotonic() + HANGS_S
        while here.mail.take() != GREETING:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        context.destroy(linger=0)
    return bytes(said)


def key_exchange(count: int, dice: random.Random, found: Found) -> None:
    """A handshake of a member, changed and repeated, at a process with a fleet key."""
    with tempfile.TemporaryDirectory() as folder:
        key = create(Path(folder) / "fleet.key")
        with links(key) as here:
            whole = recorded(here, key)
            ports = [int(one.partition("#")[0].rpartition(":")[2])
                     for one in (here.peer.address, here.status_address)]  # fmt: skip
            for number in range(count):
                data = whole
                for _ in range(dice.choice((0, 1, 1, 2, 3))):
                    data = garble._bent(data, dice) if data else whole
                found.sent += 1
                with contextlib.suppress(OSError), socket.socket() as stranger:
                    stranger.settimeout(5.0)
                    stranger.connect(("127.0.0.1", ports[number % 2]))
                    stranger.sendall(data)
                    if number % 8 == 0:
                        stranger.shutdown(socket.SHUT_WR)
                        stranger.recv(1000)
                while (item := here.mail.take()) is not None:
                    found.note("key exchange: a stranger's message was taken in", item)
            if not here._thread.is_alive():
                found.note("key exchange: the thread of the sockets has ended", here.dropped)
                return
            found.taken += 0
            still_hears(here, key, found, "key exchange")


def moves(count: int, seed: int, found: Found) -> None:
    """Changed copies among the messages of whole histories, into the handlers of moves."""
    said = 0
    while said < count:
        history = Garbled(draw(seed, Allowed()), 0.3)
        if failure := history.run():
            found.note(f"moves: {failure[:80]}", f"seed {seed}: {failure}\n{history.stack}")
        said += history.said + history.unheard
        found.taken += history.said
        seed += 1
    found.sent += said


def orders(count: int, dice: random.Random, found: Found) -> None:
    """Changed orders into the scheduler's hands, in a history that is running."""
    history = Garbled(draw(dice.randrange(10**6), Allowed()), 0.0)
    node = next(iter(history.nodes.values()))
    carried_out: Orders = node.orders
    faults = Faults()
    for _ in range(count):
        order = garble.understood(garble.changed(dice.choice(ORDERS), dice))
        found.sent += 1
        if order is None or isinstance(order, StatusOrder):
            continue  # a simulated engine has no status
        found.taken += 1
        with faults.contained("an order"):
            try:
                reply = carried_out.obey(order)
                decode(encode(reply))
                carried_out.step()
            except Exception as error:
                found.error("orders", error, order)
    if len(node.mover.armed) > 4096:
        found.note("orders: armed orders without an end", len(node.mover.armed))


def setups(count: int, dice: random.Random, found: Found) -> None:
    """What a peer says of its memory."""
    region = HostRegion(2, 64)
    shared = shm.SharedMemory(region)
    real = [
        (shared, shared.setup()),
        (nixl.Nixl(region, "a", 2), msgspec.msgpack.encode(nixl.Setup(b"m" * 40, 1 << 20, 2, 64))),
    ]
    real[1][0]._setup = b"ready"  # as if it had been started, without a network
    real[1][0]._thread = threading.current_thread()
    for _ in range(count):
        transport, setup = dice.choice(real)
        tree = msgspec.msgpack.decode(setup)
        for _ in range(dice.choice((1, 1, 2))):
            tree = garble._other(tree, dice)
        data = msgspec.msgpack.encode(tree)
        if dice.random() < 0.2 and data:
            data = garble._bent(data, dice)
        found.sent += 1
        try:
            transport.open(data).close()
            found.taken += 1
        except PeerError:
            pass
        except Exception as error:
            found.error("setups", error, (transport.name, data))
        if isinstance(transport, nixl.Nixl):
            transport._inbox.clear()


def endpoints(count: int, dice: random.Random, found: Found) -> None:
    """Changed bodies at an engine's own routes."""

    async def check() -> None:
        with tempfile.TemporaryDirectory() as folder:
            address = f"ipc://{folder}/orders"
            scheduler = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
            scheduler.bind(address)

            async def obey() -> None:
                while True:
                    sender, data = await scheduler.recv_multipart()
                    reply = OrderReply(order_id=decode(data).order_id)
                    await scheduler.send_multipart([sender, encode(reply)])

            app = FastAPI()
            Endpoints(OrderClient(address)).join(app, lambda handler: handler)
            obeying = asyncio.create_task(obey())
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://e") as client:
                for _ in range(count):
                    path, tree = dice.choice(BODIES)
                    changed: Any = tree
                    for _ in range(dice.choice((0, 1, 1, 2))):
                        changed = garble._other(changed, dice)
                    try:
                        body = orjson.dumps(changed, default=lambda one: one.decode("latin-1"))
                    except (TypeError, orjson.JSONEncodeError):
                        body = b"{}"
                    if dice.random() < 0.2 and body:
                        body = garble._bent(body, dice)
                    found.sent += 1
                    try:
                        answer = await client.post(path, content=body)
                    except Exception as error:
                        found.error("endpoints", error, (path, body))
                        continue
                    found.taken += answer.status_code < 300
                    if answer.status_code == 500:
                        found.note("endpoints: answered 500", (path, body, answer.text))
            obeying.cancel()
            scheduler.close(linger=0)

    asyncio.run(check())


def run(share: float, seed: int, found: Found) -> None:
    """All of it."""
    dice = random.Random(seed)
    sockets(int(30_000 * share), dice, found)
    key_exchange(int(5_000 * share), dice, found)
    orders(int(10_000 * share), dice, found)
    setups(int(10_000 * share), dice, found)
    endpoints(int(5_000 * share), dice, found)
    moves(int(20_000 * share), seed, found)
